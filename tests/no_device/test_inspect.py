"""`pq_fx.inspect` and `pq-fx inspect`: what they say agrees with what conversion does, and errors say what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models import MODELS
from torch import nn

import pq_fx
from pq_fx.cli import main
from pq_fx.decide import decide
from pq_fx.errors import ConfigError, GraphError
from pq_fx.example_inputs import InputSizes, example_inputs
from pq_fx.inspection import without_weights
from pq_fx.plan import LinearFact

SETTINGS = {"format": "int4", "group_size": 16, "weight_only_format": "int4:16:bf16"}
ONE_BLOCK = '{"num_layers": 1, "num_single_layers": 1}'


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([nn.Linear(width, 2 * width), nn.Linear(2 * width, width)])
        self.out = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = h + self.layers[1](nn.functional.gelu(self.layers[0](self.norm(h))))
        return self.out(nn.functional.layer_norm(h, (h.shape[-1],)))


def with_arguments() -> tuple[nn.Module, torch.Tensor]:
    return Block(), torch.randn(2, 5, 16)


def test_figures_of_a_small_model_are_those_of_arithmetic() -> None:
    model = Block()
    found = pq_fx.inspect(model, torch.randn(2, 5, 16), config=SETTINGS)
    rows = {r.fqn: r for r in found.linears}
    assert {n: r.treatment for n, r in rows.items()} == {
        "embed": "leave", "layers.0": "quantize", "layers.1": "quantize", "out": "leave",
    }  # fmt: skip
    assert {n: r.absorb for n, r in rows.items()} == {
        "embed": None, "layers.0": "stream", "layers.1": "fold", "out": None,
    }  # fmt: skip
    flops = {n: 2 * 10 * r.in_features * r.out_features for n, r in rows.items()}
    assert {n: r.flops for n, r in rows.items()} == flops
    assert found.block_share == 1.0
    inside = flops["layers.0"] + flops["layers.1"]
    assert found.flop_share("quantize") == pytest.approx(inside / sum(flops.values()))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.absorbs == {"fold": 1, "stream": 1, "norm": 0, "quantize": 0}
    assert "embedder: it reads an input of the model" in found.skips
    # 4 bits and one bf16 scale for each 16 channels; no order is kept, both permutations fold.
    packed = 2 * 64 * 128 // 2 + 2 * (64 * 128 // 16) * 2
    assert found.float_bytes - found.quantized_bytes == 2 * 64 * 128 * 4 - packed
    assert "GEMM FLOPs" in str(found) and json.dumps(found.to_dict())


def test_inspect_says_what_convert_does(tiny_flux) -> None:
    model, inputs = tiny_flux(torch.float32, layers=1, singles=1)
    found = pq_fx.inspect(model, **inputs, config=SETTINGS)
    assert all(p.device.type == "cpu" for p in model.parameters())
    quantizer = pq_fx.prepare(model, SETTINGS)
    with quantizer.calibrate(), torch.no_grad():
        model(**inputs)
    report = quantizer.convert()
    said = {r.fqn: (r.format, r.activation_format, r.skip_reason) for r in found.linears}
    done = {r.fqn: (r.format, r.activation_format, r.skip_reason) for r in report.layers}
    assert said == done and len(said) > 20
    # Parameters after conversion, within the orders that calibration found not to pay and input scales.
    bytes_after = sum(t.numel() * t.element_size() for t in _unique(model))
    assert found.quantized_bytes * 0.97 < bytes_after <= found.quantized_bytes * 1.03


def _unique(model: nn.Module) -> list[torch.Tensor]:
    return list({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def test_rules_decide_before_the_graph() -> None:
    rules = {"layers.0": None, "embed": "mxfp4"}
    found = pq_fx.inspect(Block(), torch.randn(2, 5, 16), config={**SETTINGS, "rules": rules})
    rows = {r.fqn: r for r in found.linears}
    assert rows["layers.0"].skip_reason == "left alone by rule 'layers.0'"
    assert (
        rows["embed"].skip_reason
        == "16 input channels are not a multiple of the group of mxfp4:32:e8m0"
    )


@pytest.mark.parametrize(
    ("channels", "taken"),
    [(128, "int4:64:bf16"), (5600, "int4:32:bf16"), (48, "int4:16:bf16"), (24, None)],
)
def test_the_largest_group_that_divides_the_channels(channels: int, taken: str | None) -> None:
    fact = LinearFact("q", channels, 8, "quantize", "")
    decision = decide(fact, pq_fx.QuantConfig("int4"), nn.Linear(channels, 8))
    keys = (
        decision.weight and decision.weight.key,
        decision.activation and decision.activation.key,
    )
    assert keys == (taken, taken)
    assert bool(decision.skip_reason) == (taken is None)


def test_a_copy_without_weights_shares_nothing() -> None:
    model = Block()
    model.out.weight = model.layers[0].weight  # tied
    copied = without_weights(model)
    assert all(p.device.type == "meta" for p in copied.parameters())
    assert copied.out.weight is copied.layers[0].weight
    assert model.embed.weight.device.type == "cpu" and without_weights(copied) is copied


def test_values_on_the_host_are_named_or_run_for_real() -> None:
    class Reads(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = int(x.abs().sum() > 0)
            return super().forward(x[:, n:])

    with pytest.raises(GraphError, match="without weights.*--real"):
        pq_fx.inspect(Reads(), torch.randn(2, 5, 16))
    found = pq_fx.inspect(Reads(), torch.randn(2, 5, 16), real=True)
    assert found.graphs > 1 and found.graph_breaks and len(found.linears) == 4


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(GraphError, match="no linear"):
        pq_fx.inspect(nn.Sequential(nn.ReLU()), torch.randn(2, 3))


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mlp"])
def test_inputs_are_made_from_the_signature(name: str) -> None:
    """Each tiny class runs on made inputs, whose shapes are those of the arguments written by hand."""
    model, by_hand = MODELS[name].tiny()
    sizes = InputSizes(batch=2, height=4, width=4, text=8 if name == "cogvideo" else 6)
    made = example_inputs(model, sizes)
    assert {k for k, v in by_hand.items() if v is not None and "mask" not in k} <= set(made)
    for key, value in by_hand.items():
        if isinstance(value, torch.Tensor) and "mask" not in key and key in made:
            assert made[key].dim() == value.dim(), key
    with torch.no_grad():
        model(**made)


def test_unknown_inputs_are_named() -> None:
    with pytest.raises(ConfigError, match="cannot guess x of Block.forward.*module:function"):
        example_inputs(Block())


def test_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # rich folds names on a narrow terminal
    sizes = ["--height", "8", "--width", "8", "--text", "16"]
    command = ["inspect", "FluxTransformer2DModel", "--config", ONE_BLOCK, *sizes]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "single_transformer_blocks.*.proj_out" in text and "Left in 16 bits" in text
    assert main([*command, "--json", "--preset", "w4a4-nvfp4"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["config"]["format"] == "nvfp4" and plain["block_gemm_flop_share"] > 0.99
    assert sum(r["treatment"] == "quantize" for r in plain["linears"]) == 17


def test_command_on_a_folder_and_a_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.42",
        **json.loads(ONE_BLOCK),
    }
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(stored))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    sizes = ["--height", "8", "--width", "8", "--text", "16", "--json"]
    assert main(["inspect", str(tmp_path), *sizes]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "FluxTransformer2DModel"

    monkeypatch.setitem(sys.modules, "its_models", sys.modules[__name__])
    path = list(sys.path)
    assert main(["inspect", "its_models:with_arguments", "--json"]) == 0
    assert sys.path == path  # the working directory would make our kernels/ Hugging Face's package
    assert json.loads(capsys.readouterr().out)["model"] == "Block"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["NoSuchModel"], "no model class of diffusers or transformers"),
        (["FluxTransformer2DModel", "--config", "{"], "not JSON"),
        (
            ["FluxTransformer2DModel", "--config", "missing.json"],
            "neither a file nor a JSON object",
        ),
        (["FluxTransformer2DModel", "--config", '{"depth": 3}'], "has no setting depth"),
        (["FluxTransformer2DModel", "--preset", "w5"], "neither a preset"),
        (["FluxTransformer2DModel", "--config", '{"num_attention_heads": "x"}'], "cannot be built"),
        (["nowhere:model"], "cannot import"),
        (["json:loads", "--config", "{}"], "builds the model itself"),
    ],
)
def test_errors_are_one_paragraph_with_exit_code_2(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *command]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error
