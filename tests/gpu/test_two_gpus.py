"""tests/no_device/test_parallel.py on two GPUs of one host, over NCCL; ring attention too, which needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pipelines = pytest.importorskip("pipelines")
import torchrun  # noqa: E402
from diffusers import DiffusionPipeline, FluxTransformer2DModel  # noqa: E402


def test_data_parallel_launch_draws_the_same_pictures(flux_folder: Path) -> None:
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(flux_folder).to("cuda"))
    got = torchrun.made(flux_folder, "data", "cuda")
    for number, prompt in enumerate(pipelines.PROMPTS):
        want = torch.from_numpy(pipelines.call(pipe, prompt, seed=number)[0])
        assert (got[number] - want).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("how", ["ulysses", "ring"])
def test_context_parallel_is_one_process(flux_folder: Path, how: str) -> None:
    model = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer").to("cuda")
    inputs = {name: value.cuda() for name, value in pipelines.flux_inputs(text=8).items()}
    want = model(**inputs).sample.cpu()
    got = torchrun.made(flux_folder, how, "cuda")
    assert (got - want).norm() / want.norm() < 1e-3
