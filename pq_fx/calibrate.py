"""Calibration: the model runs as the user calls it, through graphs that watch their points.

The observing backend retraces each graph that Dynamo hands it, finds its regions, inserts observers and runs it as it
is, without Inductor. Statistics are kept per parameter, not per graph: one graph may serve many blocks, and a new
resolution makes a new graph of the same parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from pq_fx.errors import CalibrationError
from pq_fx.passes import _torch, observe, verify
from pq_fx.passes.moments import Moments
from pq_fx.passes.regions import RegionMap, find_regions
from pq_fx.passes.retrace import parameter_inputs, retrace, stored_tensors
from pq_fx.passes.select import LINEAR, ancestry
from pq_fx.statistics import Statistics

log = logging.getLogger("pq_fx")


class Observer:
    """A Dynamo backend that watches a float model. `rows` and `seed` configure the reservoirs of rows."""

    def __init__(self, model: nn.Module, statistics: Statistics, rows: int, seed: int) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._alive = [t for _, t in tensors]  # so that no id is reused
        self.names = stored_tensors(model)
        self.model: nn.Module | None = model
        self.ran = False  # a graph of this call of the model
        # Tensors without a norm or attention before them, and whether a linear is: what reads them may be an embedder.
        self.raw: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.statistics = statistics
        self.rows = rows
        self.seed = seed

    def close(self) -> None:
        """Let go of the model: Dynamo keeps compiled graphs, hence this object, after the last call."""
        self._alive.clear()
        self.names.clear()
        self.model = None

    def begin(self, inputs: Iterable[torch.Tensor]) -> None:
        """A call of the model begins, with these tensors."""
        self.ran = False
        self.raw.clear()
        self.raw.update(dict.fromkeys(inputs, False))

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> ObservedGraph:
        """Compile one graph for observation."""
        traced = retrace(gm)
        params = {n: t for n, t in parameter_inputs(traced).items() if id(t) in self.names}
        resumes, breaks = _torch.dynamo_piece()
        whole = _torch.dynamo_root() is self.model
        if _torch.dynamo_wrapped() is self.model:
            # A hook breaks the graph before and after the forward that it wraps: in between is the whole model.
            whole, resumes, breaks = True, False, False
        inner = resumes or (self.ran and not whole)
        inputs = {n.name: _torch.dynamo_value(n) for n in traced.graph.find_nodes(op="placeholder")}
        hidden = {
            n: t not in self.raw
            for n, t in inputs.items()
            if inner and isinstance(t, torch.Tensor) and n not in params and self.raw.get(t, True)
        }
        piece = hidden if inner or breaks else None
        found = find_regions(traced, params, piece, ends=not breaks)
        self.statistics.graphs += 1
        log.info(
            "graph %d: %d linears, %d regions",
            self.statistics.graphs,
            len(found.linears),
            len(found.regions),
        )
        index = {name: i for i, name in enumerate(inputs)}
        raw = raw_outputs(traced, hidden)
        seeds = {p.name: self.seed for r in found.regions for p in r.points}
        order = observe.insert_observers(traced, found.sources, seeds)
        verify.verify_graph(traced)
        for node in traced.graph.find_nodes(op="placeholder"):
            # Dynamo's record of the real arguments would keep the float weights alive after conversion.
            node.meta.pop("grapharg", None)
        return ObservedGraph(self, traced, found, {n: index[n] for n in params}, order, raw)


def raw_outputs(gm: fx.GraphModule, hidden: Mapping[str, bool]) -> dict[int, bool]:
    """Positions of the outputs without a norm or attention before them, and whether a linear is."""
    after_linear, after_mixing = ancestry(gm, hidden)
    values = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    if not isinstance(values, (list, tuple)):
        return {}
    return {
        i: after_linear[v] or v.target is LINEAR
        for i, v in enumerate(values)
        if isinstance(v, fx.Node) and not after_mixing[v]
    }


class ObservedGraph:
    """Runs an observed graph with the moments that belong to the parameters of this very call."""

    def __init__(
        self,
        observer: Observer,
        gm: fx.GraphModule,
        found: RegionMap,
        params: dict[str, int],
        order: list[str],
        raw: dict[int, bool],
    ) -> None:
        self.observer = observer
        self.gm = gm
        self.found = found
        self.params = params
        self.order = order
        self.raw = raw
        self.bound: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the graph on the caller's arguments, parameters among them."""
        key = tuple(id(args[i]) for i in self.params.values())
        tensors = self.bound.get(key)
        if tensors is None:
            tensors = self.bound[key] = self._bind(args)
        result = self.gm(*args, *tensors)
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """The graph ran, observed or not: the pieces that follow learn what its outputs are made of."""
        self.observer.ran = True
        self.observer.raw.update(
            {result[i]: v for i, v in self.raw.items() if isinstance(result[i], torch.Tensor)}
        )

    def _bind(self, args: Sequence[Any]) -> list[torch.Tensor]:
        observer = self.observer
        moments = observer.statistics.moments
        names = {}
        for placeholder, i in self.params.items():
            name = observer.names.get(id(args[i]))
            if name is None:
                raise CalibrationError(
                    f"parameter {placeholder} ({tuple(args[i].shape)}) of the running graph does not belong to the "
                    "model that is being calibrated. Either a parameter was replaced while calibrating, or several "
                    "models or blocks of one class, which share compiled code, were compiled with "
                    "calibration_steps: quantize the whole model with pq_fx.prepare, calibrate, convert instead"
                )
            names[placeholder] = name
        points = observer.statistics.plan.add(self.found, names, frozenset(names.values()))
        shapes = {placeholder: args[i].shape for placeholder, i in self.params.items()}
        observer.statistics.bound.append((self.gm, names, shapes))
        tensors: list[torch.Tensor] = []
        for point in self.order:
            name = points[point]
            device = args[self.params[point]].device
            if name not in moments:
                channels = self.found.linears[point].in_features
                with torch.inference_mode(False):  # else no later call outside it could update them
                    moments[name] = Moments.create(channels, rows=observer.rows, device=device)
            elif moments[name].device != device:  # read from a file, or the model has moved
                moments[name] = moments[name].to(device)
            tensors += moments[name].tensors()
        return tensors
