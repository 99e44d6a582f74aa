"""transformers: `from_pretrained` and `save_pretrained` of quantized models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pq_fx
from pq_fx.errors import CheckpointError, UnseenError
from pq_fx.modules import QuantLinear, quantized_linears
from pq_fx.report import Report

CONFIG = pq_fx.QuantConfig(
    "int4", group_size=16, weight_only_format="int4:16:bf16", calibration_rows=64
)
IDS = torch.arange(2 * 9).reshape(2, 9) % 40
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def bert() -> nn.Module:
    return T.BertModel(T.BertConfig(**SIZES, max_position_embeddings=32))


def llama() -> nn.Module:
    """Its output embedding is tied to the input's."""
    config = T.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    return T.LlamaForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], type]] = {
    "bert": (bert, T.AutoModel),
    "llama": (llama, T.AutoModelForCausalLM),
}


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(IDS)[0]


def quantized(name: str, config: pq_fx.QuantConfig = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    quantizer = pq_fx.prepare(model, config)
    with quantizer.calibrate(), torch.no_grad():
        model(IDS)
    quantizer.convert()
    return model


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_there_and_back(name: str, fmt: str, tmp_path: Path) -> None:
    config = CONFIG
    if fmt == "nvfp4":
        config = pq_fx.QuantConfig("nvfp4", weight_only_format="int4:16:bf16", calibration_rows=64)
    model = quantized(name, config)
    model.save_pretrained(tmp_path / "a")
    assert {f.name for f in (tmp_path / "a").iterdir()} == {
        "config.json",
        "model.safetensors",
        "quantization_report.json",
    }
    loaded = MODELS[name][1].from_pretrained(tmp_path / "a")
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[n]) and v.dtype == theirs[n].dtype for n, v in ours.items())
    shared = [
        len({id(m.input_quantizer) for m in quantized_linears(x).values()}) for x in (model, loaded)
    ]
    assert shared[0] == shared[1] < len(quantized_linears(model))
    loaded._apply(torch.clone)  # mapped tensors are not aligned, and BLAS sums in another order
    assert torch.equal(run(loaded), run(model))
    assert Report.of_model(loaded) == Report.of_model(model)
    loaded.save_pretrained(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    by_hand = pq_fx.load(tmp_path / "a", MODELS[name][0]())
    assert torch.equal(run(by_hand._apply(torch.clone)), run(model))


def test_a_dtype_changes_floats_only(tmp_path: Path) -> None:
    model = quantized("llama")
    model.save_pretrained(tmp_path)
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    one = next(m for m in loaded.modules() if isinstance(m, QuantLinear))
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert (one.weight.dtype, one.weight_scale.dtype) == (torch.uint8, torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (run(loaded).float() - run(model)).norm() / run(model).norm() < 0.1


def test_what_calibration_never_saw_is_refused_after_loading(tmp_path: Path) -> None:
    quantized("bert").save_pretrained(tmp_path)
    loaded = T.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad(), pytest.raises(UnseenError, match="inputs_embeds"):
        loaded(inputs_embeds=torch.randn(2, 9, 32))
    run(loaded)


def test_damage_is_named(tmp_path: Path) -> None:
    quantized("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="bytes; config.json expects"):
        T.AutoModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"config.json does not have the checksum"):
        T.AutoModel.from_pretrained(tmp_path)
    config["quantization_config"]["format_version"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version 9"):
        T.AutoModel.from_pretrained(tmp_path)


def test_importing_pq_fx_registers_and_imports_nobody(tmp_path: Path) -> None:
    code = """
import sys, pq_fx
assert "transformers" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "permuquant" in AUTO_QUANTIZER_MAPPING
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
