"""Saving and loading: equal bytes, equal outputs."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from checkpoints import (
    INNER,
    WEIGHTS,
    WIDTH,
    Toy,
    contents,
    quantized_linear,
    quantized_toy,
    refused,
    report,
)
from torch import nn

from pq_fx import applied, checkpoint, checkpoint_model
from pq_fx.checkpoint import load, save
from pq_fx.config import QuantConfig
from pq_fx.errors import CheckpointError
from pq_fx.report import Report


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("int4:64:bf16", "int4:64:bf16"),
        ("int3:16:pow2", "int4:32:pow2"),
        ("int4f:16:bf16", "int3f:64:bf16"),
        ("nvfp4:16:e4m3", "nvfp4:16:e4m3"),
        ("mxfp4:32:e8m0", "mxfp4:32:e8m0"),
        ("int4f:64:bf16", "fp8:0:fp32"),
        ("int3f:32:bf16", "int4f:32:bf16"),
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


def test_settings_of_the_older_version_have_no_checksum(saved):
    model, folder = saved
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 2
    del config["quantization_config"]["sha256"]
    file.write_text(json.dumps(config))
    x = torch.randn(2, 24)
    assert torch.equal(load(folder, Toy())(x), model(x))
