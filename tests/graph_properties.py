"""What must hold for any graph: folding changes nothing, a broken fold is refused, observers and lowering are exact."""

from __future__ import annotations

import copy
import operator
from collections import Counter

import numpy as np
import torch
from graphs import Network
from torch import Tensor, fx

from pq_fx.errors import GraphError
from pq_fx.kernels.formats import get_format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import permute_rotate, quantize
from pq_fx.passes import Moments, find_regions, fold_tensors, insert_observers, lower, verify_folds
from pq_fx.passes.regions import Region, RegionMap

pq = torch.ops.pq
FOLD_ERROR = (
    1e-12  # relative, in fp64; 1e-15 is usual, deep products of tiny norms lose three digits more
)


def relative(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest relative error among outputs."""
    return max(
        float((g - w).norm() / w.norm().clamp(min=1e-30)) for g, w in zip(got, want, strict=True)
    )


def shuffled(region: Region, rng: np.random.Generator) -> np.ndarray:
    """A random permutation within the region's blocks."""
    perm = np.arange(region.blocks.size)
    for block in np.unique(region.blocks[region.blocks >= 0]):
        where = np.flatnonzero(region.blocks == block)
        perm[where] = rng.permutation(where)
    return perm


def fold(
    params: dict[str, Tensor], names: dict[str, str], region: Region, perm: np.ndarray
) -> None:
    """Fold one region's permutation into `params` (by name) in place of the old tensors."""
    own = {a.param: params[names[a.param]] for a in region.axes}
    for (param, axis), index in fold_tensors(region, perm, own).items():
        params[names[param]] = params[names[param]].index_select(axis, index)


def check(net: Network, seed: int, counts: Counter) -> None:
    """All properties of one network; raises AssertionError. Adds what it saw to `counts`."""
    rng = np.random.default_rng(seed)
    gm, names = net.trace(torch.float64)
    counts.update(f"op {n.target}" for n in gm.graph.nodes if n.op == "call_function")
    params, inputs = net.parameters(seed, torch.float64), net.arguments(seed, torch.float64)
    want = net.run(params, inputs)
    held = {placeholder: params[name] for placeholder, name in names.items()}
    found = find_regions(gm, held)
    perms = {r.name: shuffled(r, rng) for r in found.regions if r.foldable}
    counts["points"] += sum(len(r.points) for r in found.regions)
    counts["foldable points"] += sum(len(r.points) for r in found.regions if r.foldable)

    # 1. Random permutations in all regions at once change nothing, and the check of folds accepts them.
    verify_folds(gm, held, found.regions, perms)
    folded = dict(params)
    for region in found.regions:
        if region.name in perms:
            fold(folded, names, region, perms[region.name])
    error = relative(net.run(folded, inputs), want)
    assert error <= FOLD_ERROR, f"folding changed the result by {error:.1e}"

    # 2. A fold that forgets one axis is refused wherever it changes the result.
    for region in found.regions:
        if region.name in perms and len(region.axes) > 1:
            drop = int(rng.integers(len(region.axes)))
            axes = tuple(a for i, a in enumerate(region.axes) if i != drop)
            broken = Region(region.name, region.points, region.blocks, region.columns, axes)
            wrong = dict(params)
            fold(wrong, names, broken, perms[region.name])
            if relative(net.run(wrong, inputs), want) > 1e-9:
                counts["broken folds"] += 1
                try:
                    verify_folds(gm, held, [broken], perms)
                except GraphError:
                    continue
                raise AssertionError(f"a fold without {region.axes[drop].param} was accepted")

    # 3. Observers see every point and change nothing.
    flat = [*params.values(), *inputs]
    before = gm(*flat)
    observed = copy.deepcopy(gm)
    nodes = {n.name: n for n in observed.graph.nodes}
    sources = {p: nodes[n.name] for p, n in found.sources.items()}
    order = insert_observers(observed, sources, dict.fromkeys(sources, 0))
    moments = {p: Moments.create(found.linears[p].in_features, rows=4) for p in order}
    after = observed(*flat, *(t for p in order for t in moments[p].tensors()))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(int(m.count) > 0 for m in moments.values())


def check_lowering(net: Network, seed: int, counts: Counter) -> None:
    """Quantized with random orders, a graph gives the same numbers before and after lowering."""
    gm, names = net.trace(torch.float32)
    params, inputs = net.parameters(seed, torch.float32), net.arguments(seed, torch.float32)
    found = find_regions(gm, {placeholder: params[n] for placeholder, n in names.items()})
    replaced = insert_quantizers(gm, found, {p: params[n] for p, n in names.items()}, seed)
    if not replaced:
        return
    flat = [*params.values(), *inputs]
    want = gm(*flat)
    lowered = lower(gm)
    got = gm(*flat)
    counts["lowered: shared"] += lowered.shared
    counts["lowered: norms"] += lowered.norms
    counts["lowered: acts"] += lowered.acts
    # fp32 sums in another order may move a value over a rounding boundary: one step of one code.
    exact = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    counts["lowered: equal bits"] += exact
    counts["lowered graphs"] += 1
    assert exact or relative(got, want) < 0.05, (
        f"lowering changed the result by {relative(got, want)}"
    )


def insert_quantizers(
    gm: fx.GraphModule, found: RegionMap, params: dict[str, Tensor], seed: int
) -> int:
    """Replace the points' linears by `pq.quantize` and `pq.linear`, one quantizer a linear, as modules do."""
    fmt, count = get_format("int4", 16), 0
    generator = torch.Generator().manual_seed(seed)
    for region in found.regions:
        for point in region.points:
            if point.channels % 16 or found.linears[point.name].treatment == "leave":
                continue
            perm = torch.randperm(point.channels, generator=generator).to(torch.int32)
            gm.register_buffer(f"perm_{point.name}", perm)
            with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                order = gm.graph.get_attr(f"perm_{point.name}")
            for name in point.linears:
                q = quantize(permute_rotate(params[name], perm, 0), fmt)
                gm.register_buffer(f"codes_{name}", pack(q.codes, fmt))
                gm.register_buffer(f"scale_{name}", q.scale.contiguous())
                node = found.linears[name].node
                with gm.graph.inserting_before(node):
                    weight = gm.graph.get_attr(f"codes_{name}")
                    scale = gm.graph.get_attr(f"scale_{name}")
                    call = gm.graph.call_function(
                        pq.quantize.default, (node.args[0], order, None, None, fmt.key, 0, "codes")
                    )
                    data, steps = (
                        gm.graph.call_function(operator.getitem, (call, i)) for i in (0, 1)
                    )
                    bias = node.args[2] if len(node.args) > 2 else None
                    new = gm.graph.call_function(
                        pq.linear.default,
                        (data, steps, None, fmt.key, weight, scale, None, fmt.key, bias, torch.float32),
                    )  # fmt: skip
                new.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
                count += 1
    gm.recompile()
    return count
