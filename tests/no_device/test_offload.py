"""Offload and device maps of whole pipelines, called as users call them but with the CPU as the accelerator.

diffusers takes `device="cpu"` for the device to compute on, so its hooks execute: they take tensors away and bring them
back. Nothing crosses to another device; tests/gpu/test_offload.py does that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import modeling_utils
from torch import nn

import pq_fx
from pq_fx.errors import CalibrationError, CheckpointError, ConfigError
from pq_fx.integrations import loading
from pq_fx.modules import quantized_linears

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["flux", "sana"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quantized pipeline's folder and its picture. SANA has 1x1 convolutions."""
    folder = tmp_path_factory.mktemp(request.param)
    pipelines.quantized(request.param).save_pretrained(folder)
    return folder, pipelines.draw(pipelines.aligned(DiffusionPipeline.from_pretrained(folder)))


@pytest.fixture
def pipe(saved: Any) -> Any:
    return pipelines.aligned(DiffusionPipeline.from_pretrained(saved[0]))


@pytest.fixture
def want(saved: Any) -> np.ndarray:
    return saved[1]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p for linear in quantized_linears(model).values() for p in linear.parameters()]


def test_model_cpu_offload(pipe: Any, want: np.ndarray) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert np.array_equal(pipelines.draw(pipe), want)
    pipe.remove_all_hooks()
    assert np.array_equal(pipelines.draw(pipe), want)


def test_sequential_cpu_offload(
    pipe: Any, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers says "cpu:0", and a parameter that `.to("cpu:0")` copies from "cpu" is a parameter no more.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda m, _, **kwargs: offload(m, CPU, **kwargs))
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert weights(pipe.transformer)
    for _ in range(2):
        assert all(w.is_meta for w in weights(pipe.transformer))  # each comes for its own call only
        assert np.array_equal(pipelines.draw(pipe), want)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(pipe: Any, want: np.ndarray, kind: str) -> None:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(CPU, CPU, kind, exclude_modules=["vae"], **blocks)
    if kind == "leaf_level":
        leaves = quantized_linears(pipe.transformer).values()
        assert all(hasattr(m, "_diffusers_hook") for m in leaves)
    for _ in range(2):
        assert np.array_equal(pipelines.draw(pipe), want)


def test_a_pipeline_loads_onto_a_device(saved: Any, want: np.ndarray) -> None:
    loaded = DiffusionPipeline.from_pretrained(saved[0], device_map="cpu")
    assert np.array_equal(pipelines.draw(pipelines.aligned(loaded)), want)
    loaded.to("cpu")
    assert np.array_equal(pipelines.draw(loaded), want)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}])
def test_a_model_loads_by_a_device_map(
    saved: Any, pipe: Any, want: np.ndarray, device_map: Any
) -> None:
    folder, kind = saved[0] / "transformer", type(pipe.transformer)
    pipe.transformer = kind.from_pretrained(folder, device_map=device_map)
    assert {str(d) for d in pipe.transformer.hf_device_map.values()} == {"cpu"}
    assert np.array_equal(pipelines.draw(pipelines.aligned(pipe)), want)


def test_a_map_by_parts_with_its_hooks(pipe: Any, want: np.ndarray) -> None:
    """What accelerate does where parts are on several devices: hooks that move inputs to each part's device."""
    parts = {name: "cpu" for name, _ in pipe.transformer.named_children()}
    parts |= {name: "cpu" for name in pipe.transformer._parameters}
    accelerate.dispatch_model(pipe.transformer, parts, main_device="cpu", force_hooks=True)
    assert all(hasattr(part, "_hf_hook") for part in pipe.transformer.children())
    assert np.array_equal(pipelines.draw(pipe), want)


def hooked(model: nn.Module, kind: str) -> nn.Module:
    """The model with a hook of accelerate around its forward, as offloading and device maps put one."""
    if kind == "model offload":
        accelerate.cpu_offload_with_hook(model, CPU)
    else:
        hook = accelerate.hooks.AlignDevicesHook(CPU, io_same_device=True)
        accelerate.hooks.add_hook_to_module(model, hook)
    return model


@pytest.mark.parametrize("kind", ["model offload", "device map"])
def test_calibration_behind_a_hook_sees_the_whole_model(kind: str) -> None:
    """Its graph begins and ends at a break, but embedders and the final projection are told apart all the same."""

    def converted(model: nn.Module) -> dict[str, tuple[str | None, str | None]]:
        torch.compiler.reset()
        quantizer = pq_fx.prepare(model, pipelines.CONFIG)
        with torch.no_grad(), quantizer.calibrate(progress=False):
            model(**pipelines.flux_inputs())
        return {row.fqn: (row.format, row.skip_reason) for row in quantizer.convert().layers}

    plain = converted(pipelines.make("flux").transformer)
    assert {name for name, (_, why) in plain.items() if why} >= {"x_embedder", "proj_out"}
    assert converted(hooked(pipelines.make("flux").transformer, kind)) == plain


@pytest.mark.parametrize("kind", ["model offload", "device map"])
def test_first_calls_behind_a_hook_are_refused(kind: str) -> None:
    model = hooked(pipelines.make("flux").transformer, kind)
    options = {"format": "int4", "group_size": 16, "calibration_steps": 1}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="permuquant", options=options)
    with torch.no_grad(), pytest.raises(Exception, match="take the hooks off") as raised:
        compiled(**pipelines.flux_inputs())
    assert isinstance(getattr(raised.value, "inner_exception", raised.value), ConfigError)
    assert not quantized_linears(model)


PARTS = {
    "group offload by blocks": lambda m: m.enable_group_offload(
        CPU, CPU, "block_level", num_blocks_per_group=1
    ),
    "group offload by leaves": lambda m: m.enable_group_offload(CPU, CPU, "leaf_level"),
    "sequential offload": lambda m: accelerate.cpu_offload(m, CPU),
    "device map": lambda m: accelerate.dispatch_model(
        m,
        {n: "cpu" for n, _ in [*m.named_children(), *m.named_parameters(recurse=False)]},
        main_device="cpu",
        force_hooks=True,
    ),
    "casting": lambda m: m.enable_layerwise_casting(torch.float32, torch.float32),
}


@pytest.mark.parametrize("kind", PARTS)
def test_hooks_around_parts_are_refused_while_quantizing(kind: str) -> None:
    """The graph would break inside: embedders in 4 bits, linears that no graph shows (tried; 6 to 48 layers differ)."""
    model = pipelines.make("flux").transformer
    quantizer = pq_fx.prepare(model, pipelines.CONFIG)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        model(**pipelines.flux_inputs())
    PARTS[kind](model)
    modules = dict(model.named_modules())
    with pytest.raises(CalibrationError, match="offload afterwards"):
        quantizer.convert()
    with (
        pytest.raises(CalibrationError, match=r"wrap \d+ parts of Flux.*offload afterwards"),
        pq_fx.prepare(model, pipelines.CONFIG).calibrate(progress=False),
    ):
        raise AssertionError("not reached")
    options = {"format": "int4", "group_size": 16, "calibration_steps": 1}
    torch.compiler.reset()
    with torch.no_grad(), pytest.raises(Exception, match="hook.* wrap") as raised:
        torch.compile(model, backend="permuquant", options=options)(**pipelines.flux_inputs())
    error = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(error, (CalibrationError, ConfigError))
    assert dict(model.named_modules()) == modules and not quantized_linears(model)
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("kind", ["model offload", "device map"])
def test_a_model_behind_a_hook_is_not_taken_for_another_whose_first_calls_go_on(kind: str) -> None:
    options = {"format": "int4", "group_size": 16, "calibration_steps": 5}
    other = pipelines.make("flux").transformer
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(other, backend="permuquant", options=options)(**pipelines.flux_inputs())
    model = hooked(pipelines.make("flux").transformer, kind)
    compiled = torch.compile(model, backend="permuquant", options=options)
    with torch.no_grad(), pytest.raises(Exception, match="take the hooks off"):
        compiled(**pipelines.flux_inputs())
    assert not quantized_linears(model)
    assert not quantized_linears(other)


def test_a_quantized_model_in_parts_compiles() -> None:
    """Hooks on each part: graphs behind them hold linears that were left in 16 bits, and are no float models."""
    model = pipelines.quantized("flux").transformer
    with torch.no_grad():
        want = model(**pipelines.flux_inputs())[0]
        parts = {name: "cpu" for name, _ in model.named_children()}
        parts |= {name: "cpu" for name in model._parameters}
        accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)
        torch.compiler.reset()
        got = torch.compile(model, backend="permuquant")(**pipelines.flux_inputs())[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_map_over_a_gpu_and_the_cpu_loads(
    saved: Any, pipe: Any, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate takes the CPU's parts away, to bring them for each call, before the quantizer may finish."""
    dispatch = modeling_utils.dispatch_model
    folder, kind = saved[0] / "transformer", type(pipe.transformer)
    monkeypatch.setattr(
        modeling_utils,
        "dispatch_model",
        lambda model, **_: accelerate.cpu_offload(dispatch(model, {"": "cpu"}), CPU),
    )
    parts = {name: "cpu" for name, _ in pipe.transformer.named_children()}
    parts |= {name: "cpu" for name in pipe.transformer._parameters}
    pipe.transformer = kind.from_pretrained(folder, device_map=parts)
    assert all(w.is_meta for w in weights(pipe.transformer))
    assert np.array_equal(pipelines.draw(pipe), want)


def test_hooks_over_tensors_that_were_not_filled_hide_nothing(saved: Any, pipe: Any) -> None:
    model = pipe.transformer
    linear = next(iter(quantized_linears(model).values()))
    linear.weight_scale = nn.Parameter(linear.weight_scale.to("meta"), requires_grad=False)
    accelerate.cpu_offload(model, CPU, state_dict=model.state_dict())
    with pytest.raises(CheckpointError, match="did not fill .*weight_scale$"):
        loading.finish(model, {}, {}, None)


def test_a_map_that_ends_on_the_disk_is_refused(saved: Any, pipe: Any, tmp_path: Path) -> None:
    """ "auto" says so only once the sizes are known."""
    folder, kind = saved[0] / "transformer", type(pipe.transformer)
    with pytest.raises(CheckpointError, match="disk.*casts.*enable_group_offload"):
        kind.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": 30_000}, offload_folder=tmp_path
        )


def test_a_map_counts_packed_bytes(pipe: Any) -> None:
    """`device_map="auto"` places parts by these sizes: of packed weights, not of the model's dtype."""
    model = pipe.transformer
    stored = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert accelerate.utils.compute_module_sizes(model)[""] == stored
