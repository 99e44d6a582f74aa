"""Real model classes, no per-model code: every region's channels shuffled at random, nothing may change (fp64).

Tiny random configurations of diffusers' and transformers' own classes. For each graph that Dynamo makes of a model,
regions are found, random permutations are folded through all of them at once, and the model's output must stay the
float model's. Classes that do not trace as one graph (Lumina2, HiDream) are done graph by graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from models import MODELS
from random_folds import as_double, fold_at_random
from thresholds import folded_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pq_fx.errors import GraphError
from pq_fx.passes import (
    _torch,
    retrace,
)
from pq_fx.passes.replay import Retracer

# class: graphs, regions, regions that fold, linears by treatment (quantize, weight_only, leave, impossible)
EXPECTED = {
    "mlp": (1, 3, 2, 3, 0, 0, 0),
    "bert": (1, 9, 4, 12, 0, 1, 0),
    "flux": (1, 18, 13, 34, 7, 9, 0),
    "zimage": (1, 14, 11, 29, 4, 4, 0),
    "llama": (1, 5, 5, 14, 0, 1, 0),
    "sana": (1, 10, 6, 17, 1, 4, 0),
    "pixart": (1, 12, 10, 20, 1, 5, 0),
    "sd3": (1, 17, 14, 37, 7, 6, 0),
    "qwen": (1, 13, 10, 25, 5, 4, 0),
    "wan": (1, 12, 10, 20, 1, 5, 0),
    "ltx": (1, 13, 10, 20, 1, 6, 0),
    "cogvideo": (1, 13, 6, 12, 5, 4, 0),
    "dit": (1, 9, 8, 12, 3, 3, 2),
    "aura": (1, 13, 10, 28, 5, 5, 0),
    "flux2": (1, 16, 12, 28, 4, 7, 0),
    "chroma": (1, 11, 9, 25, 0, 4, 0),
    "hunyuan": (1, 20, 14, 23, 5, 12, 0),
    # The one that is left more is norm_out.linear_2: the final projection, whose output is cut and stacked.
    "lumina": (2, 25, 9, 28, 0, 9, 0),
    "hidream": (15, 28, 9, 34, 0, 6, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_random_folds_change_nothing(name: str) -> None:
    model, kwargs = MODELS[name].tiny()
    model, kwargs = model.double(), as_double(kwargs)
    error, graphs = fold_at_random(model, kwargs)
    found = [each for each, _ in graphs]
    assert error < folded_error(name)
    treatments = Counter(linear.treatment for each in found for linear in each.linears.values())
    regions = [region for each in found for region in each.regions]
    order = ("quantize", "weight_only", "leave", "impossible")
    # Graphs without linears differ between versions of torch.
    with_linears = sum(bool(each.linears) for each in found)
    counts = (with_linears, len(regions), sum(r.foldable for r in regions))
    assert (*counts, *(treatments[t] for t in order)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_remembered_is_what_is_traced(name: str) -> None:
    """Graphs in which equal calls are written down again are those in which each call is traced."""
    model, kwargs = MODELS[name].tiny()
    replayed = 0

    def seen(traced: torch.fx.GraphModule) -> list[tuple]:
        fakes = [(n, n.meta.get("val")) for n in traced.graph.nodes]
        return [
            (n.name, v.shape, v.stride(), v.storage_offset(), v.dtype, v.device)
            for n, v in fakes
            if isinstance(v, torch.Tensor)
        ]

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        nonlocal replayed
        fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        mode = next(f.fake_mode for f in fakes if isinstance(f, torch.Tensor))
        each, once = Retracer(gm, remember=False), Retracer(gm)
        graphs = [
            _torch.trace_pre_dispatch(lambda *args, r=r: r.run(*args), fakes, mode)
            for r in (each, once)
        ]
        assert graphs[0].code == graphs[1].code
        assert seen(graphs[0]) == seen(graphs[1])
        replayed += once.replayed
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(**kwargs)
    assert replayed > 0 or name == "mlp"


class Table(nn.Module):
    """Fills a table through `.data`, as CogVideoX's position embedding does at another size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = x.new_zeros(5, 6)
        table.data[2:].copy_(torch.arange(6.0))
        return self.linear(x + table)


@torch.no_grad()
def test_a_write_through_data_is_seen() -> None:
    model, x, graphs = Table(), torch.randn(5, 6), []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(retrace(gm))
        return graphs[-1].forward

    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert not graphs[0].graph.find_nodes(op="get_attr")


def test_a_value_out_of_sight_is_named() -> None:
    """A value that the tracer did not see is refused with the reason, not baked in."""
    with FakeTensorMode():
        hidden, x = torch.zeros(3), torch.ones(3)
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    gm.table = hidden
    (add,) = gm.graph.find_nodes(op="call_function", target=operator.add)
    with gm.graph.inserting_before(add):
        table = gm.graph.create_node("get_attr", "table")
    add.args = (add.args[0], table)
    gm.recompile()
    gm.graph.find_nodes(op="placeholder")[0].meta["example_value"] = x
    with pytest.raises(GraphError, match="out of the tracer's sight"):
        retrace(gm)
