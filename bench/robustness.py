"""Nothing wrong, nothing lost: damage, faults and repetition, counted.

    python bench/robustness.py mutations --count 1000 --out bench/results/robustness.json
    python bench/robustness.py tests --out bench/results/robustness.json
    python bench/robustness.py repeat --out bench/results/robustness.json
    python bench/robustness.py faults --kills 50 --out bench/results/robustness.json

Each command replaces its own part of the JSON. `wrong` counts what must never be: other numbers without an error, an
exception without a name, a hang, executed code, a file opened elsewhere, a model half changed. `lost` counts work that
was there before a fault and is not afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from robust_faults import run_faults
from robust_mutations import run_mutations
from robust_repeat import run_repeat
from robust_tests import run_tests


def versions() -> dict[str, str]:
    names = "torch", "triton", "diffusers", "safetensors"
    return {n: version(n) for n in names} | {"python": sys.version.split()[0], "device": "cpu"}


def store(out: Path, part: str, result: dict[str, Any]) -> None:
    whole = json.loads(out.read_text()) if out.exists() else {}
    whole[part] = result | {"versions": versions()}
    out.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["mutations", "faults", "repeat", "tests"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.part == "mutations":
            result = run_mutations(args.count, args.seed, Path(work))
        elif args.part == "repeat":
            result = run_repeat(Path(work))
        elif args.part == "tests":
            result = run_tests()
        else:
            result = run_faults(args.kills, args.seed, Path(work))
    print(json.dumps({k: v for k, v in result.items() if k not in ("by_kind", "found")}, indent=1))
    if args.out:
        store(args.out, args.part, result)
    sys.exit(1 if result["wrong"] or result["lost"] else 0)


if __name__ == "__main__":
    main()
