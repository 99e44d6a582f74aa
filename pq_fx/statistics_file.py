"""Statistics on disk: one safetensors file, its description as JSON in the header. Nothing in it is executed.

    NAME/count, NAME/calls, NAME/sum_squares, NAME/amax, NAME/keys, NAME/rows     moments of point NAME (moments.py)
    @plan/0, @plan/1, ...                                                         integer arrays of the plan
    header: {"pq_fx_statistics": JSON with "version", "calls", "seeds", "model", "note", "plan", "sha256"}

The checksum covers the JSON (without it) and every tensor: a damaged sample would calibrate without an error.
A file is written beside its place and renamed, so an interrupted save leaves the older file whole. Equal statistics
give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pq_fx import strict_json
from pq_fx.errors import CalibrationError
from pq_fx.passes.moments import FIELDS, Moments
from pq_fx.passes.regions import FoldAxis, Point, Region
from pq_fx.passes.scales import Absorber
from pq_fx.plan import GraphFacts, LinearFact, Plan
from pq_fx.seen import names_in
from pq_fx.statistics import ModelId, Statistics
from pq_fx.statistics_check import check_restored
from pq_fx.storage import atomic_file, writing

VERSION = 3
CHECKSUM = "sha256"
HEADER = "pq_fx_statistics"
_PLAN = "@plan/"
# What reading back a description raises that `save_statistics` did not write.
_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError)


def save_statistics(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write the file, in place of an older one.

    Raises:
        CalibrationError: nothing was gathered, or the file cannot be written (an older one is unchanged then).
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
    header[CHECKSUM] = checksum(header, tensors)
    size = partial(sum, (t.nbytes for t in tensors.values()))
    with writing(path, CalibrationError, size), atomic_file(path) as fresh:
        save_file(tensors, fresh, metadata={HEADER: json.dumps(header, sort_keys=True)})


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read the file; its tensors are on the CPU.

    Raises:
        CalibrationError: no such file, not one of ours, damaged, or of another version.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a regular file")
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(HEADER)
            if text is None:
                raise CalibrationError(
                    "it holds no statistics of pq_fx; expected a file that save_statistics wrote"
                )
            header = _header(text)
            # Copies: a mapped tensor is not aligned, and BLAS then sums in another order.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        if header[CHECKSUM] != checksum(header, tensors):
            raise ValueError("its checksum is not the one that it names")
        arrays = [tensors[f"{_PLAN}{i}"].numpy() for i in range(header["arrays"])]
        found = restore(header, arrays)
        for name in header["points"]:
            state = {f: tensors[f"{name}/{f}"] for f in FIELDS if f"{name}/{f}" in tensors}
            found.moments[name] = Moments.from_state(state)
        check_restored(found)
    except FileNotFoundError as error:
        raise CalibrationError(f"there is no file of statistics {file}") from error
    except CalibrationError as error:
        raise CalibrationError(f"{file}: {error}") from error
    except _DAMAGE as error:
        raise CalibrationError(
            f"{file} cannot be read as statistics ({type(error).__name__}: {error}): it is damaged; calibrate again"
        ) from error
    return found


def _header(text: str) -> dict[str, Any]:
    header = strict_json.parse(text)
    if not isinstance(header, dict):
        raise ValueError("its description is no table")
    version, has_one = header.get("version"), CHECKSUM in header
    if type(version) is not int or version != VERSION or not has_one:
        raise CalibrationError(
            f"it holds statistics of version {version!r} (checksum: {'yes' if has_one else 'no'}); this release "
            f"reads {VERSION} (yes): calibrate again"
        )
    return header


def checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the description and of every tensor's name, type and bytes."""
    plain = strict_json.digest({k: v for k, v in header.items() if k != CHECKSUM})
    total = hashlib.sha256(plain.encode())
    for name, value in sorted(tensors.items()):
        total.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


# The description --------------------------------------------------------------------------------


def describe(statistics: Statistics, arrays: list[np.ndarray]) -> dict[str, Any]:
    """Everything but the moments as plain JSON; integer arrays are appended to `arrays` and named by their number."""
    model = statistics.model
    header = {
        "version": VERSION,
        "calls": statistics.calls,
        "seeds": sorted(statistics.seeds),
        "model": None if model is None else [model.kind, model.shapes, model.values],
        "inputs": sorted(statistics.inputs),
        "broken": statistics.broken,
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
        inputs=frozenset(names_in(header["inputs"])),
        broken=bool(header["broken"]),
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
        "absorbers": {n: [astuple(a) for a in own] for n, own in facts.absorbers.items()},
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
            {n: tuple(Absorber(*a) for a in own) for n, own in graph["absorbers"].items()},
        )
