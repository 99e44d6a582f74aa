"""ModelOpt's layout: what is in the files by ModelOpt's own rules, the way back, and what does not fit."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pq_fx
from pq_fx.errors import CheckpointError, InterchangeError
from pq_fx.integrations.modelopt import CONFIG_FILE, export_modelopt, load_modelopt
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import unpack
from pq_fx.kernels.reference import Quantized, dequantize
from pq_fx.modules import quantized_linears
from pq_fx.report import Report

FITTING = pq_fx.QuantConfig(
    "nvfp4", method="permuquant", gather_margin=1.0, weight_only_format="nvfp4", calibration_rows=64
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Tests must not change it."""
    return pipelines.quantized("flux", FITTING).transformer


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    folder = tmp_path_factory.mktemp("out") / "modelopt"
    export_modelopt(model, folder)
    return folder


def float_model() -> FluxTransformer2DModel:
    return pipelines.make("flux").transformer


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(**pipelines.flux_inputs()).sample


def test_it_folds_and_does_nothing_at_run_time(model: nn.Module) -> None:
    """Else the layout could not say it; `gather_margin=1` allows no gather."""
    absorbed = Counter(row.absorb for row in Report.of_model(model).quantized)
    assert absorbed["fold"] >= 3
    assert not absorbed["norm"] + absorbed["quantize"]
    gathering = pipelines.quantized("flux", replace(FITTING, gather_margin=0.0)).transformer
    absorbed = Counter(row.absorb for row in Report.of_model(gathering).quantized)
    assert absorbed["norm"] + absorbed["quantize"] > 0


def test_the_bytes_by_modelopts_rules(model: nn.Module, exported: Path) -> None:
    """Decoded as NVFP4QTensor.dequantize does it: low nibble first, e2m1 * (block scale * second scale)."""
    tensors = load_file(exported / WEIGHTS)
    linears = quantized_linears(model)
    assert len(linears) > 20
    for name, linear in linears.items():
        packed = tensors[f"{name}.weight"]
        codes = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.long)
        codes[:, 0::2], codes[:, 1::2] = (packed & 0x0F).long(), (packed >> 4).long()
        block = tensors[f"{name}.weight_scale"]
        assert block.dtype == torch.float8_e4m3fn
        assert block.shape == (linear.out_features, linear.in_features // 16)
        second = tensors[f"{name}.weight_scale_2"]
        assert (second.dtype, second.shape) == (torch.float32, ())
        scale = block.float() * second
        values = (E2M1[codes].unflatten(1, (-1, 16)) * scale.unsqueeze(-1)).flatten(1)
        fmt = Format.parse(linear.weight_format)
        ours = Quantized(
            unpack(linear.weight, fmt, linear.in_features),
            linear.weight_scale,
            linear.weight_global_scale,
        )
        assert torch.equal(values, dequantize(ours, fmt))
        one = linear.input_quantizer
        assert (f"{name}.input_scale" in tensors) == (one is not None)
        if one is not None:
            assert torch.equal(tensors[f"{name}.input_scale"], one.global_scale)
    of_linears = {n.rpartition(".")[0] for n in tensors if n.endswith("weight_scale_2")}
    assert of_linears == set(linears)
    assert not [n for n in tensors if "input_quantizer" in n or "permuquant" in n]
    floats = {n for n in tensors if n.rpartition(".")[0] not in of_linears}
    assert floats == {
        n for n in float_model().state_dict() if n.rpartition(".")[0] not in of_linears
    }


def test_both_configuration_files(model: nn.Module, exported: Path) -> None:
    plain = json.loads((exported / CONFIG_FILE).read_text())["quantization"]
    assert plain["quant_algo"] == "MIXED_PRECISION"  # modulation reads one row: weights only
    kinds = {n: entry["quant_algo"] for n, entry in plain["quantized_layers"].items()}
    for name, linear in quantized_linears(model).items():
        assert kinds.pop(name) == ("W4A16_NVFP4" if linear.input_quantizer is None else "NVFP4")
    assert not kinds
    assert "proj_out" in plain["exclude_modules"]
    config = json.loads((exported / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "modelopt"
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    named = [t for group in quantization["config_groups"].values() for t in group["targets"]]
    assert sorted(named) == sorted(plain["quantized_layers"])


def test_there_and_back_is_the_same_model(model: nn.Module, exported: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = FluxTransformer2DModel.from_config(float_model().config)
    loaded = load_modelopt(exported, empty)
    loaded._apply(torch.clone)  # mapped tensors are not aligned, and BLAS sums in another order
    assert torch.equal(run(loaded), run(model))
    count = {id(m.input_quantizer) for m in quantized_linears(model).values()}
    assert (
        len({id(m.input_quantizer) for m in quantized_linears(loaded).values()}) <= len(count) + 4
    )
    export_modelopt(loaded, tmp_path / "again")
    for file in sorted(exported.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    pq_fx.save(loaded, tmp_path / "ours")  # it is a model like any other here
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")._apply(torch.clone)
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "permuquant-h"}, "a rotated input"),
        ({"gather_margin": 0.0}, "a gathered input"),
        ({"weight_only_format": "int4f:16:bf16"}, "its weight is int4f:16:bf16"),
        ({"activation_format": "fp8"}, "its input is fp8"),
        ({"method": "svdquant"}, "low-rank"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, says: str, tmp_path: Path) -> None:
    wrong = pipelines.quantized("flux", replace(FITTING, **changes)).transformer
    with pytest.raises(InterchangeError, match=rf"cannot hold .*{says}.*gather_margin=1.0"):
        export_modelopt(wrong, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_named(exported: Path, tmp_path: Path) -> None:
    target = float_model()
    before = copy.deepcopy(target.state_dict())
    tensors, plain = load_file(exported / WEIGHTS), json.loads((exported / CONFIG_FILE).read_text())
    name = next(n.removesuffix(".input_scale") for n in tensors if n.endswith(".input_scale"))

    def damaged(changed: dict[str, Tensor | None], algorithm: str = "NVFP4") -> Path:
        kept = {n: v for n, v in (tensors | changed).items() if v is not None}
        save_file(kept, tmp_path / WEIGHTS)
        plain["quantization"]["quant_algo"] = algorithm
        (tmp_path / CONFIG_FILE).write_text(json.dumps(plain))
        return tmp_path

    for changed, says in (
        ({f"{name}.pre_quant_scale": torch.ones(32)}, "unknown to the model.*pre_quant_scale"),
        ({f"{name}.weight_scale": None}, "lacks tensors"),
        ({f"{name}.weight": tensors[f"{name}.weight"].view(torch.int8)}, "is not uint8"),
        ({f"{name}.input_scale": torch.tensor(torch.nan)}, "global_scale"),
        ({"nowhere.weight_scale_2": torch.tensor(1.0)}, "nowhere.weight is not uint8"),
    ):
        with pytest.raises(CheckpointError, match=says):
            load_modelopt(damaged(changed), target)
    with pytest.raises(CheckpointError, match="'FP8'; expected NVFP4"):
        load_modelopt(damaged({}, "FP8"), target)
    with pytest.raises(CheckpointError, match="not a ModelOpt checkpoint"):
        load_modelopt(exported.parent, target)
    assert all(torch.equal(v, before[n]) for n, v in target.state_dict().items())
    with pytest.raises(CheckpointError, match="no quantized linear"):
        export_modelopt(target, tmp_path / "float")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"something else than an export \(mine.txt\)"):
        export_modelopt(pipelines.quantized("flux", FITTING).transformer, tmp_path)


def test_convolutions_do_not_fit() -> None:
    model = pipelines.quantized("sana", FITTING).transformer
    with pytest.raises(InterchangeError, match="is a 1x1 convolution"):
        export_modelopt(model, "nowhere")


def test_it_draws_in_a_pipeline(model: nn.Module, exported: Path) -> None:
    pipe: DiffusionPipeline = pipelines.make("flux")
    want = pipelines.make("flux")
    load_modelopt(exported, pipe.transformer)
    want.transformer = model
    assert (pipelines.draw(pipelines.aligned(pipe)) == pipelines.draw(want)).all()
