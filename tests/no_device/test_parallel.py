"""A quantized model in two processes, launched by torchrun, gloo between them: as in one process.

On a machine without GPUs this shows that the packed modules, their shared quantizers and loading work in a launch and
under diffusers' context parallelism. Speed and NCCL are not shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    pipelines.quantized("flux").save_pretrained(path)
    return path


def torchrun(folder: Path, how: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    flags = ["--standalone", f"--nproc-per-node={processes}"]
    command = ["-m", "torch.distributed.run", *flags, str(TESTS / "parallel_rank.py")]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command, how, str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def made(folder: Path, how: str) -> torch.Tensor:
    done = torchrun(folder, how)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / f"{how}.safetensors")["made"]


def test_data_parallel_launch_draws_the_same_pictures(folder: Path) -> None:
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(folder))
    got = made(folder, "data")
    for number, prompt in enumerate(pipelines.PROMPTS):
        want = pipelines.call(pipe, prompt, seed=number)[0]
        assert torch.equal(got[number], torch.from_numpy(want))


@torch.no_grad()
def test_context_parallel_is_one_process(folder: Path) -> None:
    """Ulysses: each process has half of the tokens, and in attention half of the heads."""
    model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    want = model(**pipelines.flux_inputs(text=8)).sample
    got = made(folder, "ulysses")
    # Rows are quantized one by one, so only BLAS's sums over other numbers of rows differ; here and there an element
    # is rounded to its neighbour in 4 bits then.
    assert (got - want).norm() / want.norm() < 1e-3


def test_ring_attention_needs_a_gpu(folder: Path) -> None:
    """On the CPU there is no attention that gives the log-sum-exp which the ring adds up; diffusers says so."""
    done = torchrun(folder, "ring")
    assert done.returncode != 0
    assert "return_lse" in done.stderr or "lse" in done.stderr.lower(), done.stderr[-3000:]
