"""diffusers: whole pipelines from float to a folder to a picture, and every way in and out of a quantized model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DiffusionPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PipelineQuantizationConfig,
)
from diffusers.configuration_utils import register_to_config
from pipelines import CONFIG, quantized
from pipelines import flux_inputs as inputs
from safetensors.torch import load_file, save_file

import pq_fx
from pq_fx import checkpoint_config, storage
from pq_fx.errors import CalibrationError, CheckpointError, ConfigError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import quantize
from pq_fx.modules import QuantLinear, quantized_linears


@pytest.fixture(scope="module")
def flux() -> Any:
    """A quantized FLUX pipeline; tests must not change it."""
    return quantized("flux")


@pytest.fixture(scope="module")
def folder(flux: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved; tests must not change it."""
    path = tmp_path_factory.mktemp("flux")
    flux.save_pretrained(path)
    return path


def load_transformer(folder: Path, **kwargs: Any) -> Any:
    return FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", **kwargs)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one
    )


@pytest.mark.parametrize("family", sorted(pipelines.FAMILIES))
def test_a_pipeline_from_float_to_folder_to_picture(family: str, tmp_path: Path) -> None:
    pipe = quantized(family)
    want = pipelines.draw(pipe)
    assert np.abs(want - pipelines.draw(pipelines.make(family))).max() > 1e-3  # it is quantized
    pipe.save_pretrained(tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p")
    assert same_state(pipe.transformer, loaded.transformer)
    assert np.array_equal(pipelines.draw(pipelines.aligned(loaded)), want)
    loaded.save_pretrained(tmp_path / "again")
    for file in sorted((tmp_path / "p" / "transformer").iterdir()):
        assert (tmp_path / "again" / "transformer" / file.name).read_bytes() == file.read_bytes()


def test_the_folder_is_what_diffusers_expects(folder: Path) -> None:
    names = {file.name for file in (folder / "transformer").iterdir()}
    assert names == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "quantization_report.json",
    }
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert config["num_attention_heads"] == 2
    assert config["quantization_config"]["quant_method"] == "permuquant"
    assert config["quantization_config"]["dtype"] == "float32"


# diffusers' gotchas for a quantizer from outside --------------------------------------------------

ORDERS = """
import sys
import pq_fx
assert not [m for m in ("diffusers", "transformers", "peft", "accelerate") if m in sys.modules]
ours = [f for f in sys.meta_path if type(f).__module__.startswith("pq_fx.")]  # others have a _Finder too
waiting = [f.name for f in ours if type(f).__name__ == "_Finder"]
assert "diffusers.quantizers.auto" in waiting
from diffusers.quantizers import auto  # what every model's module imports
from pq_fx import PermuQuantConfig
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["permuquant"] is PermuQuantConfig
assert "permuquant" in auto.AUTO_QUANTIZER_MAPPING
assert type(auto.__spec__.loader).__name__ == type(auto.__loader__).__name__ == "SourceFileLoader"
assert not any(f in sys.meta_path and f.name == "diffusers.quantizers.auto" for f in ours)
"""


def test_import_pq_fx_suffices_and_imports_nobody() -> None:
    """Here pq_fx comes first; in this very process diffusers did."""
    command = [sys.executable, "-c", ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["permuquant"] is pq_fx.PermuQuantConfig


def test_the_method_is_an_enum_and_a_string() -> None:
    method = pq_fx.PermuQuantConfig().quant_method
    assert method.value == method == "permuquant"
    assert json.dumps(method) == '"permuquant"'


def test_the_config_is_plain_json_and_comes_back(folder: Path) -> None:
    settings = {"method": "rtn", "modules_to_not_convert": ["proj_out"], "rules": {"a": None}}
    fresh = pq_fx.PermuQuantConfig("w4a4-nvfp4", **settings)
    assert json.loads(json.dumps(fresh.to_dict(), sort_keys=True)) == fresh.to_dict()
    assert fresh.config == pq_fx.QuantConfig.preset("w4a4-nvfp4", **settings)
    assert fresh.modules_to_not_convert == ["proj_out"]
    assert '"method": "rtn"' in repr(fresh)
    stored = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    loaded = load_transformer(folder).config["quantization_config"]
    assert copy.deepcopy(loaded).to_dict() == stored
    assert pq_fx.PermuQuantConfig.from_dict(loaded.to_dict()).config == CONFIG
    with pytest.raises(ConfigError, match="unknown settings 'grup_size'"):
        pq_fx.PermuQuantConfig("int4", grup_size=3)


def test_loading_a_float_model_names_the_way_to_calibrate(tmp_path: Path) -> None:
    pipelines.make("flux").save_pretrained(tmp_path)
    config = pq_fx.PermuQuantConfig("int4")
    with pytest.raises(CalibrationError, match="prepare.*calibrate.*convert.*save_pretrained"):
        load_transformer(tmp_path, quantization_config=config)
    whole = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    with pytest.raises(CalibrationError, match="cannot quantize"):
        DiffusionPipeline.from_pretrained(tmp_path, quantization_config=whole)


def test_a_pipeline_config_for_a_quantized_folder(flux: Any, folder: Path) -> None:
    whole = PipelineQuantizationConfig(
        quant_mapping={"transformer": pq_fx.PermuQuantConfig(CONFIG)}
    )
    with pytest.warns(UserWarning, match="from the model will be used"):
        loaded = DiffusionPipeline.from_pretrained(folder, quantization_config=whole)
    assert same_state(loaded.transformer, flux.transformer)


def test_modules_to_not_convert_by_diffusers_substring_rule(tmp_path: Path) -> None:
    names = ["transformer_blocks.0.attn", "norm1_context"]
    pipe = quantized("flux", replace(CONFIG, modules_to_not_convert=names))
    left = [n for n, m in pipe.transformer.named_modules() if type(m) is torch.nn.Linear]
    wanted = [n for n in left if any(key + "." in n + "." for key in names)]
    assert len([n for n in wanted if ".attn." in n]) >= 8 and len(wanted) > 8
    converted = quantized_linears(pipe.transformer)
    # "single_transformer_blocks.0.attn." contains the first key, too; blocks 1 do not.
    assert not [n for n in converted if any(key + "." in n + "." for key in names)]
    assert [n for n in converted if "transformer_blocks.1.attn" in n]
    pipe.transformer.save_pretrained(tmp_path / "t")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "t")
    assert loaded.hf_quantizer.modules_to_not_convert == names
    assert same_state(loaded, pipe.transformer)


# Loading ------------------------------------------------------------------------------------------


def test_a_loaded_model_is_what_conversion_left(flux: Any, folder: Path) -> None:
    loaded = load_transformer(folder)
    assert same_state(loaded, flux.transformer)
    assert not loaded.training and loaded.is_quantized
    assert pq_fx.Report.of_model(loaded) == pq_fx.Report.of_model(flux.transformer)
    attention = loaded.transformer_blocks[0].attn
    assert attention.to_q.input_quantizer is attention.to_k.input_quantizer
    assert attention.to_q.input_quantizer is not attention.add_q_proj.input_quantizer
    plain = pq_fx.load(folder / "transformer", pipelines.make("flux", seed=1).transformer)
    assert same_state(plain, loaded)


def test_a_dtype_is_for_the_float_parts(flux: Any, folder: Path) -> None:
    loaded = load_transformer(folder, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    before, after = flux.transformer.state_dict(), loaded.state_dict()
    inside = {f"{n}.{p}" for n, m in quantized_linears(loaded).items() for p in m.state_dict()}
    for name, value in after.items():
        kept = name in inside and not name.endswith(".bias")
        assert value.dtype == (before[name].dtype if kept else torch.bfloat16), name
        assert torch.equal(value, before[name].to(value.dtype)), name
    assert torch.isfinite(loaded(**inputs(torch.bfloat16)).sample).all()


def test_the_dtype_that_was_saved_is_the_default(tmp_path: Path, flux: Any) -> None:
    model = copy.deepcopy(flux.transformer)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert same_state(FluxTransformer2DModel.from_pretrained(tmp_path), model)


def test_shards_load_like_one_file(flux: Any, tmp_path: Path) -> None:
    flux.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_state(FluxTransformer2DModel.from_pretrained(tmp_path), flux.transformer)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(flux: Any, folder: Path, device_map: Any) -> None:
    loaded = load_transformer(folder, device_map=device_map)
    assert same_state(loaded, flux.transformer)
    aligned = loaded._apply(torch.clone)
    with torch.no_grad():
        assert torch.equal(aligned(**inputs()).sample, flux.transformer(**inputs()).sample)


def test_a_device_map_with_the_disk_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="disk.*casts.*enable_group_offload"):
        load_transformer(folder, device_map={"": "disk"}, offload_folder=tmp_path)


class Tied(ModelMixin, ConfigMixin):
    """Two float linears share one weight, and one module has two names."""

    @register_to_config
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.q = (torch.nn.Linear(width, width) for _ in range(3))
        self.b.weight = self.a.weight
        self.again = self.q
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(self.b(self.a(x))) + self.again(x) + self.table.sum()


def test_ties_and_buffers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Tied().eval().requires_grad_(False), torch.randn(2, 32)
    fmt = Format.parse("int4:16:bf16")
    q = quantize(model.q.weight, fmt)
    packed = pack(q.codes, fmt)
    model.q = model.again = QuantLinear(
        32, 32, fmt.key, packed, q.scale, None, model.q.bias.detach().clone(), None
    )
    pq_fx.save(model, tmp_path)
    loaded = Tied.from_pretrained(tmp_path)
    assert loaded.b.weight is loaded.a.weight and loaded.again is loaded.q
    assert torch.equal(loaded._apply(torch.clone)(x), model(x))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("flip", "checksum"),
        ("version", "format_version 1; this release reads 2 and 3. Version 1 was never released"),
        ("layer", "of another architecture"),
        ("dtype", "names no float dtype"),
        ("weights", "does not describe its weight files"),
        ("perm", "no permutation"),
        ("scale", "not finite"),
        ("missing", "lacks tensors"),
        ("heads", "does not have the checksum that it names"),
    ],
)
def test_damage_is_named(flux: Any, tmp_path: Path, damage: str, says: str) -> None:
    flux.transformer.save_pretrained(tmp_path)
    weights, file = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    config = json.loads(file.read_text())
    ours = config["quantization_config"]
    raw = bytearray(weights.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif damage == "version":
        ours["format_version"] = 1
    elif damage == "layer":
        ours["layers"]["nowhere"] = next(iter(ours["layers"].values()))
    elif damage == "dtype":
        ours["dtype"] = "int8"
    elif damage == "weights":
        del ours["weights"]
    elif damage == "heads":
        config["axes_dims_rope"] = config["axes_dims_rope"][::-1]
    else:
        tensors = load_file(weights)
        perm = next((n for n in tensors if n.endswith(".perm")), None)
        scale = next(n for n in tensors if n.endswith(".weight_scale"))
        assert perm is not None
        if damage == "perm":
            tensors[perm][0] = tensors[perm][1]
        elif damage == "scale":
            tensors[scale].view(-1)[0] = float("inf")
        else:
            del tensors[scale]
        save_file(tensors, weights)
        ours["weights"][weights.name] = {
            "bytes": weights.stat().st_size,
            "sha256": storage.sha256(weights),
        }
    if damage != "heads":  # what is left are the checks of content
        ours["sha256"] = checkpoint_config.checksum(config)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_an_index_that_names_another_file(flux: Any, tmp_path: Path) -> None:
    """diffusers reads what the index names; no checksum is known of that."""
    flux.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    plain = json.loads(index.read_text())
    shard = next(iter(plain["weight_map"].values()))
    other = "other.safetensors"
    tensors = load_file(tmp_path / shard)
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, tmp_path / other)
    plain["weight_map"] = {k: other if v == shard else v for k, v in plain["weight_map"].items()}
    index.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"other\.safetensors would be read"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_a_cut_off_file(flux: Any, tmp_path: Path) -> None:
    """Of one file diffusers reads the header first, and names the file itself; of shards, ours comes first."""
    for size, error, says in (
        ("10GB", OSError, "Unable to load weights"),
        ("50KB", CheckpointError, "cut off"),
    ):
        flux.transformer.save_pretrained(tmp_path, max_shard_size=size)
        file = sorted(tmp_path.glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(error, match=says):
            FluxTransformer2DModel.from_pretrained(tmp_path)


# Saving, casting, going back ----------------------------------------------------------------------


def test_saving_refuses_what_a_checkpoint_is_not(flux: Any, tmp_path: Path) -> None:
    for wrong in ({"safe_serialization": False}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(CheckpointError, match=next(iter(wrong)) + ".*upload_folder"):
            flux.transformer.save_pretrained(tmp_path / "x", **wrong)
    with pytest.raises(CheckpointError, match="or pq_fx.save"):
        ModelMixin.save_pretrained(flux.transformer, tmp_path / "x")
    flux.transformer.save_pretrained(tmp_path / "y", is_main_process=False)
    assert not (tmp_path / "y").exists()


def test_a_copy_saves_itself(flux: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(flux.transformer)
    twin.proj_out.bias += 1.0
    twin.save_pretrained(tmp_path)
    assert same_state(FluxTransformer2DModel.from_pretrained(tmp_path), twin)


def test_casts_of_a_quantized_model_are_refused_by_diffusers(flux: Any) -> None:
    for cast in (
        lambda m: m.to(torch.float16),
        lambda m: m.half(),
        lambda m: m.to("cpu", torch.half),
    ):
        with pytest.raises(ValueError, match="quantized model"):
            cast(flux.transformer)
    assert flux.transformer.to("cpu") is flux.transformer


def test_dequantize_gives_a_float_model(flux: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(flux.transformer)
    with torch.no_grad():
        float_model = pipelines.make("flux").transformer
        want, got_quantized = float_model(**inputs()).sample, model(**inputs()).sample
        model.dequantize()
        got = model(**inputs()).sample
    assert not quantized_linears(model) and not model.is_quantized
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {torch.nn.Linear}
    assert (got - want).norm() < (got_quantized - want).norm()  # 16-bit activations
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert same_state(loaded, model) and "quantization_config" not in loaded.config
    assert pq_fx.prepare(model, CONFIG)
    with pytest.raises(ValueError, match="first quantize"):
        model.dequantize()
