"""The whole road: float, calibrated, converted, saved, loaded, compiled; by every way in, with the same numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import MODELS
from torch import nn

import pq_fx
from pq_fx.errors import CalibrationError, ConfigError
from pq_fx.modules import quantized_linears
from pq_fx.passes.lower import quantized_operations

Flux = Callable[..., tuple[nn.Module, dict]]
CONFIG = pq_fx.QuantConfig(
    "int4", group_size=16, weight_only_format="int4:16:bf16", calibration_rows=64
)


def calls(inputs: dict, n: int) -> list[dict]:
    """n calibration calls at different timesteps."""
    generator = torch.Generator().manual_seed(5)
    return [
        inputs
        | {
            "timestep": torch.rand(2, generator=generator),
            "hidden_states": torch.randn(2, 15, 12, generator=generator),
        }
        for _ in range(n)
    ]


def quantize(model: nn.Module, inputs: dict, config: pq_fx.QuantConfig = CONFIG) -> pq_fx.Report:
    quantizer = pq_fx.prepare(model, config)
    with torch.no_grad(), quantizer.calibrate():
        for call in calls(inputs, 2):
            model(**call)
    return quantizer.convert()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def test_calibration_leaves_results_alone_and_conversion_stays_close(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux()
    want = [model(**c).sample for c in calls(inputs, 2)]
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), quantizer.calibrate():
        got = [model(**c).sample for c in calls(inputs, 2)]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    report = quantizer.convert()
    with torch.no_grad():
        changed = model(**inputs).sample
    float_model, _ = tiny_flux()
    error = relative(changed, float_model(**inputs).sample)
    assert 0 < error < 0.3  # quantized, and still the same function
    quantized = [row.fqn for row in report.layers if row.quantized]
    skipped = {row.fqn: row.skip_reason for row in report.layers if not row.quantized}
    # 2 double blocks x (8 attention + 4 MLP + 2 modulation), 2 single x (5 + 1), the last modulation
    assert len(quantized) == 2 * 14 + 2 * 6 + 1
    assert set(quantized_linears(model)) == set(quantized)
    assert "embedder" in skipped["x_embedder"] and "final projection" in skipped["proj_out"]
    assert {row.absorb for row in report.layers if row.quantized} >= {"fold", "norm"}
    one_row = [row for row in report.layers if row.quantized and row.activation_format is None]
    assert all("norm" in row.fqn for row in one_row) and len(one_row) == 2 * 2 + 2 + 1


def test_three_ways_give_the_same_bits(
    tiny_flux: Flux, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = tiny_flux(layers=0, singles=1)
    one_line, loaded = copy.deepcopy(model), copy.deepcopy(model)
    quantize(model, inputs)
    pq_fx.save(model, tmp_path / "q")
    pq_fx.load(tmp_path / "q", loaded)

    options = CONFIG.to_dict() | {"calibration_steps": 2}
    with torch.no_grad(), caplog.at_level(logging.INFO, "pq_fx"):
        compiled = torch.compile(one_line, backend="permuquant", options=options, fullgraph=True)
        for call in calls(inputs, 2):
            compiled(**call)
        third = compiled(**inputs).sample
        ours = torch.compile(model, backend="permuquant", fullgraph=True)(**inputs).sample
        theirs = torch.compile(loaded, backend="permuquant", fullgraph=True)(**inputs).sample
        eager, eager_loaded = model(**inputs).sample, loaded(**inputs).sample
    assert torch.equal(ours, third)
    assert torch.equal(ours, theirs)
    assert torch.equal(eager, eager_loaded)
    assert relative(ours, eager) < 1e-3
    assert (
        "calibration call 2 of 2" in caplog.text
        and "converted" in caplog.text
        and "lowered" in caplog.text
    )


def test_second_resolution_and_same_class_twins(
    tiny_flux: Flux, make_flux_inputs: Callable
) -> None:
    first, inputs = tiny_flux(layers=0, singles=1)
    second, _ = tiny_flux(layers=0, singles=1, seed=1)
    quantize(first, inputs)
    quantize(second, inputs)
    other = make_flux_inputs(torch.float32, (4, 4), 2)
    with torch.no_grad():
        for model in (first, second):
            compiled = torch.compile(model, backend="permuquant", fullgraph=True)
            for x in (inputs, other):
                assert relative(compiled(**x).sample, model(**x).sample) < 1e-3
        assert relative(first(**inputs).sample, second(**inputs).sample) > 0.1


def test_regional_compile_of_a_converted_model(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(layers=2, singles=1)
    quantize(model, inputs)
    with torch.no_grad():
        want = model(**inputs).sample
        model.compile_repeated_blocks(fullgraph=True, backend="permuquant")
        got = model(**inputs).sample
    assert relative(got, want) < 1e-3


def test_lowered_graph_has_no_permute_left(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(layers=1, singles=1)
    quantize(model, inputs)
    from pq_fx.passes.lower import lower
    from pq_fx.passes.retrace import retrace
    from pq_fx.passes.verify import verify_graph

    seen = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        traced = retrace(gm)
        before = quantized_operations(traced)
        counts = lower(traced)
        verify_graph(traced)
        seen.append((before, counts, quantized_operations(traced), traced))
        return traced.forward

    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True)(**inputs).sample
        assert relative(got, model(**inputs).sample) < 1e-3
    before, counts, after, traced = seen[0]
    # one quantizer a linear before; q/k/v share one in each stream, q/k/v/mlp in the single block
    assert before["quantize"] == before["linear"] == 12 + 5
    assert counts.shared == 2 + 2 + 3
    assert counts.norms == 2 + 2 + 1  # norm1 and norm2 of both streams, the single block's norm
    assert counts.acts == 3  # gelu of both streams; attention and gelu of the single block
    assert after == {
        "norm_quantize": 5,
        "act_quantize": 3,
        "quantize": 2,
        "linear": 17,
        "linear_weight_only": 4,
    }
    gathers = {"index_select", "gather", "index"}
    assert not [
        n
        for n in traced.graph.nodes
        if n.op == "call_function" and str(n.target).split(".")[1:2] in [[g] for g in gathers]
    ]


def test_misuse_is_named(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(layers=1, singles=1)
    state = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(CalibrationError, match="was not called"),
        pq_fx.prepare(model, CONFIG).calibrate(),
    ):
        pass
    with pytest.raises(CalibrationError, match="nothing was calibrated"):
        pq_fx.prepare(model, CONFIG).convert()
    with pytest.raises(Exception, match="calibration_steps"):
        torch.compile(model, backend="permuquant")(**inputs)
    quantizer = pq_fx.prepare(model, pq_fx.QuantConfig("int4", rules={"no.such.layer": None}))
    with torch.no_grad(), quantizer.calibrate():
        model(**inputs)
    with pytest.raises(ConfigError, match="no.such.layer"):
        quantizer.convert()
    assert not quantized_linears(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    quantize(model, inputs)
    with pytest.raises(CalibrationError, match="already"):
        pq_fx.prepare(model, CONFIG)


def test_nan_in_calibration_changes_nothing(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(layers=1, singles=1)
    quantizer = pq_fx.prepare(model, CONFIG)
    poisoned = inputs | {"hidden_states": inputs["hidden_states"].clone().fill_(float("nan"))}
    with torch.no_grad(), quantizer.calibrate():
        model(**inputs)
        model(**poisoned)
    with pytest.raises(CalibrationError, match=r"NaN"):
        quantizer.convert()
    assert not quantized_linears(model)


def test_rules_and_skips(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(layers=1, singles=1)
    config = pq_fx.QuantConfig(
        "int4",
        group_size=16,
        weight_only_format="int4:16:bf16",
        calibration_rows=64,
        rules={
            "transformer_blocks.0.attn.to_q": None,
            r"re:.*\.ff\.net\.2": {"format": "int3", "group_size": 16},
            "proj_out": "int4:16:bf16",
        },
        modules_to_not_convert=("single_transformer_blocks",),
    )
    report = quantize(model, inputs, config)
    rows = {row.fqn: row for row in report.layers}
    assert "rule" in rows["transformer_blocks.0.attn.to_q"].skip_reason
    assert rows["transformer_blocks.0.attn.to_k"].quantized
    assert rows["transformer_blocks.0.ff.net.2"].format == "int3:16:bf16"
    assert rows["proj_out"].quantized  # a rule overrules what the graph suggests
    assert all(
        "modules_to_not_convert" in r.skip_reason
        for n, r in rows.items()
        if n.startswith("single_transformer")
    )
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).sample).all()


def test_a_cold_first_call_does_not_split_regions() -> None:
    """Z-Image fills its table of rotations in the first call, which breaks the graph; later calls are whole."""
    plans = []
    for warm in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        case = MODELS["zimage"]
        model, inputs = case.build(case.tiny_config | {"n_layers": 1}), case.tiny_inputs()
        with torch.no_grad():
            if warm:
                model(**inputs)
            quantizer = pq_fx.prepare(model, CONFIG)
            with quantizer.calibrate():
                model(**inputs)
                model(**inputs)
        plans.append(quantizer.statistics())
    hot, cold = plans
    assert len(cold.bound) == len(hot.bound) == 1
    assert cold.plan.linears == hot.plan.linears
    assert {n: r.foldable for n, r in cold.plan.regions.items()} == {
        n: r.foldable for n, r in hot.plan.regions.items()
    }
    for name, moments in cold.moments.items():  # no row is lost, none is counted twice
        want = hot.moments[name]
        assert all(
            torch.equal(a, b) for a, b in zip(moments.tensors(), want.tensors(), strict=True)
        )


def test_calibration_compiles_once_for_equal_shapes(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(layers=1, singles=1)
    quantizer = pq_fx.prepare(model, CONFIG)
    with quantizer.calibrate(), torch.no_grad():
        for t in (0.1, 0.5, 0.9):
            model(**inputs | {"timestep": torch.full_like(inputs["timestep"], t)})
    assert quantizer.statistics().graphs == 1 and quantizer.statistics().calls == 3


class Uneven(nn.Module):
    """A gated MLP whose hidden width holds no whole groups of 64 (as SANA's 5600), and a modulation linear of 48."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(8, 128), nn.Linear(48, 128)
        self.norm = nn.LayerNorm(128)
        self.up, self.gate, self.down = (
            nn.Linear(128, 160),
            nn.Linear(128, 160),
            nn.Linear(160, 128),
        )
        self.out = nn.Linear(128, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        n = self.norm(h) * (1 + self.time(torch.sin(t))[:, None])
        h = h + self.down(self.up(n) * torch.nn.functional.silu(self.gate(n)))
        return self.out(torch.nn.functional.layer_norm(h, (128,)))


@pytest.mark.parametrize("method", ["permuquant-h", "best", "smoothquant"])
def test_a_layer_that_groups_do_not_divide_takes_a_smaller_one(method: str) -> None:
    torch.manual_seed(5)
    model = Uneven().eval()
    x, t = torch.randn(2, 33, 8), torch.randn(2, 48)
    wanted = model(x, t)
    config = pq_fx.QuantConfig("int4", method=method)
    foretold = {row.fqn: row.format for row in pq_fx.inspect(model, x, t, config=config).linears}
    quantizer = pq_fx.prepare(model, config)
    with quantizer.calibrate(), torch.no_grad():
        model(x, t)
    report = quantizer.convert()
    taken = {row.fqn: row.format for row in report.layers}
    name = "int4f" if method == "best" else "int4"
    assert taken["up"] == f"{name}:64:bf16" and taken["down"] == f"{name}:32:bf16"
    assert taken == foretold
    with torch.no_grad():
        assert float((model(x, t) - wanted).norm() / wanted.norm()) < 0.2


class Part(nn.Module):
    """A module whose code Dynamo compiles by itself when the one that calls it is not traced."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Parts(nn.Module):
    """Two parts, called out of the tracer's sight (HiDream's embedders are such parts)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Part(nn.Linear(32, 64), nn.LayerNorm(64))
        self.mlp = Part(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64))

    @torch._dynamo.disable(recursive=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embed(x))


@pytest.mark.usefixtures("no_codegen")
def test_a_part_that_was_left_in_float_compiles_within_its_model() -> None:
    torch.manual_seed(0)
    model, x = Parts().eval(), torch.randn(40, 32)
    config = {"format": "int4", "group_size": 16, "rules": {"re:embed.*": None}}
    with torch.no_grad():
        quantizer = pq_fx.prepare(model, config)
        with quantizer.calibrate():
            model(x)
        quantizer.convert()
        want = model(x)
        assert torch.allclose(torch.compile(model, backend="permuquant")(x), want, atol=1e-5)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="this model is not quantized"):  # without the rest
            torch.compile(model.embed, backend="permuquant")(x)
