"""Statistics against plain numpy over all rows at once, and the sample's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx

from pq_fx.errors import CalibrationError, GraphError
from pq_fx.passes.moments import FIELDS, Moments
from pq_fx.passes.observe import insert_observers, observe

SHAPES = [(3, 7, 37), (1, 37), (0, 37), (2, 300, 37), (41, 37)]


def batches(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def collect(inputs: list[torch.Tensor], seed: int, rows: int = 16) -> Moments:
    moments = Moments.create(37, rows)
    for x in inputs:
        observe(x, *moments.tensors(), seed)
    return moments


def assert_equal(a: Moments, b: Moments) -> None:
    for name, left, right in zip(FIELDS, a.tensors(), b.tensors(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_equal_those_of_all_rows_at_once(dtype: torch.dtype) -> None:
    inputs = batches(1, dtype)
    moments = collect(inputs, seed=3)
    everything = torch.cat([x.reshape(-1, 37) for x in inputs]).double().numpy()
    assert int(moments.count) == len(everything)
    assert int(moments.calls) == len(SHAPES)
    np.testing.assert_allclose(moments.mean_square, (everything**2).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(moments.amax, np.abs(everything).max(0))
    # Every sampled row is one of the rows, no row twice, in order of keys.
    sample = moments.sample().double().numpy()
    assert sample.shape == (16, 37)
    where = [int(np.flatnonzero((everything == row).all(1))[0]) for row in sample]
    assert len(set(where)) == 16
    assert torch.isfinite(moments.keys).all()


def test_strided_input_and_fewer_rows_than_slots() -> None:
    x = torch.randn(37, 5).T
    moments = Moments.create(37, 16)
    observe(x, *moments.tensors(), 0)
    sample = moments.sample()
    assert sample.shape == (5, 37)
    assert {tuple(r) for r in sample.tolist()} == {tuple(r) for r in x.tolist()}


def test_sample_is_uniform_over_calls_of_unlike_size() -> None:
    # 400 rows in calls of 1, 10 and 389 rows: each row is held with probability 64/400.
    ids = torch.arange(400.0).unsqueeze(1)
    held = np.zeros(400)
    trials = 300
    for seed in range(trials):
        moments = Moments.create(1, 64)
        for part in ids.split([1, 10, 389]):
            observe(part, *moments.tensors(), seed)
        held[moments.sample().squeeze(1).long().numpy()] += 1
    expected = trials * 64 / 400
    assert held.sum() == trials * 64
    sigma = np.sqrt(expected * (1 - 64 / 400))
    assert abs(held[:11].mean() - expected) < 4 * sigma / np.sqrt(11)
    chi2 = float((((held - expected) / sigma) ** 2).mean())
    assert 0.7 < chi2 < 1.3


def test_interrupted_equals_uninterrupted_and_depends_on_the_seed() -> None:
    inputs = batches(2)
    whole = collect(inputs, seed=5)
    part = collect(inputs[:2], seed=5)
    resumed = Moments.from_state({k: v.clone() for k, v in part.state().items()})
    for x in inputs[2:]:
        observe(x, *resumed.tensors(), 5)
    assert_equal(whole, resumed)
    assert not torch.equal(whole.sample(), collect(inputs, seed=6).sample())


def test_merge_is_the_sketch_of_the_union_and_associative() -> None:
    parts = [collect(batches(10 + i), seed=i) for i in range(3)]
    a, b, c = parts
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert torch.equal(left.sample(), right.sample())
    assert torch.equal(left.keys, right.keys)
    torch.testing.assert_close(left.sum_squares, right.sum_squares)
    assert int(left.count) == sum(int(p.count) for p in parts)
    keys = np.sort(np.concatenate([p.keys.numpy() for p in parts]))[:16]
    np.testing.assert_array_equal(left.keys, keys)
    empty = Moments.create(37, 16)
    assert torch.equal(a.merge(empty).sample(), a.sample())
    with pytest.raises(CalibrationError, match="belong to another point"):
        a.merge(Moments.create(36, 16))


def test_errors_name_the_point_and_the_cause() -> None:
    moments = Moments.create(37, 16)
    with pytest.raises(CalibrationError, match=r"blocks\.3.*no activation"):
        moments.check("blocks.3")
    observe(torch.ones(2, 37), *moments.tensors(), 0)
    moments.check("blocks.3")
    x = torch.ones(2, 37)
    x[1, 4], x[0, 9] = torch.nan, torch.inf
    observe(x, *moments.tensors(), 0)
    with pytest.raises(CalibrationError, match=r"blocks\.3: 2 of 37 channels"):
        moments.check("blocks.3")
    with pytest.raises(CalibrationError, match="expected 37 channels"):
        observe(torch.ones(2, 36), *moments.tensors(), 0)
    with pytest.raises(CalibrationError, match="lack keys"):
        Moments.from_state({k: v for k, v in moments.state().items() if k != "keys"})
    with pytest.raises(CalibrationError, match="do not fit"):
        Moments.from_state({**moments.state(), "keys": torch.zeros(15)})


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w) @ v


def test_insert_observers_adds_arguments_and_changes_no_result() -> None:
    gm = fx.symbolic_trace(Twice())
    x, relu = (next(n for n in gm.graph.nodes if n.name == name) for name in ("x", "relu"))
    order = insert_observers(gm, {"w": x, "v": relu}, {"w": 1, "v": 2})
    assert order == ["w", "v"]
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    assert names == ["x", "w", "v", *(f"w_{f}" for f in FIELDS), *(f"v_{f}" for f in FIELDS)]
    gm.graph.eliminate_dead_code()
    assert len([n for n in gm.graph.nodes if n.target is torch.ops.pq.observe.default]) == 2
    a, w, v = torch.randn(5, 37), torch.randn(37, 11), torch.randn(11, 3)
    for seed in (1, 7):  # one graph, two sets of statistics
        first, second = Moments.create(37, 4), Moments.create(11, 4)
        got = gm(a * seed, w, v, *first.tensors(), *second.tensors())
        assert torch.equal(got, Twice()(a * seed, w, v))
        expected = Moments.create(37, 4)
        observe(a * seed, *expected.tensors(), 1)
        assert_equal(first, expected)
        assert torch.equal(second.amax, torch.relu(a * seed @ w).amax(0))
    with pytest.raises(GraphError, match="no seed"):
        insert_observers(gm, {"w": x}, {})


def test_the_op_declares_its_mutations_and_compiles() -> None:
    x = torch.randn(9, 37)
    moments = Moments.create(37, 4)
    torch.library.opcheck(torch.ops.pq.observe.default, (x, *moments.tensors(), 3))

    def f(x: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        torch.ops.pq.observe(x, *state, 3)
        return x + 1

    compiled, expected = Moments.create(37, 4), Moments.create(37, 4)
    torch.compile(f, backend="aot_eager", fullgraph=True)(x, *compiled.tensors())
    observe(x, *expected.tensors(), 3)
    assert_equal(compiled, expected)
