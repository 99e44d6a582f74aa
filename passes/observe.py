"""Calibration statistics of a point: running moments and a uniform sample of rows.

`pq::observe` updates them in place during the user's own calls. Everything adds up: over calls,
over a run that was cut off and goes on (a call that fails is undone, `journal`), and over processes
(`Moments.merge`), because the sample is
a bottom-k sketch: every row ever seen draws a uniform random key, and the rows with the R smallest
keys stay. The union of two sketches is the sketch of the union (Cohen and Kaplan, "Summarizing data
using bottom-k sketches", PODC 2007), so the sample is uniform over all rows of all calls, hence
over all timesteps, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields

import torch
from torch import Tensor, fx

from pq_fx.errors import CalibrationError, GraphError

_MASK = (1 << 64) - 1
# Rows handled at once on a CPU, so that the fp32 copy of a 16-bit activation stays in its cache.
_CPU_ROWS = 256


@dataclass
class Moments:
    """Statistics of one point with K channels, sample of R rows.

    `count`, `calls` and `keys` stay on the CPU, whatever the device of the rest: keys are drawn
    there, so an update of a CUDA tensor never waits for the device. An empty slot of the sample has
    key +inf.
    """

    count: Tensor  # int64 [1], rows seen
    calls: Tensor  # int64 [1], updates done; with the seed it determines the next keys
    sum_squares: Tensor  # float64 [K]
    amax: Tensor  # float32 [K], largest magnitude
    keys: Tensor  # float64 [R]
    rows: Tensor  # float32 (or the activation's dtype) [R, K]

    @classmethod
    def create(
        cls,
        channels: int,
        rows: int = 1024,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Moments:
        """Empty statistics; `dtype` is how sampled rows are stored (the activation's own loses
        nothing)."""
        return cls(
            count=torch.zeros(1, dtype=torch.int64),
            calls=torch.zeros(1, dtype=torch.int64),
            sum_squares=torch.zeros(channels, dtype=torch.float64, device=device),
            amax=torch.zeros(channels, dtype=torch.float32, device=device),
            keys=torch.full((rows,), torch.inf, dtype=torch.float64),
            rows=torch.zeros(rows, channels, dtype=dtype, device=device),
        )

    def update(self, x: Tensor, seed: int) -> None:
        """Add the rows of `x` [..., K]; processes that are merged later need different seeds."""
        observe(x, *self.tensors(), seed)

    def merge(self, other: Moments) -> Moments:
        """The statistics of both, as new tensors on this one's device; associative.

        Raises CalibrationError when the two do not have the same channels and sample size.
        """
        if self.rows.shape != other.rows.shape:
            raise CalibrationError(
                f"cannot merge statistics of shape {list(other.rows.shape)} into "
                f"{list(self.rows.shape)} (rows kept, channels); they belong to "
                "another point or another setting"
            )
        device = self.rows.device
        keys, order = torch.cat([self.keys, other.keys]).sort(stable=True)
        size = self.keys.numel()
        rows = torch.cat([self.rows, other.rows.to(self.rows)])[order[:size].to(device)]
        return Moments(
            count=self.count + other.count,
            calls=self.calls + other.calls,
            sum_squares=self.sum_squares + other.sum_squares.to(device),
            amax=torch.maximum(self.amax, other.amax.to(device)),
            keys=keys[:size],
            rows=rows,
        )

    @property
    def mean_square(self) -> Tensor:
        """E[x_i^2] over all rows seen, float64 [K]; zero when there were none."""
        return self.sum_squares / self.count.clamp(min=1).to(self.sum_squares.device)

    def sample(self) -> Tensor:
        """The rows held [n <= R, K], in order of their keys: every prefix is a uniform sample
        too."""
        order = self.keys.argsort(stable=True)
        held = int(torch.isfinite(self.keys).sum())
        return self.rows[order[:held].to(self.rows.device)]

    def check(self, name: str) -> None:
        """Raise CalibrationError, naming the point, when no rows were seen or some were not
        finite."""
        if int(self.count) == 0:
            raise CalibrationError(
                f"{name}: no activation was seen; run the model inside calibrate(), "
                "or skip this layer by a rule"
            )
        bad = int((~torch.isfinite(self.amax) | ~torch.isfinite(self.sum_squares)).sum())
        if bad:
            raise CalibrationError(
                f"{name}: {bad} of {self.amax.numel()} channels held NaN or infinity during "
                "calibration; find the input that causes it (fp16 overflow?), or skip this layer "
                "by a rule"
            )

    def to(self, device: torch.device | str) -> Moments:
        """The same statistics with what depends on K on `device`."""
        sums, amax, rows = (t.to(device) for t in (self.sum_squares, self.amax, self.rows))
        return Moments(self.count, self.calls, sums, amax, self.keys, rows)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six tensors in the order in which `pq::observe` and the observed graph take them."""
        return self.count, self.calls, self.sum_squares, self.amax, self.keys, self.rows

    def state(self) -> dict[str, Tensor]:
        """Field name -> tensor (not copied), for saving."""
        return dict(zip(FIELDS, self.tensors(), strict=True))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """Inverse of `state`. Raises CalibrationError when fields are missing or do not fit each
        other."""
        missing = [name for name in FIELDS if name not in state]
        if missing:
            raise CalibrationError(
                f"saved statistics lack {', '.join(missing)}; they are damaged or older"
            )
        moments = cls(**{name: state[name] for name in FIELDS})
        rows = moments.rows
        if rows.dim() != 2 or not rows.is_floating_point():
            raise CalibrationError(
                f"saved rows are {rows.dtype} {list(rows.shape)}; calibrate again"
            )
        held, channels = rows.shape
        expected = {
            "count": (torch.int64, (1,)),
            "calls": (torch.int64, (1,)),
            "sum_squares": (torch.float64, (channels,)),
            "amax": (torch.float32, (channels,)),
            "keys": (torch.float64, (held,)),
        }
        for name, (dtype, shape) in expected.items():
            value = state[name]
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise CalibrationError(
                    f"saved statistics do not fit each other: with rows {[held, channels]}, {name} is "
                    f"{value.dtype} {list(value.shape)} and not {dtype} {list(shape)}; calibrate again"
                )
            if bool((value < 0).any()) or (name == "keys" and bool(value.isnan().any())):
                raise CalibrationError(f"saved {name} holds what no call counts; calibrate again")
        return moments


FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Moments))


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
        there = slots.to(rows.device)
        empty = bool(torch.isinf(keys[slots]).all())
        self._overwritten += [
            (rows, there, 0.0 if empty else rows[there]),
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
    """Update statistics in place by the rows of `x` [..., K]; the implementation of `pq::observe`.

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
    rows[slots.to(rows.device)] = flat[new.to(flat.device)].to(rows.dtype)


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
