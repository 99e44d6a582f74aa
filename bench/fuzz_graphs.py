"""Random graphs in number: folds, observers and lowering on each (tests/graphs.py, tests/graph_properties.py).

    python bench/fuzz_graphs.py --graphs 10000 --out bench/results/fuzz_graphs.json

Each graph is made from its own seed, so a counterexample is reproduced by `--first SEED --graphs 1`. Every fourth
graph is also quantized and lowered. `--shards` processes share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from graph_properties import check, check_lowering
from graphs import random_network

LOWERED = 4  # one graph in so many is lowered too
CHUNK = 250  # results are stored after so many


def run(first: int, count: int) -> tuple[Counter, list[dict[str, Any]]]:
    """Check the graphs of `count` seeds from `first` on."""
    torch.set_num_threads(1)
    counts: Counter = Counter()
    wrong: list[dict[str, Any]] = []
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        net = random_network(lambda n, rng=rng: int(rng.integers(n)))
        counts["tried"] += 1
        counts.update(f"move {m}" for m in net.moves)
        for property_ in (check, check_lowering) if seed % LOWERED == 0 else (check,):
            try:
                property_(net, seed, counts)
            except Exception:
                error = traceback.format_exc(limit=-2)
                wrong.append({"seed": seed, "moves": net.moves, "error": error})
                print(json.dumps(wrong[-1]), flush=True)
    return counts, wrong


def summary(counts: Counter, wrong: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What is stored: counts, the share of quantized inputs whose permutation folds, histograms."""
    named: dict[str, dict[str, int]] = {"op": {}, "move": {}}
    plain: dict[str, int] = {}
    for key, n in counts.most_common():
        kind, _, rest = key.partition(" ")
        if kind in named:
            named[kind][rest] = n
        else:
            plain[key.replace(":", "").replace(" ", "_")] = n
    return {
        "tried": plain.pop("tried"),
        "wrong": len(wrong),
        "counterexamples": wrong,
        "foldable_share": round(counts["foldable points"] / max(counts["points"], 1), 4),
        **plain,
        "moves": named["move"],
        "operations": named["op"],
        "torch": torch.__version__,
        "device": "cpu",
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start, counts = time.perf_counter(), Counter()
    wrong: list[dict[str, Any]] = []
    end = args.first + args.graphs
    firsts = range(args.first, end, CHUNK)
    with ProcessPoolExecutor(args.shards) as pool:
        for some, bad in pool.map(run, firsts, [min(CHUNK, end - i) for i in firsts]):
            counts += some
            wrong += bad
            result = summary(counts, wrong, time.perf_counter() - start)
            brief = {k: result[k] for k in ("tried", "wrong", "foldable_share", "seconds")}
            print(json.dumps(brief), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
