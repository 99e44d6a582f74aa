"""The coverage table: what would be quantized in each model class, at full depth and width, without weights.

    python bench/coverage_table.py   all classes -> bench/results/coverage.json and coverage.md
    python bench/coverage_table.py flux sana   some of them; the others keep their rows
    python bench/coverage_table.py --snapshot   one block of each kind -> tests/no_device/coverage.json (the test's)

A drop against the snapshot fails `tests/no_device/test_coverage.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from models import MODELS

import pq_fx

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SNAPSHOT = ROOT / "tests" / "no_device" / "coverage.json"
# One matrix too narrow for a group, at any depth; a plain module has no published config either.
ABSTRACT = ("mlp",)


def look(name: str, layers: int | None = None) -> dict[str, Any]:
    """The summary of one class at its published width; `layers` limits each kind of block."""
    torch.compiler.reset()
    model, inputs = MODELS[name].published(layers)
    found = pq_fx.inspect(model, **inputs, config="w4a4-int4")
    return {"class": found.model, **found.summary()}


def snapshot_row(row: dict[str, Any]) -> dict[str, Any]:
    """What a test compares: shares as percent, counts."""
    return {
        "block_gemm_percent": round(100 * row["block_gemm_flop_share"], 2),
        "parameter_percent": {k: round(100 * v, 2) for k, v in row["parameter_share"].items()},
        "linears": row["linears_by_treatment"],
        "regions": row["regions"],
        "absorb": row["absorb"],
    }


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the README."""
    lines = [
        "| class | block GEMM FLOPs in 4 bits | parameters: 4 bits / weights only / 16 bits | regions | "
        "fold / stream / norm / quantize | GiB before -> after | left in 16 bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        params = " / ".join(
            f"{100 * row['parameter_share'][k]:.1f}" for k in row["parameter_share"]
        )
        absorbs = " / ".join(str(n) for n in row["absorb"].values())
        memory = f"{row['float_bytes'] / 2**30:.2f} -> {row['quantized_bytes'] / 2**30:.2f}"
        skips = "; ".join(
            f"{n} {reason.split(':')[0]}" for reason, n in merged(row["skips"]).items()
        )
        lines.append(
            f"| {row['class']} | {100 * row['block_gemm_flop_share']:.2f} % | {params} | {row['regions']} | "
            f"{absorbs} | {memory} | {skips} |"
        )
    return "\n".join(lines) + "\n"


def merged(skips: dict[str, int]) -> dict[str, int]:
    """Skips with the same first words counted together."""
    result: dict[str, int] = {}
    for reason, count in skips.items():
        key = reason.split(":")[0]
        result[key] = result.get(key, 0) + count
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CLASS", help=", ".join(MODELS))
    parser.add_argument("--layers", type=int, help="limit each kind of block")
    parser.add_argument("--snapshot", action="store_true", help="write the test's snapshot")
    args = parser.parse_args()
    layers = 1 if args.snapshot else args.layers
    names = args.names or [n for n in MODELS if n not in ABSTRACT]
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        rows[name] = look(name, layers)
        print(name, json.dumps(rows[name]), flush=True)
    print(markdown(rows))
    if args.snapshot:
        # Only rows that were looked at change, so that one class can be renewed alone.
        known = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
        known |= {name: snapshot_row(row) for name, row in rows.items()}
        text = json.dumps({n: known[n] for n in MODELS if n in known}, indent=1)
        SNAPSHOT.write_text(text + "\n")
    if layers is None:
        path = RESULTS / "coverage.json"
        known = json.loads(path.read_text())["classes"] if args.names and path.exists() else {}
        known |= rows
        classes = {n: known[n] for n in MODELS if n in known}
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        text = json.dumps({**versions, "device": "meta", "classes": classes}, indent=1)
        path.write_text(text + "\n")
        (RESULTS / "coverage.md").write_text(markdown(classes))


if __name__ == "__main__":
    main()
