"""Starts parallel_rank.py by torchrun, as a user starts a script, and the two processes of calibrating_rank.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent


def start(folder: Path, how: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    """Two processes of `parallel_rank.py how folder device`."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command, str(TESTS / "parallel_rank.py"), how, str(folder), device],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def made(folder: Path, how: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What the first process wrote: "made", and "compiled" where tokens are spread."""
    done = start(folder, how, device)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / f"{how}.safetensors")


def calibrate(folder: Path, device: str = "cpu") -> None:
    """Two processes of `calibrating_rank.py rank folder device`."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "calibrating_rank.py"), str(rank), str(folder), device],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in ranks:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
