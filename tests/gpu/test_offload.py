"""What tests/no_device/test_offload.py cannot show: tensors that cross between the CPU and a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("diffusers")
import pipelines  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

from pq_fx.modules import quantized_linears  # noqa: E402


@pytest.fixture
def pipe(flux_folder: Path) -> Any:
    loaded = DiffusionPipeline.from_pretrained(flux_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def want(flux_folder: Path) -> Any:
    loaded = DiffusionPipeline.from_pretrained(flux_folder).to("cuda")
    return pipelines.draw(loaded)


def places(model: torch.nn.Module) -> set[str]:
    return {p.device.type for m in quantized_linears(model).values() for p in m.parameters()}


def test_model_cpu_offload(pipe: Any, want: Any) -> None:
    pipe.enable_model_cpu_offload()
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3
    assert places(pipe.transformer) == {"cpu"}


def test_sequential_cpu_offload(pipe: Any, want: Any) -> None:
    pipe.enable_sequential_cpu_offload()
    assert places(pipe.transformer) == {"meta"}
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(pipe: Any, want: Any, kind: str, stream: bool) -> None:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    pipe.enable_group_offload(cuda, cpu, kind, use_stream=stream, **blocks)
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3
    assert "cpu" in places(pipe.transformer)


@pytest.mark.parametrize("name", ["single_transformer_blocks", "transformer_blocks"])
def test_a_device_map_over_two_devices(flux_folder: Path, pipe: Any, want: Any, name: str) -> None:
    kind = type(pipe.transformer)
    parts = {n: "cpu" if n == name else 0 for n, _ in pipe.transformer.named_children()}
    pipe.to("cuda")
    pipe.transformer = kind.from_pretrained(flux_folder, subfolder="transformer", device_map=parts)
    assert "cuda" in places(pipe.transformer)
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3


def test_a_pipeline_loads_onto_the_gpu(flux_folder: Path, want: Any) -> None:
    loaded = DiffusionPipeline.from_pretrained(flux_folder, device_map="cuda")
    assert places(loaded.transformer) == {"cuda"}
    assert abs(pipelines.draw(loaded) - want).max() < 1e-3
