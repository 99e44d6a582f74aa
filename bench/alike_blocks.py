"""What one structure for each role (`QuantConfig.alike_blocks`) costs in fidelity, on a trained demo model.

    python bench/alike_blocks.py --images 32 --out bench/results/alike_blocks.json

One calibration serves all; the same pictures are drawn from the same noise with blocks alike and with blocks that
choose freely. Differences are paired, with 95 % bootstrap intervals over pictures. "structures" counts the unlike
structures of quantized linears by role: what `compile_repeated_blocks` compiles apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pq_fx
from pq_fx.alike import role
from pq_fx.demo import load_model
from pq_fx.modules import quantized_linears

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fidelity import Pictures, calibrated
from statistics_of_pictures import bootstrap, ratio_bootstrap

VARIANTS = [(f, m) for f in ("int4", "int3") for m in ("permuquant", "permuquant-h", "best")]


def structures(model: nn.Module) -> tuple[int, int]:
    """Roles, and the unlike structures that they have in all."""
    found: dict[tuple[str, ...], set[tuple[Any, ...]]] = {}
    for name, linear in quantized_linears(model).items():
        q = linear.input_quantizer
        parts = () if q is None else (q.perm is None, q.clip is None, q.smooth is None, q.rotation)
        found.setdefault(role([f"{name}."]), set()).add(parts)
    return len(found), sum(len(s) for s in found.values())


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each variant both ways."""
    model = load_model(args.arch).to(args.device)
    statistics, pictures = calibrated(model, args), Pictures(model, args)
    shared = ("arch", "images", "steps", "calibration", "rows", "device")
    result: dict[str, Any] = {k: getattr(args, k) for k in shared}
    result |= {"torch": torch.__version__, "rows_by_variant": []}
    for weights, method in VARIANTS:
        found, row = {}, {"weights": weights, "method": method}
        for alike in (False, True):
            clone = copy.deepcopy(model)
            config = pq_fx.QuantConfig(
                weights, method=method, calibration_rows=args.rows, alike_blocks=alike
            )
            report = pq_fx.prepare(clone, config, statistics=statistics).convert()
            found[alike] = pictures.distances(clone)
            roles, unlike = structures(clone)
            row["alike" if alike else "free"] = {
                "psnr_db": bootstrap(found[alike]["psnr"]),
                "velocity_rel_mse": bootstrap(found[alike]["velocity"].mean(0)),
                "layer_error": round(report.mean_layer_error, 6),
                "roles": roles,
                "structures": unlike,
            }
        a, b = found[False], found[True]
        row["psnr_db_change"] = bootstrap(b["psnr"] - a["psnr"])
        row["velocity_change"] = ratio_bootstrap(a["velocity"].mean(0), b["velocity"].mean(0))
        result["rows_by_variant"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=("flux", "zimage"), default="flux")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--calibration", type=int, default=32, help="prompts")
    parser.add_argument("--rows", type=int, default=1024, help="rows kept of each linear's input")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
