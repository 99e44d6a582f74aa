"""What calibration gathered, and how it adds up: over calls, runs and processes.

statistics_file.py stores it, distributed.py sums it over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import fx, nn

from pq_fx.errors import CalibrationError
from pq_fx.passes.moments import Moments
from pq_fx.passes.verify import verify_folds
from pq_fx.plan import Plan, rename_region
from pq_fx.pointwise import PointwiseConv, linearized

# Elements of each parameter that tell one set of weights from another.
_PROBES = 32


@dataclass(frozen=True)
class ModelId:
    """Tells whether statistics belong to a model: its class, the shapes of its parameters, some of their values.

    `values` is None where a parameter had no data (offloaded to the meta device); then values are not compared.
    """

    kind: str
    shapes: str
    values: str | None

    @classmethod
    def of(cls, model: nn.Module) -> ModelId:
        """The model's; reads 32 elements of each parameter, in one transfer from each device."""
        with linearized(model):  # names as calibration sees them
            parameters = list(model.named_parameters())
            shapes = hashlib.sha256()
            probes: dict[torch.device, list[torch.Tensor]] = {}
            for name, p in parameters:
                shapes.update(f"{name} {list(p.shape)}\n".encode())
                stride = max(1, p.numel() // _PROBES)
                flat = p.detach().reshape(-1) if p.is_contiguous() else p.detach().flatten()
                probes.setdefault(p.device, []).append(flat[::stride][:_PROBES].float())
            values: str | None = None
            if not any(p.is_meta for _, p in parameters):
                digest = hashlib.sha256()
                for tensors in probes.values():
                    digest.update(torch.cat(tensors).cpu().numpy().tobytes())
                values = digest.hexdigest()
        return cls(type(model).__name__, shapes.hexdigest(), values)

    def check(self, other: ModelId, what: str) -> None:
        """Raise CalibrationError unless `other`, of a model or of further statistics, is the same model."""
        if self.shapes != other.shapes:
            raise CalibrationError(
                f"{what} belong to another model: they were gathered on a {self.kind}, this is a {other.kind} whose "
                "parameters differ in names or shapes; calibrate this model"
            )
        if None not in (self.values, other.values) and self.values != other.values:
            raise CalibrationError(
                f"{what} belong to other weights of {self.kind}: names and shapes are the same, values are not "
                "(another checkpoint, another dtype, or a LoRA fused since). Load the weights they were gathered on, "
                "or calibrate again"
            )


@dataclass
class Statistics:
    """The plan of the model's regions and the moments of each point, by parameter name.

    Attributes:
        plan: regions and linears.
        moments: of each point, by the name of its first linear's weight.
        calls: whole calls of the model.
        graphs: graphs that were traced in this process.
        seeds: of the samples; statistics that share one cannot be merged.
        model: what it was gathered on; None until the first call.
        inputs: names of the tensors and switches that calls were given (seen.py); empty where that is not known.
        broken: a call came in several graphs, with modules between them that no graph shows.
        note: anything plain that a caller wants to find again in the file, e.g. how far its prompts got.
    """

    plan: Plan = field(default_factory=Plan)
    moments: dict[str, Moments] = field(default_factory=dict)
    calls: int = 0
    graphs: int = 0
    seeds: frozenset[int] = frozenset()
    model: ModelId | None = None
    inputs: frozenset[str] = frozenset()
    broken: bool = False
    note: dict[str, object] = field(default_factory=dict)
    # Each graph with the names of its parameters, to check that folds are closed before anything is changed.
    bound: list[tuple[fx.GraphModule, dict[str, str], dict[str, torch.Size]]] = field(
        default_factory=list
    )
    _proven: int = 0  # of the bound graphs, those that `prove` has walked

    def snapshot(self) -> Statistics:
        """What `restore` needs; values of moments are the journal's to restore."""
        moments, bound = dict(self.moments), list(self.bound)
        return replace(self, plan=self.plan.copy(), moments=moments, bound=bound)

    def restore(self, before: Statistics) -> None:
        """Back to a snapshot; observers that met a graph since must not be used any more."""
        fresh = before.snapshot()
        for f in fields(self):
            setattr(self, f.name, getattr(fresh, f.name))

    def unseen_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Modules of the float model with parameters of which no graph read any.

        None where the model broke the graph: modules in between ran unseen, on values that no permutation reaches.
        """
        if self.broken:
            return ()
        read = frozenset().union(*(facts.params for facts in self.plan.graphs))
        names = {id(p): n for n, p in model.named_parameters()}  # the first name of a tied one
        own = ((m, list(module.parameters(recurse=False))) for m, module in model.named_modules())
        unseen = [m for m, ps in own if m and ps and not any(names[id(p)] in read for p in ps)]
        pointwise = {
            f"{m}.linear" for m, c in model.named_modules() if isinstance(c, PointwiseConv)
        }
        return tuple(m.removesuffix(".linear") if m in pointwise else m for m in unseen)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of two runs on one model, as a new object.

        Raises:
            CalibrationError: they belong to different models, keep different numbers of rows, or were gathered with
                the same seed, so that their samples are not independent.
        """
        check_addable([self, other])
        moments = dict(self.moments)
        for name, theirs in other.moments.items():
            moments[name] = moments[name].merge(theirs) if name in moments else theirs
        return Statistics(
            plan=Plan.of([*self.plan.graphs, *other.plan.graphs]),
            moments=moments,
            calls=self.calls + other.calls,
            graphs=self.graphs + other.graphs,
            seeds=self.seeds | other.seeds,
            model=self.model or other.model,
            inputs=self.inputs | other.inputs,
            broken=self.broken or other.broken,
            note=dict(self.note),
            bound=[*self.bound, *other.bound],
        )

    def check_rows(self, rows: int) -> None:
        """Raise CalibrationError unless its samples have room for `rows` rows, so that more calls can be added."""
        kept = {m.keys.numel() for m in self.moments.values()} - {rows}
        if kept:
            raise CalibrationError(
                f"these statistics keep {kept.pop()} rows a layer and the config says calibration_rows={rows}; "
                "use the same number to go on, or calibrate anew"
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise CalibrationError unless `model` has the parameters that graphs and plan know, of the same shapes."""
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        for _, names, shapes in self.bound:
            for placeholder, name in names.items():
                found = tensors.get(name)
                if found is None or found.shape != shapes[placeholder]:
                    has = "has none" if found is None else f"has one of shape {list(found.shape)}"
                    raise CalibrationError(
                        f"these statistics belong to another model: they know a parameter {name} of shape "
                        f"{list(shapes[placeholder])}, {type(model).__name__} {has}. Calibrate this model"
                    )

        wanted = [
            (a.param, a.axis, a.channels.size) for r in self.plan.regions.values() for a in r.axes
        ]
        for fact in self.plan.linears.values():
            sizes = (fact.out_features, fact.in_features) if fact.treatment != "impossible" else ()
            wanted += [(f"{fact.fqn}.weight", axis, size) for axis, size in enumerate(sizes)]
        for name, axis, size in wanted:
            shape = list(tensors[name].shape) if name in tensors else []
            if axis >= len(shape) or shape[axis] != size:
                raise CalibrationError(
                    f"these statistics do not fit the model: they know {size} channels on axis {axis} of {name}, "
                    f"whose shape in {type(model).__name__} is {shape}. Calibrate this model"
                )

    def check_folds(self, perms: Mapping[str, np.ndarray]) -> None:
        """Walk every graph with `perms` (region name -> permutation) folded; GraphError where unlike channels meet."""
        self._walk(perms, self.bound)

    def prove(self) -> None:
        """Check with random permutations that every region folds, before the graphs are left behind.

        A file and another process get the plan without the graphs; what permutations are chosen there can then not be
        checked on them. Channels are followed by name, so that what holds for a random permutation holds for all.
        """
        random = np.random.default_rng(0)
        perms = {r.name: random_fold(r.blocks, random) for r in self.plan.regions.values()}
        self._walk(perms, self.bound[self._proven :])
        self._proven = len(self.bound)

    def _walk(
        self,
        perms: Mapping[str, np.ndarray],
        bound: list[tuple[fx.GraphModule, dict[str, str], dict[str, torch.Size]]],
    ) -> None:
        for gm, names, shapes in bound:
            placeholders = {fqn: placeholder for placeholder, fqn in names.items()}
            here = [
                rename_region(r, placeholders)
                for r in self.plan.regions.values()
                if r.name in perms and r.axes and all(a.param in placeholders for a in r.axes)
            ]
            own = {placeholders[n]: p for n, p in perms.items() if n in placeholders}
            verify_folds(gm, shapes, here, own)


def random_fold(blocks: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A permutation that moves channels at random, each within its block; those of block -1 stay."""
    perm = np.arange(blocks.size)
    for block in np.unique(blocks[blocks >= 0]):
        held = np.flatnonzero(blocks == block)
        perm[held] = random.permutation(held)
    return perm


def check_addable(parts: list[Statistics]) -> None:
    """Raise CalibrationError unless these statistics may be added up."""
    filled = [p for p in parts if p.calls]
    for i, part in enumerate(filled):
        for earlier in filled[:i]:
            if earlier.model is not None and part.model is not None:
                earlier.model.check(part.model, "the statistics to be added up")
            if shared := earlier.seeds & part.seeds:
                raise CalibrationError(
                    f"both statistics were gathered with seed {min(shared)}: either they hold the same calls, or their "
                    "samples repeat each other's choices. Give each run a seed of its own, "
                    "QuantConfig(..., seed=1); processes of torch.distributed get their own by rank"
                )
