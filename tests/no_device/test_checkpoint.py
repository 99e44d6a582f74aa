"""Saving and loading: equal bytes, equal outputs, and refusal of everything damaged."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pq_fx import applied, checkpoint, checkpoint_config, checkpoint_model, storage
from pq_fx.checkpoint import load, save
from pq_fx.config import QuantConfig
from pq_fx.errors import CheckpointError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import permute_rotate, quantize
from pq_fx.modules import ActivationQuantizer, QuantLinear
from pq_fx.report import LayerReport, Report

WIDTH, INNER = 64, 192
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Toy(nn.Module):
    """q and k share an input quantizer; `first` stays in float; `head` has weights only."""

    def __init__(self, inner: int = INNER, tied: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(24, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, inner)
        self.k = nn.Linear(WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, WIDTH)
        self.head = nn.Linear(WIDTH, 40)
        self.again = self.first if tied else nn.Linear(24, WIDTH)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        y = self.norm(self.first(x) + self.again(x))
        return self.head(y + self.down(self.q(y) * self.k(y)))


def quantized_linear(linear, weight_format, quantizer=None):
    fmt = Format.parse(weight_format)
    weight = linear.weight.detach().float()
    if quantizer is not None:
        weight = permute_rotate(weight, quantizer.perm, quantizer.rotation)
    whole = weight.abs().amax() / (448 * 6) if fmt.two_level else None
    q = quantize(weight, fmt, global_scale=whole)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return QuantLinear(
        linear.in_features,
        linear.out_features,
        fmt.key,
        pack(q.codes, fmt),
        q.scale.contiguous(),
        q.global_scale,
        bias,
        quantizer,
    )


def quantized_toy(weight="int4:64:bf16", activation="int4:64:bf16", seed=0):
    torch.manual_seed(seed)
    model = Toy().eval().requires_grad_(False)
    whole = torch.tensor(0.02) if Format.parse(activation).two_level else None
    perm = torch.randperm(WIDTH).int()
    shared = ActivationQuantizer(WIDTH, activation, 16, perm, whole)
    model.q = quantized_linear(model.q, weight, shared)
    model.k = quantized_linear(model.k, weight, shared)
    alone = ActivationQuantizer(INNER, activation, 0, None, whole)
    model.down = quantized_linear(model.down, weight, alone)
    model.head = quantized_linear(model.head, "int4:32:pow2")
    return model.eval()


def report() -> Report:
    return Report((LayerReport("q", WIDTH, INNER),), QuantConfig("int4"), weight_bytes=1)


@pytest.fixture
def saved(tmp_path) -> tuple[nn.Module, Path]:
    model = quantized_toy()
    save(model, tmp_path / "m", report())
    return model, tmp_path / "m"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("int4:64:bf16", "int4:64:bf16"),
        ("int3:16:pow2", "int4:32:pow2"),
        ("nvfp4:16:e4m3", "nvfp4:16:e4m3"),
        ("mxfp4:32:e8m0", "mxfp4:32:e8m0"),
        ("int4:64:bf16", "fp8:0:fp32"),
        ("int8:0:fp32", "int8:64:fp32"),
    ],
)
def test_a_loaded_model_gives_the_same_numbers(tmp_path, weight, activation):
    model = quantized_toy(weight, activation)
    save(model, tmp_path / "m")
    torch.manual_seed(99)
    loaded = load(tmp_path / "m", Toy())
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), model(x))
    assert loaded.q.input_quantizer is loaded.k.input_quantizer
    assert loaded.q.input_quantizer is not loaded.down.input_quantizer
    assert loaded.first is loaded.again
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(loaded.state_dict()[name], value), name
    # Saving what was loaded gives the very same files.
    save(loaded, tmp_path / "again")
    assert contents(tmp_path / "m") == contents(tmp_path / "again")


def test_the_model_may_be_on_meta_and_in_another_dtype(saved):
    model, folder = saved
    x = torch.randn(5, 24)
    with torch.device("meta"):
        empty = Toy()
    assert torch.equal(load(folder, empty)(x), model(x))
    assert not any(p.is_meta for p in empty.parameters())
    assert torch.equal(load(folder, Toy().half())(x), model(x))


def test_values_of_the_float_model_do_not_matter_but_its_grad_flags_stay(saved):
    _, folder = saved
    loaded = load(folder, Toy())
    assert loaded.first.weight.requires_grad
    assert not loaded.training
    assert not load(folder, Toy().requires_grad_(False)).first.weight.requires_grad


def test_loading_into_a_quantized_model_replaces_it(saved):
    model, folder = saved
    other = quantized_toy(seed=5)
    x = torch.randn(2, 24)
    assert not torch.equal(other(x), model(x))
    assert torch.equal(load(folder, other)(x), model(x))


def test_a_compiled_wrapper_is_looked_through(saved, tmp_path):
    model, folder = saved
    save(torch.compile(model, backend="eager"), tmp_path / "c", report())
    assert contents(tmp_path / "c") == contents(folder)


def test_equal_models_give_equal_bytes(saved, tmp_path):
    _, folder = saved
    save(quantized_toy(), tmp_path / "b", report())
    assert contents(tmp_path / "b") == contents(folder)
    save(quantized_toy(seed=1), tmp_path / "c", report())
    assert contents(tmp_path / "c") != contents(folder)


def test_shared_tensors_are_stored_once(saved):
    _, folder = saved
    raw = (folder / WEIGHTS).read_bytes()
    names = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert "k.input_quantizer.perm" in names or "q.input_quantizer.perm" in names
    assert len([name for name in names if name.endswith("perm")]) == 1
    assert not [name for name in names if name.startswith("again.")]


def test_large_weights_are_split_with_an_index(saved, tmp_path):
    model, folder = saved
    save(model, tmp_path / "s", report(), max_shard_size="10KB")
    files = contents(tmp_path / "s")
    shards = [n for n in files if n.endswith(".safetensors")]
    assert len(shards) == 4
    assert sorted(shards)[0] == "diffusion_pytorch_model-00001-of-00004.safetensors"
    index = json.loads(files[WEIGHTS + ".index.json"])
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in checkpoint_model.stored_tensors(model).values()
    )
    x = torch.randn(2, 24)
    assert torch.equal(load(tmp_path / "s", Toy())(x), model(x))
    (tmp_path / "s" / shards[1]).unlink()
    refused(tmp_path / "s", "of-00004.safetensors cannot be read")
    save(model, tmp_path / "s", report())  # shards of the old checkpoint are gone
    assert contents(tmp_path / "s") == contents(folder)


@pytest.mark.parametrize("size", [0, -1, True, "", "10", "ten GB", "0GB", None])
def test_shard_sizes_that_are_none(saved, tmp_path, size):
    with pytest.raises(CheckpointError, match="max_shard_size is .*; expected"):
        save(saved[0], tmp_path / "s", max_shard_size=size)
    assert not (tmp_path / "s").exists()


def test_one_module_under_two_names(tmp_path):
    class Shared(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.q_again = self.q

    model = Shared().eval()
    model.q = model.q_again = quantized_linear(model.q, "int4:64:bf16")
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", Shared())
    x = torch.randn(2, 24)
    assert loaded.q is loaded.q_again
    assert torch.equal(loaded(x), model(x))


def test_a_weight_that_was_tied_in_the_float_model(tmp_path):
    """Quantizing one of two linears that shared a weight ends the sharing."""

    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.k.weight = self.q.weight

    model = Tied().eval()
    model.q = quantized_linear(model.q, "int4:64:bf16")
    save(model, tmp_path / "m")
    x = torch.randn(2, 24)
    assert torch.equal(load(tmp_path / "m", Tied())(x), model(x))


def test_views_and_transposed_tensors_are_stored_whole(tmp_path):
    model = quantized_toy()
    model.first.weight = nn.Parameter(torch.randn(24, WIDTH).t(), requires_grad=False)
    big = torch.randn(4, WIDTH)
    model.norm.weight = nn.Parameter(big[1], requires_grad=False)
    model.norm.bias = nn.Parameter(big[2], requires_grad=False)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", Toy()).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "m" / WEIGHTS).stat().st_size < 40_000


def test_settings_and_report_come_back(saved):
    _, folder = saved
    assert checkpoint.saved_config(folder) == QuantConfig("int4")
    loaded = load(folder, Toy())
    assert Report.of_model(loaded) == report()


def test_the_report_that_conversion_left_is_saved(tmp_path):
    model = quantized_toy()
    report().attach(model)
    save(model, tmp_path / "m")
    assert Report.of_model(load(tmp_path / "m", Toy())) == report()


def test_a_diffusers_model_keeps_its_own_config(tmp_path):
    from diffusers import FluxTransformer2DModel

    settings = {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    model = FluxTransformer2DModel(**settings).eval()
    attention = model.transformer_blocks[0].attn
    attention.to_q = quantized_linear(attention.to_q, "int4:64:bf16")
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert config["num_attention_heads"] == 4
    assert config["quantization_config"]["quant_method"] == "permuquant"
    assert "_name_or_path" not in config
    with torch.device("meta"):
        empty = FluxTransformer2DModel(**settings)
    load(tmp_path / "m", empty)
    for name, value in model.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value), name


def test_the_record_of_folds_comes_back(tmp_path):
    model = quantized_toy()
    order, factor = torch.randperm(WIDTH).int(), torch.rand(INNER) + 0.5
    record = {
        ("first.weight", 0): applied.AxisEdit(None, order),
        ("down.weight", 1): applied.AxisEdit(factor, None),
    }
    applied.note(model, record)
    save(model, tmp_path / "m")
    loaded = applied.of_model(load(tmp_path / "m", Toy()))
    assert loaded.keys() == record.keys()
    assert torch.equal(loaded["first.weight", 0].order, order)
    assert torch.equal(loaded["down.weight", 1].factor, factor)
    value = torch.randn(WIDTH, 3)
    edit = applied.AxisEdit(torch.rand(WIDTH) + 0.5, order)
    assert torch.allclose(edit.undo(edit.apply(value, 0), 0), value)
    assert torch.equal(applied.AxisEdit(None, order).apply(value, 0), value[order.long()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order.0.first.weight", torch.zeros(WIDTH, dtype=torch.int32)),
        ("order.0.first.weight", torch.arange(WIDTH)),
        ("factor.0.first.weight", torch.full((WIDTH,), float("nan"))),
        ("factor.0.first.weight", torch.zeros(WIDTH)),
        ("factor.x.first.weight", torch.ones(WIDTH)),
        ("offset.0.first.bias", torch.full((WIDTH,), float("inf"))),
        ("rotation.0.first.weight", torch.ones(WIDTH)),
        ("factor.0", torch.ones(WIDTH)),
        ("factor.\u00b2.first.weight", torch.ones(WIDTH)),  # a digit to str.isdigit, not to int
    ],
)
def test_a_damaged_record(saved, name, value):
    _, folder = saved
    edit_tensors(folder, lambda tensors: tensors.update({applied.PREFIX + name: value}))
    refused(folder, "no edit of an axis")


@pytest.mark.parametrize("name", ["0.nowhere.weight", "2.first.weight", "1.first.weight"])
def test_a_record_of_another_model(saved, name):
    _, folder = saved
    edit_tensors(folder, lambda t: t.update({f"{applied.PREFIX}factor.{name}": torch.ones(WIDTH)}))
    refused(folder, "record of folds has 64 channels on axis")


def test_settings_of_the_older_version_have_no_checksum(saved):
    model, folder = saved
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 2
    del config["quantization_config"]["sha256"]
    file.write_text(json.dumps(config))
    x = torch.randn(2, 24)
    assert torch.equal(load(folder, Toy())(x), model(x))


# What must be refused, with the model untouched ---------------------------------------------------


def refused(folder: Path, says: str, model: nn.Module | None = None) -> None:
    model = Toy() if model is None else model
    before = copy.deepcopy(model.state_dict())
    modules = [(name, id(module)) for name, module in model.named_modules()]
    training = model.training
    with pytest.raises(CheckpointError, match=says):
        load(folder, model)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert model.training == training
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def edit_config(folder: Path, change) -> None:
    """Change the settings and their checksum with them: what is left are the checks of content."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    config["quantization_config"]["sha256"] = checkpoint_config.checksum(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    """Change tensors in the file and the recorded checksums with them."""
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    recorded = {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    edit_config(folder, lambda config: config["weights"].update({WEIGHTS: recorded}))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_cut_off_file(saved, keep):
    _, folder = saved
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "cut off or changed")
    # Even where the recorded size and checksum say otherwise.
    recorded = {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    edit_config(folder, lambda config: config["weights"].update({WEIGHTS: recorded}))
    refused(folder, "cannot be read")


def test_a_flipped_bit(saved):
    _, folder = saved
    file = folder / WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 4
    file.write_bytes(raw)
    refused(folder, "checksum")


def test_missing_files(saved, tmp_path):
    _, folder = saved
    refused(tmp_path / "nowhere", "holds no config.json")
    (folder / WEIGHTS).unlink()
    refused(folder, "cannot be read")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format_version=4), "version 4; this release reads 2 and 3. Upgrade"),
        (lambda c: c.update(format_version=2), "checksum does not belong to that version"),
        (lambda c: c.update(format_version=True), "format_version True"),
        (lambda c: c.update(format_version=1), "Version 1 was never released: quantize"),
        (lambda c: c.update(format_version=None), "format_version None"),
        (lambda c: c.update(quant_method="bitsandbytes"), "bitsandbytes"),
        (lambda c: c.pop("layers"), "no table 'layers'"),
        (lambda c: c.update(layers={}), "lists no layers"),
        (lambda c: c["layers"]["q"].pop("bias"), r"layers\['q'\].*expected.*bias"),
        (lambda c: c["layers"].update(q=5), r"layers\['q'\] in config.json has 5; expected the"),
        (lambda c: c["layers"]["q"].update(bias=1), "bias is 1; expected bool"),
        (lambda c: c.update(tied=["a"]), "expected a table of names"),
        (lambda c: c["layers"]["q"].update(in_features=True), "in_features is True"),
        (lambda c: c["layers"]["q"].update(weight_format="int5:64:bf16"), "q: unknown format"),
        (lambda c: c["layers"]["q"].update(in_features=100), "not a multiple"),
        (lambda c: c["layers"]["q"].update(out_features=100), "64 x 100 in the checkpoint"),
        (lambda c: c["layers"]["q"].update(input_quantizer="z"), "no input quantizer 'z'"),
        (lambda c: c["layers"]["q"].update(input_quantizer="down.input_quantizer"), "192"),
        (lambda c: c["layers"]["down"].update(input_quantizer=None), "of no layer"),
        (lambda c: c["layers"].update(z=c["layers"]["q"]), "'z'; Toy has none"),
        (lambda c: c["layers"].update(norm=c["layers"]["q"]), "norm is LayerNorm"),
        (lambda c: c["layers"].pop("head"), "lacks tensors.*|unknown to the model"),
        (lambda c: c["input_quantizers"]["q.input_quantizer"].update(rotation=24), "rotation 24"),
        (lambda c: c["input_quantizers"]["q.input_quantizer"].update(perm=False), "unknown to"),
        (lambda c: c.pop("weights"), "does not describe"),
        (lambda c: c.update(weights={}), "does not describe"),
        (lambda c: c["weights"].update({"../../x": {}}), "does not describe"),
        (lambda c: c["weights"].update({WEIGHTS: None}), "does not describe"),
        (lambda c: c["weights"][WEIGHTS].pop("sha256"), "checksum"),
    ],
)
def test_a_config_that_lies(saved, change, says):
    _, folder = saved
    edit_config(folder, change)
    refused(folder, says)


def test_a_config_that_is_no_json(saved):
    _, folder = saved
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refused(folder, "quant_method None")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}']
)
def test_a_damaged_report(saved, text):
    _, folder = saved
    file = folder / "quantization_report.json"
    whole = file.read_text()
    file.write_text(whole.replace('"weight_bytes": 1', '"weight_bytes": 2'))
    refused(folder, "quantization_report.json does not have the checksum")
    file.write_text(text)
    refused(folder, "quantization_report.json cannot be read")
    plain = json.loads(whole)
    del plain["sha256"]  # as older releases wrote it
    file.write_text(json.dumps(plain))
    assert Report.of_model(load(folder, Toy())) == report()


def test_a_changed_setting(saved):
    """Each of these is a whole number or name that would load, and give other numbers."""
    _, folder = saved
    file = folder / "config.json"
    text = file.read_text()
    for old, new in (
        ('"rotation": 16', '"rotation": 32'),
        ('"_class_name": "Toy"', '"_class_name": "Top"'),
        ('"format": "int4:64:bf16"', '"format": "int4:32:bf16"'),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        refused(folder, "does not have the checksum that it names")
    file.write_text(json.dumps(json.loads(text) | {"_diffusers_version": "9.9"}))
    load(folder, Toy())  # bookkeeping, and the layout of the text, may change


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file(saved):
    """Opening a FIFO would wait for ever."""
    _, folder = saved
    for name in ("quantization_report.json", "config.json", WEIGHTS):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        if name == WEIGHTS:
            edit_config(folder, lambda config: config["weights"][WEIGHTS].update(bytes=0))
        refused(folder, "cannot be read: it is not a regular file")
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


def set_item(name, index, value):
    def change(tensors):
        tensors[name].view(-1)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_item("q.input_quantizer.perm", 3, 1_000), "q.input_quantizer.perm is no permutation"),
        (set_item("q.input_quantizer.perm", 3, -1), "no permutation"),
        (lambda t: t["q.input_quantizer.perm"].copy_(torch.zeros(WIDTH)), "no permutation"),
        (set_item("q.weight_scale", 3, float("nan")), "q.weight_scale .*not finite"),
        (set_item("down.weight_scale", 0, float("-inf")), "not finite"),
        (set_item("down.weight_scale", 0, 0.0), "not above 0"),
        (set_item("q.weight_scale", 7, -0.5), "not above 0"),
        (lambda t: t.pop("norm.weight"), "lacks tensors of the model: norm.weight"),
        (lambda t: t.pop("q.bias"), "lacks.*q.bias"),
        (lambda t: t.update(odd=torch.zeros(1)), "unknown to the model: odd"),
        (lambda t: t.update({"q.weight": t["q.weight"][:-1]}), r"q.weight is uint8 \[191, 32\]"),
        (lambda t: t.update({"q.weight": t["q.weight"].int()}), "expected uint8"),
        (lambda t: t.update({"q.bias": t["q.bias"].int()}), "expected a float type"),
        (lambda t: t.update(steps=t["steps"].float()), "expected int64"),
        (lambda t: t.update({"norm.weight": torch.ones(WIDTH + 1)}), r"norm.weight.*\[65\]"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, says):
    _, folder = saved
    edit_tensors(folder, change)
    refused(folder, says)


@pytest.mark.parametrize(
    ("fmt", "name", "bad"),
    [("mxfp4:32:e8m0", "q.weight_scale", 255), ("nvfp4:16:e4m3", "q.weight_scale", 127)],
)
def test_scales_that_are_no_numbers_in_their_own_dtype(tmp_path, fmt, name, bad):
    save(quantized_toy(fmt, fmt), tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: t[name].view(torch.uint8).view(-1)[3:4].fill_(bad))
    refused(tmp_path / "m", "not finite")


def test_global_scales_are_checked_too(tmp_path):
    save(quantized_toy("nvfp4:16:e4m3", "nvfp4:16:e4m3"), tmp_path / "m")
    name = "q.input_quantizer.global_scale"
    edit_tensors(tmp_path / "m", lambda t: t[name].fill_(float("inf")))
    refused(tmp_path / "m", name)


def test_another_architecture(saved):
    _, folder = saved
    refused(folder, "down is 192 x 64 in the checkpoint and 128 x 64", Toy(inner=128))
    refused(folder, "lacks tensors of the model: again.weight", Toy(tied=False))
    refused(folder, "nn.Linear|none of that name", nn.Linear(4, 4))
    no_bias = Toy()
    no_bias.q = nn.Linear(WIDTH, INNER, bias=False)
    refused(folder, "q has a bias in the checkpoint", no_bias)


def test_meta_tensors_outside_the_state_dict_cannot_be_filled(tmp_path):
    class WithTable(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4), persistent=False)

    model = quantized_toy()
    save(model, tmp_path / "m")
    load(tmp_path / "m", WithTable())
    with torch.device("meta"):
        empty = WithTable()
    with pytest.raises(CheckpointError, match=r"table: on the meta device"):
        load(tmp_path / "m", empty)
    assert isinstance(empty.q, nn.Linear)


# Saving -------------------------------------------------------------------------------------------


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="no quantized linear; convert it first"):
        save(Toy(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_meta_model_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="meta device"):
        save(quantized_toy().to("meta"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_the_whole_folder(saved):
    _, folder = saved
    other = quantized_toy(seed=3)
    save(other, folder)
    assert sorted(contents(folder)) == ["config.json", WEIGHTS]  # the report is gone
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    x = torch.randn(2, 24)
    assert torch.equal(load(folder, Toy())(x), other(x))


def test_a_folder_with_other_files_is_not_replaced(saved):
    _, folder = saved
    (folder / "thesis.tex").write_text("dear")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        save(quantized_toy(seed=3), folder)
    assert (folder / "thesis.tex").read_text() == "dear"
    load(folder, Toy())


def test_a_foreign_model_is_not_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"_class_name": "Mine"}')
    with pytest.raises(CheckpointError, match="pq_fx.save did not write it"):
        save(quantized_toy(), tmp_path / "m")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save(quantized_toy(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(quantized_toy(), tmp_path / "empty")


@pytest.mark.parametrize("call", ["write_weights", "model_config"])
def test_an_error_while_saving_leaves_the_old_folder(saved, monkeypatch, call):
    _, folder = saved
    before = contents(folder)

    def broken(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, call, broken)
    with pytest.raises(CheckpointError, match="cannot be written: disk full.* bytes; .* are free"):
        save(quantized_toy(seed=3), folder)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_an_error_in_the_swap_puts_the_old_folder_back(saved, monkeypatch):
    _, folder = saved
    before = contents(folder)
    rename = Path.rename

    def broken(self, target):
        if ".new-" in self.name:
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(CheckpointError, match="no rename today"):
        save(quantized_toy(seed=3), folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


# Saves into base/<step>/m from one forked child a step, which dies at its step-th file operation.
KILLER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_checkpoint as t

torch.set_num_threads(1)  # other threads do not survive a fork
base, armed, step, stop = sys.argv[2], False, 0, 0
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

def hook(event, args):
    global step
    names = [str(a) for a in args]
    if armed and event in FILE_EVENTS and any(n.endswith("/m") or "/.m." in n for n in names):
        step += 1
        if step == stop:
            os._exit(9)

sys.addaudithook(hook)
model = t.quantized_toy(seed=3)
for stop in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        armed = True
        t.save(model, f"{base}/{stop}/m")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_kill_at_any_step_leaves_a_whole_folder(tmp_path):
    """Wherever saving over an old folder dies, one whole folder is left: the old or the new one."""
    old, new = quantized_toy(), quantized_toy(seed=3)
    steps = [*range(1, 16), 99]
    for step in steps:
        save(old, tmp_path / str(step) / "m")
    arguments = [str(Path(__file__).parent), str(tmp_path), *map(str, steps)]
    subprocess.run([sys.executable, "-c", KILLER, *arguments], check=True, timeout=300)
    x = torch.randn(2, 24)
    known = {"old": old(x), "new": new(x)}
    outcomes = []
    for step in steps:
        base = tmp_path / str(step)
        folder = base / "m"
        if not folder.exists():  # between the two renames
            (folder,) = (entry for entry in base.iterdir() if ".old-" in entry.name)
        y = load(folder, Toy())(x)
        outcomes.append(next(name for name, wanted in known.items() if torch.equal(y, wanted)))
    assert outcomes == sorted(outcomes, reverse=True)  # old until some step, new from then on
    assert {outcomes[0], outcomes[-1]} == {"old", "new"}
