"""A quantized model in two processes, launched by torchrun, gloo between them: as in one process.

On a machine without GPUs this shows that the packed modules, their shared quantizers and loading work in a launch and
under diffusers' context parallelism. Speed and NCCL are not shown.
"""

from __future__ import annotations

from pathlib import Path

import pipelines
import torch
import torchrun
from diffusers import DiffusionPipeline, FluxTransformer2DModel


def test_data_parallel_launch_draws_the_same_pictures(flux_folder: Path) -> None:
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(flux_folder))
    got = torchrun.made(flux_folder, "data")["made"]
    for number, prompt in enumerate(pipelines.PROMPTS):
        want = pipelines.call(pipe, prompt, seed=number)[0]
        assert torch.equal(got[number], torch.from_numpy(want))


@torch.no_grad()
def test_context_parallel_is_one_process(flux_folder: Path) -> None:
    """Ulysses: each process has half of the tokens, and in attention half of the heads; also with compiled blocks."""
    model = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer")
    want = model(**pipelines.flux_inputs(text=8)).sample
    got = torchrun.made(flux_folder, "ulysses")
    # Rows are quantized one by one, so only BLAS's sums over other numbers of rows differ; here and there an element
    # is rounded to its neighbour in 4 bits then.
    for how in ("made", "compiled"):
        assert (got[how] - want).norm() / want.norm() < 1e-3, how


@torch.no_grad()
def test_ring_attention_is_one_process(flux_folder: Path) -> None:
    """Each process has half of the tokens, and meets the keys and values of the others one process at a time.

    The CPU's flash attention stands in for the GPU's, which alone diffusers asks for a log-sum-exp.
    """
    model = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer")
    want = model(**pipelines.flux_inputs(text=8)).sample
    got = torchrun.made(flux_folder, "ring-cpu")
    for how in ("made", "compiled"):
        assert (got[how] - want).norm() / want.norm() < 1e-3, how


def test_diffusers_ring_needs_a_gpu(flux_folder: Path) -> None:
    """For the CPU diffusers names no attention that gives the log-sum-exp which the ring adds up, and says so."""
    done = torchrun.start(flux_folder, "ring")
    assert done.returncode != 0
    assert "return_lse" in done.stderr or "lse" in done.stderr.lower(), done.stderr[-3000:]
