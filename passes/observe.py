"""Observing: `pq::observe` in a graph updates the statistics of a point during the user's own calls.

Each row draws a random key (passes/moments.py); of the old and the new rows together those with the smallest keys
stay. A call that fails is undone by its `journal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, fx

from pq_fx.errors import CalibrationError, GraphError
from pq_fx.passes.moments import FIELDS

_MASK = (1 << 64) - 1
# Rows handled at once on a CPU, so that the fp32 copy of a 16-bit activation stays in its cache.
_CPU_ROWS = 256


class Journal:
    """What updates overwrote since `journal()` was opened, so that a call that fails leaves no trace.

    It holds the sums of each point and the sampled rows that newer ones replaced: none at the first call, of R rows
    about R / c at the c-th call of equal size.
    """

    def __init__(self) -> None:
        self._overwritten: list[tuple[Tensor, Tensor | None, Tensor | float]] = []

    def keep(self, *tensors: Tensor) -> None:
        """Note whole tensors before they change."""
        self._overwritten += [(t, None, t.clone()) for t in tensors]

    def keep_slots(self, keys: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Note slots [s] of the sample before they change; rows of empty slots are zero."""
        empty = bool(torch.isinf(keys[slots]).all())
        self._overwritten += [
            (rows, slots, 0.0 if empty else rows[slots]),
            (keys, slots, keys[slots]),
        ]

    def undo(self) -> None:
        """Put everything back."""
        while self._overwritten:
            tensor, index, old = self._overwritten[-1]
            if index is None:
                tensor.copy_(old)  # type: ignore[arg-type]
            else:
                tensor[index] = old
            self._overwritten.pop()  # after the write: an interrupted undo can be repeated


_journal: ContextVar[Journal | None] = ContextVar("journal", default=None)


@contextmanager
def journal() -> Iterator[Journal]:
    """While open, updates of this thread can be undone."""
    token = _journal.set(Journal())
    try:
        opened = _journal.get()
        assert opened is not None
        yield opened
    finally:
        _journal.reset(token)


def observe(
    x: Tensor,
    count: Tensor,
    calls: Tensor,
    sum_squares: Tensor,
    amax: Tensor,
    keys: Tensor,
    rows: Tensor,
    seed: int,
) -> None:
    """Update statistics (`Moments.tensors`) in place by the rows of `x` [..., K]; implements `pq::observe`.

    Processes whose statistics are merged later need different seeds.
    Raises CalibrationError when `x` does not have K channels.
    """
    channels = sum_squares.numel()
    if x.shape[-1] != channels:
        raise CalibrationError(
            f"expected {channels} channels, found an activation of shape {list(x.shape)}"
        )
    flat = x.detach().reshape(-1, channels)
    n = flat.shape[0]
    fresh = torch.rand(n, dtype=torch.float64, generator=_generator(seed, int(calls)))
    opened = _journal.get()
    if opened is not None:
        opened.keep(count, calls, sum_squares, amax)
    calls += 1
    if n == 0:
        return
    count += n
    for part in flat.split(_CPU_ROWS if flat.device.type == "cpu" else n):
        wide = part.float()
        sum_squares += wide.square().sum(dim=0)
        torch.maximum(amax, wide.abs().amax(dim=0), out=amax)
    taken = (fresh < keys.max()).nonzero().squeeze(1)
    if taken.numel() == 0:
        return
    size = keys.numel()
    # Of the old and the new keys together the smallest stay; a new row takes the slot of an old one
    # that leaves.
    stay = torch.cat([keys, fresh[taken]]).argsort(stable=True)[:size]
    leaves = torch.ones(size, dtype=torch.bool)
    leaves[stay[stay < size]] = False
    new = taken[(stay[stay >= size] - size).sort().values]
    slots = leaves.nonzero().squeeze(1)
    if opened is not None:
        opened.keep_slots(keys, rows, slots)
    keys[slots] = fresh[new]
    rows[slots] = flat[new.to(flat.device)].to("cpu", rows.dtype)


def _generator(seed: int, call: int) -> torch.Generator:
    """A CPU generator for one call: splitmix64 of (seed, call), so that a resumed run draws the
    same keys."""
    z = (seed * 0x9E3779B97F4A7C15 + (call + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return torch.Generator().manual_seed((z ^ (z >> 31)) >> 1)


_LIBRARY = torch.library.Library("pq", "FRAGMENT")
_LIBRARY.define(
    "observe(Tensor x, Tensor(a!) count, Tensor(b!) calls, Tensor(c!) sum_squares, "
    "Tensor(d!) amax, Tensor(e!) keys, Tensor(f!) rows, int seed) -> ()"
)
_LIBRARY.impl("observe", observe, "CPU")
_LIBRARY.impl("observe", observe, "CUDA")
torch.library.register_fake("pq::observe", lambda *args: None, lib=_LIBRARY)


def insert_observers(
    gm: fx.GraphModule, sources: Mapping[str, fx.Node], seeds: Mapping[str, int]
) -> list[str]:
    """Observe each point's tensor; `sources` maps point names to nodes of `gm`, `seeds` to int
    seeds.

        before   def forward(self, x, w):
                     h = gelu(x); return linear(h, w)
        after    def forward(self, x, w, w_count, w_calls, w_sum_squares, w_amax, w_keys, w_rows):
                     h = gelu(x); observe(h, w_count, ..., w_rows, seed); return linear(h, w)

    Statistics are arguments and not attributes, because one graph may serve many blocks: the caller
    appends `moments.tensors()` of the right parameter, in the order of points that is returned.
    Raises GraphError when a source is not a node of this graph or has no seed. `gm` is changed in
    place and recompiled.
    """
    nodes = list(gm.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for point, node in sources.items():
        if node not in order:
            raise GraphError(f"point {point}: node {node.name} is not in the graph to observe")
        if point not in seeds:
            raise GraphError(f"point {point} has no seed; give every point one")
    body = next(node for node in nodes if node.op != "placeholder")
    for point, node in sources.items():
        with gm.graph.inserting_before(body):
            state = [gm.graph.placeholder(f"{point}_{name}") for name in FIELDS]
        # Right after the source, but behind all placeholders, which come first in a graph.
        before = body if node.op == "placeholder" else nodes[order[node] + 1]
        with gm.graph.inserting_before(before):
            gm.graph.call_function(torch.ops.pq.observe.default, (node, *state, seeds[point]))
    gm.graph.lint()
    gm.recompile()
    return list(sources)
