"""One seed in two processes gives equal bytes; another seed changes the sampled rows and what follows from them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from robust_model import calibrated, float_model

import pq_fx
from pq_fx.statistics_file import load_statistics
from pq_fx.storage import sha256

SETTINGS: tuple[dict[str, Any], ...] = (
    {"format": "int4", "group_size": 16, "method": "permuquant-h"},
    {"format": "int3", "group_size": 16, "method": "best"},
    {"format": "nvfp4", "method": "permuquant"},
    {"format": "int4", "group_size": 16, "activation_format": "fp8", "method": "rtn"},
)
REPORT = "quantization_report.json"  # holds seconds


def write(base: Path, seed: int) -> None:
    """Calibrate, convert and save by each setting, in this process."""
    for number, settings in enumerate(SETTINGS):
        model = float_model()
        config = pq_fx.QuantConfig(**settings, calibration_rows=8, seed=seed)
        quantizer = calibrated(model, config)
        folder = base / str(number)
        folder.mkdir(parents=True)
        quantizer.save_statistics(folder / "statistics")
        quantizer.convert()
        pq_fx.save(model, folder / "m")


def run_repeat(work: Path) -> dict[str, Any]:
    """Three processes: seed 0 twice, under other hash seeds, and seed 1."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        env = os.environ | {"PYTHONHASHSEED": str(len(name) + seed + ord(name))}
        command = [sys.executable, __file__, str(work / name), str(seed)]
        subprocess.run(command, env=env, check=True)
    files = [f.relative_to(work / "a") for f in sorted((work / "a").rglob("*")) if f.is_file()]
    compared = [f for f in files if f.name != REPORT]
    wrong = [str(f) for f in compared if sha256(work / "a" / f) != sha256(work / "b" / f)]
    for number in range(len(SETTINGS)):
        one, other = (load_statistics(work / n / str(number) / "statistics") for n in "ac")
        for name, moments in one.moments.items():
            theirs = other.moments[name]
            for field in ("count", "calls", "sum_squares", "amax"):
                if not torch.equal(getattr(moments, field), getattr(theirs, field)):
                    wrong.append(f"seed changes {field} of {name}")
            if torch.equal(moments.keys, theirs.keys):
                wrong.append(f"seed does not change the sample of {name}")
    return {"tried": len(compared), "wrong": len(wrong), "lost": 0, "found": wrong}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(run_repeat(Path(folder)))
