"""tests/no_device/test_parallel.py on two GPUs of one host, over NCCL, and maps of one model over both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("diffusers")
import pipelines  # noqa: E402
import torchrun  # noqa: E402
from diffusers import DiffusionPipeline, FluxTransformer2DModel  # noqa: E402
from small_calls import CONFIG, block, calls, gathered  # noqa: E402

import pq_fx  # noqa: E402
from pq_fx.modules import quantized_linears  # noqa: E402


def loaded(folder: Path, **settings: Any) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", **settings)


def places(model: torch.nn.Module) -> set[str]:
    return {str(p.device) for m in quantized_linears(model).values() for p in m.parameters()}


@pytest.fixture(scope="module")
def want(flux_folder: Path) -> Any:
    """What the first GPU draws."""
    return pipelines.draw(pipelines.aligned(DiffusionPipeline.from_pretrained(flux_folder).to(0)))


def test_data_parallel_launch_draws_the_same_pictures(flux_folder: Path) -> None:
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(flux_folder).to("cuda"))
    got = torchrun.made(flux_folder, "data", "cuda")["made"]
    for number, prompt in enumerate(pipelines.PROMPTS):
        want = torch.from_numpy(pipelines.call(pipe, prompt, seed=number)[0])
        print(prompt, (got[number] - want).abs().max())
        assert (got[number] - want).abs().max() < 1e-3


@torch.no_grad()
def test_ulysses_is_one_process(flux_folder: Path) -> None:
    inputs = {name: value.cuda() for name, value in pipelines.flux_inputs(text=8).items()}
    want = loaded(flux_folder).to("cuda")(**inputs).sample.cpu()
    got = torchrun.made(flux_folder, "ulysses", "cuda")
    for how in ("made", "compiled"):  # compiled blocks are Inductor's here
        far = (got[how] - want).norm() / want.norm()
        print("ulysses", how, far)
        assert far < 1e-3, how


@torch.no_grad()
def test_ring_is_one_process(flux_folder: Path) -> None:
    """In bf16, the only dtype of the GPU's attention that gives a log-sum-exp (or fp16).

    The ring rounds attention to bf16 once more, and 4 bits turn some of that into steps; so its distance to fp32 is
    compared with that of one process in bf16.
    """
    inputs = {name: value.cuda() for name, value in pipelines.flux_inputs(text=8).items()}
    exact = loaded(flux_folder).to("cuda")(**inputs).sample.cpu()
    model = loaded(flux_folder, torch_dtype=torch.bfloat16).to("cuda")
    model.set_attention_backend("_native_flash")
    one = model(**{name: value.bfloat16() for name, value in inputs.items()}).sample.cpu().float()
    for how, got in torchrun.made(flux_folder, "ring", "cuda").items():
        ring = got.float()
        print("ring", how, (ring - one).norm() / one.norm(), (one - exact).norm() / exact.norm())
        assert (ring - one).norm() < 2 * (one - exact).norm(), how
        assert (ring - exact).norm() < 0.1 * exact.norm(), how


def test_statistics_of_two_gpus_equal_one_that_has_both_data(tmp_path: Path) -> None:
    torchrun.calibrate(tmp_path, "cuda")
    model, seen = block().cuda(), [x.cuda() for x in calls(5)]
    one = gathered(model, seen[:3]).statistics()
    two = gathered(model, seen[3:], seed=1 << 32).statistics()
    quantizer = pq_fx.prepare(block().cuda(), CONFIG, statistics=one.merge(two))
    quantizer.save_statistics(tmp_path / "one.safetensors")
    bits = (tmp_path / "one.safetensors").read_bytes()
    assert (tmp_path / "0.safetensors").read_bytes() == bits
    assert (tmp_path / "1.safetensors").read_bytes() == bits
    whole = gathered(model, seen).statistics()
    for name, moments in quantizer.statistics().moments.items():
        assert torch.equal(moments.count, whole.moments[name].count)
        torch.testing.assert_close(
            moments.sum_squares, whole.moments[name].sum_squares, rtol=1e-12, atol=0
        )


def test_the_second_gpu_alone(flux_folder: Path, want: Any) -> None:
    """The current device is the first all along."""
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(flux_folder).to("cuda:1"))
    assert places(pipe.transformer) == {"cuda:1"} and torch.cuda.current_device() == 0
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3


@pytest.mark.parametrize("name", ["transformer_blocks", "single_transformer_blocks"])
def test_a_map_over_both(flux_folder: Path, want: Any, name: str) -> None:
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(flux_folder).to("cuda:0"))
    parts = {n: int(n == name) for n, _ in pipe.transformer.named_children()}
    pipe.transformer = loaded(flux_folder, device_map=parts)
    assert places(pipe.transformer) == {"cuda:0", "cuda:1"}
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3


@pytest.mark.parametrize(("how", "share"), [("balanced", 2 / 3), ("sequential", 0.9)])
def test_a_map_that_accelerate_makes(flux_folder: Path, how: str, share: float) -> None:
    """With memory for a part of the model on each, as for a model that one GPU cannot hold.

    "balanced" puts the embedders on the first GPU and all blocks on the second, "sequential" parts the blocks.
    """
    inputs = {name: value.cuda() for name, value in pipelines.flux_inputs(text=8).items()}
    whole = loaded(flux_folder)
    size = sum(p.nbytes for p in whole.parameters())
    with torch.no_grad():
        want = whole.to("cuda:0")(**inputs).sample
        model = loaded(flux_folder, device_map=how, max_memory={0: int(size * share), 1: 2 * size})
        assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
        assert len(places(model)) == (1 if how == "balanced" else 2), model.hf_device_map
        assert (model(**inputs).sample.to(want.device) - want).abs().max() < 1e-3 * want.abs().max()
