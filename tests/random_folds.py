"""Every region of a model folded by a random permutation, all at once: nothing may change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from pq_fx.passes import (
    RegionMap,
    find_regions,
    fold_tensors,
    parameter_inputs,
    retrace,
    verify_folds,
)
from pq_fx.statistics import random_fold


def output(result: object) -> torch.Tensor:
    while isinstance(result, (tuple, list)):
        result = result[0]
    for name in ("sample", "logits", "last_hidden_state"):
        if hasattr(result, name):
            return output(getattr(result, name))
    assert isinstance(result, torch.Tensor)
    return result


def as_double(kwargs: dict) -> dict:
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, kwargs
    )


def fold_at_random(
    model: nn.Module, kwargs: dict
) -> tuple[float, list[tuple[RegionMap, dict[str, str]]]]:
    """The relative error of a copy of `model` (fp64) with every region folded, and for each of its graphs what was
    found, and its placeholders' parameters."""
    seen = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        traced = retrace(gm)
        params = parameter_inputs(traced)
        seen.append((traced, params, find_regions(traced, params)))
        return traced.forward

    with torch.no_grad():
        want = output(model(**kwargs))
        assert torch.equal(output(torch.compile(model, backend=backend)(**kwargs)), want)
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    folded = copy.deepcopy(model)
    tensors = dict(folded.named_parameters()) | dict(folded.named_buffers())
    rng = np.random.default_rng(0)
    result = []
    for gm, params, found in seen:
        result.append((found, {n: names[id(t)] for n, t in params.items() if id(t) in names}))
        perms = {r.name: random_fold(r.blocks, rng) for r in found.regions if r.foldable}
        verify_folds(gm, params, found.regions, perms)
        for region in found.regions:
            if region.name in perms:
                own = {a.param: tensors[result[-1][1][a.param]] for a in region.axes}
                for (param, axis), index in fold_tensors(region, perms[region.name], own).items():
                    own[param].data = own[param].data.index_select(axis, index)
    with torch.no_grad():
        got = output(folded(**kwargs))
    return ((got - want).norm() / want.norm()).item(), result
