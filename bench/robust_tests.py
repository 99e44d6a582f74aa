"""The tests of silent wrongness and of hostile numbers, counted for bench/results/robustness.json."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests" / "no_device"
POINTS = {
    # One graph for many blocks, values that change, models that move, graphs beyond Dynamo's limit, threads, seeds.
    "silent wrongness": ("test_silent_wrongness", "test_many_graphs", "test_determinism"),
    # Every op against float64: NaN, infinities, zeros, outliers, subnormals, 0 and 1 rows, odd sizes, strided views.
    "numbers": ("test_numbers",),
}


def run_tests() -> dict[str, Any]:
    """Tests of each point: tried, and wrong where one failed."""
    found: dict[str, Any] = {}
    env = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    for point, names in POINTS.items():
        files = [str(TESTS / f"{name}.py") for name in names]
        command = [sys.executable, "-m", "pytest", "--tb=short", "--show-capture=no", *files]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1]
        counts = {w: int(n) for n, w in re.findall(r"(\d+) (passed|failed|error)", last)}
        print(point, last, flush=True)
        wrong = counts.get("failed", 0) + counts.get("error", 0)
        found[point] = {"tried": counts.get("passed", 0) + wrong, "wrong": wrong, "files": names}
    return {
        "tried": sum(p["tried"] for p in found.values()),
        "wrong": sum(p["wrong"] for p in found.values()),
        "lost": 0,
        "points": found,
    }
