"""Statistics on disk: one safetensors file, its description as JSON in the header. Nothing in it is executed.

    NAME/count, NAME/calls, NAME/sum_squares, NAME/amax, NAME/keys, NAME/rows     moments of point NAME (observe.py)
    @plan/0, @plan/1, ...                                                         integer arrays of the plan
    header: {"pq_fx_statistics": JSON with "version", "calls", "seeds", "model", "note", "plan"}

A file is written beside its place and renamed, so an interrupted save leaves the older file whole. Equal statistics
give equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pq_fx.errors import CalibrationError
from pq_fx.passes.observe import FIELDS, Moments
from pq_fx.passes.regions import FoldAxis, Point, Region
from pq_fx.plan import GraphFacts, LinearFact, Plan
from pq_fx.statistics import ModelId, Statistics
from pq_fx.storage import atomic_file

VERSION = 1
_HEADER = "pq_fx_statistics"
_PLAN = "@plan/"


def save_statistics(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write the file, in place of an older one.

    Raises:
        CalibrationError: nothing was gathered.
        GraphError: a region of the plan does not fold in one of its graphs.
    """
    if not statistics.calls:
        raise CalibrationError(
            "nothing was gathered yet: there are no statistics to save; call the model inside calibrate()"
        )
    statistics.prove()
    arrays: list[np.ndarray] = []
    header = describe(statistics, arrays)
    tensors = {f"{_PLAN}{i}": torch.from_numpy(a) for i, a in enumerate(arrays)}
    for name, moments in statistics.moments.items():
        for field, value in moments.state().items():
            tensors[f"{name}/{field}"] = value.detach().cpu().contiguous()
    with atomic_file(path) as fresh:
        save_file(tensors, fresh, metadata={_HEADER: json.dumps(header, sort_keys=True)})


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read the file; its tensors are on the CPU.

    Raises:
        CalibrationError: no such file, not one of ours, damaged, or of another version.
    """
    file = Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_HEADER)
            if text is None:
                raise CalibrationError(
                    f"{file} holds no statistics of pq_fx; expected a file that save_statistics wrote"
                )
            header = json.loads(text)
            version = header.get("version") if isinstance(header, dict) else None
            if version != VERSION:
                raise CalibrationError(
                    f"{file} holds statistics of version {version!r}; this release reads {VERSION}: calibrate again"
                )
            # Copies: a mapped tensor is not aligned, and BLAS then sums in another order.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        arrays = [tensors[f"{_PLAN}{i}"].numpy() for i in range(header["arrays"])]
        found = restore(header, arrays)
        for name in header["points"]:
            state = {f: tensors[f"{name}/{f}"] for f in FIELDS if f"{name}/{f}" in tensors}
            found.moments[name] = Moments.from_state(state)
    except FileNotFoundError as error:
        raise CalibrationError(f"there is no file of statistics {file}") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CalibrationError(
            f"{file} cannot be read as statistics ({type(error).__name__}: {error}): it is damaged; calibrate again"
        ) from error
    return found


# The description --------------------------------------------------------------------------------


def describe(statistics: Statistics, arrays: list[np.ndarray]) -> dict[str, Any]:
    """Everything but the moments as plain JSON; integer arrays are appended to `arrays` and named by their number."""
    model = statistics.model
    header = {
        "version": VERSION,
        "calls": statistics.calls,
        "seeds": sorted(statistics.seeds),
        "model": None if model is None else [model.kind, model.shapes, model.values],
        "note": statistics.note,
        "points": list(statistics.moments),
        "plan": [_graph(facts, arrays) for facts in statistics.plan.graphs],
    }
    return header | {"arrays": len(arrays)}


def restore(header: dict[str, Any], arrays: list[np.ndarray]) -> Statistics:
    """The inverse of `describe`, without moments."""
    model = header["model"]
    return Statistics(
        plan=Plan.of(_facts(header["plan"], arrays)),
        calls=int(header["calls"]),
        seeds=frozenset(int(s) for s in header["seeds"]),
        model=None if model is None else ModelId(*model),
        note=dict(header["note"]),
    )


def _graph(facts: GraphFacts, arrays: list[np.ndarray]) -> dict[str, Any]:
    def put(array: np.ndarray) -> int:
        arrays.append(np.ascontiguousarray(array, dtype=np.int64))
        return len(arrays) - 1

    return {
        "params": sorted(facts.params),
        "linears": [
            [f.fqn, f.in_features, f.out_features, f.treatment, f.reason] for f in facts.linears
        ],
        "scale_params": facts.scale_params,
        "regions": [
            {
                "name": r.name,
                "points": [[p.name, p.linears, p.channels, p.absorb, p.one_row] for p in r.points],
                "blocks": put(r.blocks),
                "columns": [[name, put(columns)] for name, columns in r.columns.items()],
                "axes": [[a.param, a.axis, put(a.channels)] for a in r.axes],
                "reasons": list(r.reasons),
                "stream": r.stream,
            }
            for r in facts.regions.values()
        ],
    }


def _facts(graphs: list[dict[str, Any]], arrays: list[np.ndarray]) -> Iterator[GraphFacts]:
    for graph in graphs:
        regions = [
            Region(
                name=r["name"],
                points=tuple(
                    Point(n, tuple(ls), k, absorb, one) for n, ls, k, absorb, one in r["points"]
                ),
                blocks=arrays[r["blocks"]],
                columns={name: arrays[i] for name, i in r["columns"]},
                axes=tuple(FoldAxis(param, axis, arrays[i]) for param, axis, i in r["axes"]),
                reasons=tuple(r["reasons"]),
                stream=r["stream"],
            )
            for r in graph["regions"]
        ]
        linears = tuple(LinearFact(*fact) for fact in graph["linears"])
        yield GraphFacts(
            frozenset(graph["params"]),
            {r.name: r for r in regions},
            linears,
            {point: tuple(params) for point, params in graph["scale_params"].items()},
        )
