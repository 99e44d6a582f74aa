"""Where the error of int4 `best` comes from: what is left when some linears stay in float, or calibration sees more.

    python bench/error_sources.py --arch flux --images 256 --device cuda --out bench/results/error_sources_flux.json

Each row is one conversion of the trained demo model, measured as in bench/fidelity.py: PSNR of its pictures with a
95 % interval, the velocity's relative MSE, mean and by time. `--part 1 --parts 4` makes every fourth row, so that
several processes can share a GPU; `--more` joins their files. The file is written after every row.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pq_fx
from pq_fx.demo import load_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fidelity

# What a row changes of QuantConfig("int4", method="best").
SETTINGS: dict[str, dict[str, Any]] = {
    "best": {},
    "permuquant-h": {"method": "permuquant-h"},
    "16-bit activations": {"activation_format": None},
    "8-bit weights": {"format": "int8", "group_size": 64, "activation_format": "int4f"},
    "groups of 32": {"group_size": 32},
    "no half rotations": {"parts": {"half_rotate": False}},
    "no orders": {"parts": {"sort": False}},
    "any gather": {"gather_margin": 0.0},
}
# What calibration sees instead of 32 prompts at 8 steps, of which 1,024 rows of each tensor are kept.
CALIBRATIONS: dict[str, dict[str, int]] = {
    "12 steps": {"steps": 12},
    "24 steps": {"steps": 24},
    "64 prompts": {"prompts": 64},
    "2048 rows": {"rows": 2048},
    "4096 rows, 64 prompts, 12 steps": {"rows": 4096, "prompts": 64, "steps": 12},
}
# Linears that stay in float, by regex.
FLOAT: dict[str, dict[str, str]] = {
    "flux": {
        "double blocks": r"transformer_blocks.*",
        "double blocks' feed-forward": r"transformer_blocks.*ff\..*",
        "double blocks' attention": r"transformer_blocks.*attn.*",
        "double blocks' text side": r"transformer_blocks.*(context|add).*",
        "single blocks' proj_out": r"single.*proj_out",
        "single blocks' inputs": r"single.*(to_.|proj_mlp)",
        "modulation": r".*norm.*",
    },
    "zimage": {
        "text refiner": r"context_refiner\..*",
        "image refiner": r"noise_refiner\..*",
        "to_q, to_k, to_v": r"layers.*to_[qkv]",
        "to_out": r"layers.*to_out\.0",
        "w1, w3": r"layers.*w[13]",
        "w2": r"layers.*w2",
        "first layer": r"layers\.0\..*",
        "last layer": r"layers\.2\..*",
        "embedders, final layer": r"(all_|cap|t_emb).*",
        "modulation": r".*adaLN.*",
    },
}


def statistics(model: nn.Module, rows: int = 1024, prompts: int = 32, steps: int = 8) -> Any:
    """What the float model shows on calibration prompts."""
    args = argparse.Namespace(rows=rows, calibration=prompts)
    return fidelity.calibrated(model, args, steps=steps)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure this part's rows; see the module's docstring."""
    model = load_model(args.arch).to(args.device)
    pictures = fidelity.Pictures(
        model, argparse.Namespace(images=args.images, steps=12, device=args.device)
    )
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "arch": args.arch,
        "images": args.images,
        "rows": [],
    }
    usual = statistics(model)
    plan: list[tuple[str, dict[str, Any], dict[str, int]]] = [
        *((name, own, {}) for name, own in SETTINGS.items()),
        *((name, {"calibration_rows": own.get("rows", 1024)}, own) for name, own in CALIBRATIONS.items()),
        *((f"{name} in float", {"rules": {f"re:{x}": None}}, {}) for name, x in FLOAT[args.arch].items()),
    ]  # fmt: skip
    for name, settings, calibration in plan[args.part :: args.parts]:
        start = time.perf_counter()
        changed = copy.deepcopy(model)
        config = pq_fx.QuantConfig(**{"format": "int4", "method": "best", **settings})
        seen = statistics(model, **calibration) if calibration else usual
        report = pq_fx.prepare(changed, config, statistics=seen).convert()
        found = fidelity.row_of(pictures.distances(changed), report)
        row = {
            "name": name,
            "psnr": found["psnr_db"],
            "velocity": found["velocity_rel_mse"][0],
            "by_time": found["velocity_rel_mse_by_time"],
            "in_float": sum(layer.skip_reason is not None for layer in report.layers),
            "seconds": round(time.perf_counter() - start, 1),
        }
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    return result


def joined(files: list[Path]) -> dict[str, Any]:
    """The files of several parts as one."""
    parts = [json.loads(file.read_text()) for file in files]
    return {**parts[0], "rows": [row for part in parts for row in part["rows"]]}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=list(FLOAT), default="flux")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--more", type=Path, nargs="+", help="files to join")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = joined(args.more) if args.more else run(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
