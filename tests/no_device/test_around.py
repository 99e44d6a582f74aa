"""What people do around a quantized diffusers model: offload it, compile it by blocks, put a LoRA on it.

The machine has no accelerator, so offload hooks execute on the CPU: they take tensors away (to the meta device or the
disk) and bring them back, but nothing crosses to another device.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import accelerate
import diffusers
import peft
import pipelines
import pytest
import torch
from pipelines import CONFIG, flux_inputs
from torch import Tensor, nn

import pq_fx
from pq_fx import applied
from pq_fx.errors import CheckpointError, ConfigError, LoraError
from pq_fx.modules import quantized_linears
from pq_fx.pointwise import PointwiseConv


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def original(request: pytest.FixtureRequest) -> nn.Module:
    config = CONFIG
    if request.param == "nvfp4":  # its input quantizers have global scales
        config = pq_fx.QuantConfig("nvfp4", weight_only_format="int4:16:bf16", calibration_rows=64)
    return pipelines.quantized("flux", config).transformer


@pytest.fixture(scope="module")
def int4() -> nn.Module:
    """Sorted without rotation: most of its regions fold."""
    return pipelines.quantized("flux", replace(CONFIG, method="permuquant")).transformer


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    return copy.deepcopy(original)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(**flux_inputs()).sample


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p for linear in quantized_linears(model).values() for p in linear.parameters()]


# Offload ------------------------------------------------------------------------------------------


def test_sequential_offload(model: nn.Module, original: nn.Module) -> None:
    """As `enable_sequential_cpu_offload` calls it: buffers are not offloaded, parameters are."""
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=False)
    assert all(p.is_meta for p in parameters_of(model))  # nothing stays on the device
    for _ in range(2):
        assert torch.equal(run(model), run(original))
        assert all(p.is_meta for p in parameters_of(model))
    with pytest.raises(CheckpointError, match="meta device"):
        pq_fx.save(model, Path("nowhere"))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), run(original))


def test_model_offload(model: nn.Module, original: nn.Module) -> None:
    _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    assert torch.equal(run(model), run(original))
    hook.offload()
    assert torch.equal(run(model), run(original))


def test_group_offload_by_blocks_to_disk(
    model: nn.Module, original: nn.Module, tmp_path: Path
) -> None:
    cpu, want = torch.device("cpu"), run(original)
    model.enable_group_offload(
        onload_device=cpu,
        offload_device=cpu,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    assert len(list(tmp_path.glob("group_*.safetensors"))) == 2 + 2 + 1
    for _ in range(2):
        for p in parameters_of(model):  # what offloading left behind is not read
            p.data.zero_()
        assert (run(model) - want).abs().max() < 1e-5  # mapped tensors are not aligned as others


@pytest.mark.parametrize("disk", [False, True])
def test_group_offload_by_leaves(
    model: nn.Module, original: nn.Module, tmp_path: Path, disk: bool
) -> None:
    cpu, want = torch.device("cpu"), run(original)
    path = str(tmp_path) if disk else None
    model.enable_group_offload(cpu, cpu, "leaf_level", offload_to_disk_path=path)
    assert all(hasattr(m, "_diffusers_hook") for m in quantized_linears(model).values())
    for _ in range(2):
        if disk:
            for p in parameters_of(model):  # what offloading left behind is not read
                p.data.zero_()
        assert (run(model) - want).abs().max() < 1e-5


# Compiling by blocks ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_codegen")  # test_quantizer.py compiles whole ones
@pytest.mark.parametrize("family", ["flux", "sana"])
def test_blocks_of_any_class_compile(family: str) -> None:
    pipe = pipelines.quantized(family)
    want = pipelines.draw(pipe)
    if family == "sana":
        assert not diffusers.SanaTransformer2DModel._repeated_blocks
        with pytest.raises(ValueError, match="_repeated_blocks"):
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="permuquant")
    compiled = pq_fx.compile_blocks(pipe.transformer, fullgraph=True)
    blocks = [m for m in compiled.modules() if m._compiled_call_impl is not None]
    assert len(blocks) == {"flux": 4, "sana": 2}[family]
    assert abs(pipelines.draw(pipe) - want).max() < 1e-3


def test_a_model_without_blocks_is_named() -> None:
    with pytest.raises(ConfigError, match="Linear has no nn.ModuleList.*torch.compile"):
        pq_fx.compile_blocks(nn.Linear(3, 3))


# LoRA ---------------------------------------------------------------------------------------------

TARGETS = [
    *(f"transformer_blocks.{i}.attn.{n}" for i in (0, 1) for n in ("to_q", "to_v", "to_out.0")),
    *(f"transformer_blocks.{i}.{n}.net.2" for i in (0, 1) for n in ("ff", "ff_context")),
    "transformer_blocks.1.ff.net.0.proj",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.1.proj_out",
    "x_embedder",
]
SMOOTHED = [f"transformer_blocks.{i}.attn2.to_{x}" for i in range(2) for x in "kv"]


def lora(model: nn.Module, targets: list[str], rank: int = 3) -> dict[str, Tensor]:
    """A random adapter as files of FLUX LoRAs hold it, large enough to matter."""
    generator = torch.Generator().manual_seed(11)
    state = {}
    for name in targets:
        base = model.get_submodule(name)
        a = torch.randn(rank, base.in_features, generator=generator)
        b = torch.randn(base.out_features, rank, generator=generator)
        state[f"transformer.{name}.lora_A.weight"] = a / base.in_features**0.5
        state[f"transformer.{name}.lora_B.weight"] = b / rank**0.5
    return state


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_a_lora_is_a_side_branch_in_the_folded_order(int4: nn.Module) -> None:
    """Compared with the same adapter on the float model: as near as without an adapter."""
    float_pipe, pipe = pipelines.make("flux"), pipelines.make("flux")
    pipe.transformer = copy.deepcopy(int4)
    state = lora(float_pipe.transformer, TARGETS)
    plain, quantized_plain = run(float_pipe.transformer), run(pipe.transformer)
    float_pipe.load_lora_weights(dict(state))
    pipe.load_lora_weights(dict(state), adapter_name="style")
    want, got = run(float_pipe.transformer), run(pipe.transformer)
    assert relative(want, plain) > 0.3  # the adapter matters
    noise = relative(quantized_plain, plain)
    assert relative(got, want) < 2 * noise
    layers = [pipe.transformer.get_submodule(name) for name in TARGETS[:-1]]
    edits = applied.of_model(pipe.transformer)
    assert all(m.lora_A["style"].weight.dtype == pipe.transformer.dtype for m in layers)
    assert sum((f"{name}.weight", 0) in edits for name in TARGETS) > 2
    assert sum((f"{name}.weight", 1) in edits for name in TARGETS) > 2
    unordered = copy.deepcopy(int4)  # in the order of the file it does not fit
    applied.forget(unordered)
    unordered.load_lora_adapter(dict(state))
    assert relative(run(unordered), want) > 1.5 * relative(got, want)
    pipe.transformer.set_adapters(["style"], [0.0])
    assert relative(run(pipe.transformer), quantized_plain) < 1e-6
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*unload_lora_weights"):
        pipe.transformer.save_pretrained("nowhere")
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe.transformer), quantized_plain)
    assert not [n for n in quantized_linears(pipe.transformer) if "base_layer" in n]


@pytest.mark.parametrize(
    ("family", "method"),
    [("flux", "permuquant"), ("sana", "smoothquant"), ("flux", "svdquant"), ("flux", "best")],
)
def test_a_lora_of_each_layer_is_exact(family: str, method: str) -> None:
    """What the adapter adds is B A x, in the float model's order and scale.

    FLUX has no norm where a SmoothQuant scale commutes, SANA has that of its captions; FLUX's modulation takes over
    scales and means. Both need quantized activations, which the adapter's branch does not see.
    """
    smooth = method == "smoothquant"
    quantized = "same" if method in ("smoothquant", "best") else None
    config = replace(CONFIG, method=method, activation_format=quantized)
    pipe = pipelines.make(family)
    targets = SMOOTHED if smooth else TARGETS
    quantizer = pq_fx.prepare(pipe.transformer, config)
    with quantizer.calibrate():
        pipelines.call(pipe)
    quantizer.convert()
    model = pipe.transformer
    state, edits = lora(pipelines.make(family).transformer, targets), applied.of_model(model)
    plain = copy.deepcopy(model)
    model.load_lora_adapter(dict(state))
    seen = centered = 0
    for name in targets:
        a, b = (state[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        x = torch.randn(5, a.shape[1])  # as the float model computes it
        columns, rows = edits.get((f"{name}.weight", 1)), edits.get((f"{name}.weight", 0))
        given = x if columns is None or columns.center is None else x - columns.center
        given = given if columns is None or columns.factor is None else given / columns.factor
        if columns is not None and columns.order is not None:
            given = given[:, columns.order]
        want = x @ a.T @ b.T
        if rows is not None:
            want = want * (1.0 if rows.factor is None else rows.factor)
            want = want if rows.order is None else want[:, rows.order]
        got = model.get_submodule(name)(given) - plain.get_submodule(name)(given)
        assert relative(got, want) < 1e-4, name
        seen += columns is not None or rows is not None
        centered += columns is not None and columns.center is not None
    assert seen > 2 or method == "svdquant"
    assert (centered > 2) == (method == "best")


@pytest.mark.usefixtures("no_codegen")
def test_a_lora_compiles(int4: nn.Module) -> None:
    model = copy.deepcopy(int4)
    model.load_lora_adapter(lora(model, TARGETS))
    want = run(model)
    pq_fx.compile_blocks(model, fullgraph=True)
    assert relative(run(model), want) < 1e-3


def test_what_a_lora_cannot_do_is_named(int4: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(int4)
    with pytest.raises(LoraError, match=r"fused into packed weights.*side branch.*fuse_lora"):
        model.fuse_lora()
    with pytest.raises(LoraError, match="hotswapped"):
        model.load_lora_adapter({}, hotswap=True)
    name = TARGETS[0]
    state = lora(model, [name])
    state[f"transformer.{name}.lora_magnitude_vector"] = torch.ones(32)
    with pytest.raises(LoraError, match="DoRA"):
        model.load_lora_adapter(state)
    assert not getattr(model, "peft_config", {})
    assert set(quantized_linears(model)) == set(quantized_linears(int4))
    with pytest.raises(ValueError, match="(?s)QuantLinear.* is not supported"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), copy.deepcopy(int4))


def test_fuse_then_quantize() -> None:
    pipe = pipelines.make("flux")
    pipe.load_lora_weights(lora(pipe.transformer, TARGETS))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    want = run(pipe.transformer)
    assert relative(run(pipelines.make("flux").transformer), want) > 0.3
    quantizer = pq_fx.prepare(pipe.transformer, CONFIG)
    with quantizer.calibrate():
        pipelines.call(pipe)
    quantizer.convert()
    assert 0 < relative(run(pipe.transformer), want) < 0.3


@pytest.mark.parametrize(
    ("family", "method"), [("flux", "permuquant-h"), ("sana", "smoothquant"), ("flux", "best")]
)
def test_dequantize_undoes_folds_and_smoothing(family: str, method: str, tmp_path: Path) -> None:
    """Every tensor of the float model comes back, but for rounding, also after saving and loading."""
    float_model = pipelines.make(family).transformer
    parts = {"correct_bias": False}  # that is no edit of an axis: it belongs to the rounding
    config = replace(CONFIG, method=method, parts=parts)
    model = pipelines.quantized(family, config).transformer
    changed = {name for name, _ in applied.of_model(model)}
    assert len(changed) > 4
    model.save_pretrained(tmp_path)
    loaded = type(float_model).from_pretrained(tmp_path)
    names = set(quantized_linears(model))
    names |= {n for n, m in model.named_modules() if isinstance(m, PointwiseConv)}
    for one in (model, loaded):
        assert {axis: edit_bytes(e) for axis, e in applied.of_model(one).items()} == {
            axis: edit_bytes(e) for axis, e in applied.of_model(model).items()
        }
    for one in (loaded, model):
        one.dequantize()
        assert not applied.of_model(one)
        for name, want in float_model.state_dict().items():
            got = one.state_dict()[name]
            packed = name.removesuffix(".weight") in names
            assert relative(got, want) < (0.25 if packed else 1e-5), name


def edit_bytes(edit: applied.AxisEdit) -> list[bytes | None]:
    values = (edit.factor, edit.order, edit.offset, edit.center)
    return [None if v is None else v.numpy().tobytes() for v in values]
