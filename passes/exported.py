"""The same passes on a `torch.export` program, for compilers that take one: no backend, no modules of ours.

Before (pre-dispatch ATen, weights as attributes)       After
    n = aten.layer_norm(x, [K], w, b)                       d, s = pq.norm_quantize(x, "layer", w, b, ..., perm, ...)
    y = aten.linear(n, W, bias)                             y = pq.linear(d, s, ..., W_packed, W_scale, ..., bias)

The result is an ordinary ExportedProgram whose only foreign operations are `torch.ops.pq.*`: `torch.export.save` it,
load it where `pq_fx.kernels.ops` is imported, compile it with whatever compiles ATen.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pq_fx.errors import GraphError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import pack
from pq_fx.kernels.reference import nvfp4_global_scale, permute_rotate, quantize
from pq_fx.passes.choose import PointChoice, Settings, choose
from pq_fx.passes.evaluate import GLOBAL_SCALE_ROOM
from pq_fx.passes.fold import axis_index, fold_tensors
from pq_fx.passes.lower import REWRITES, Rewrite, lower
from pq_fx.passes.moments import Moments
from pq_fx.passes.observe import observe
from pq_fx.passes.regions import Point, Region, RegionMap, find_regions
from pq_fx.passes.verify import verify_folds, verify_graph

pq = torch.ops.pq


def quantize_exported(
    program: torch.export.ExportedProgram,
    calibration: Iterable[Sequence[Any]],
    settings: Settings,
    *,
    dynamic_shapes: Any = None,
    rows: int = 1024,
    seed: int = 0,
    carrier: str = "codes",
    rewrites: Sequence[Rewrite] = REWRITES,
) -> torch.export.ExportedProgram:
    """Quantize an exported program (`torch.export.export(model, ..., strict=False)`); the given one is unchanged.

    `calibration` yields tuples of positional arguments; `settings` are as for `choose`; `dynamic_shapes` are those of
    the new program, as for `torch.export.export`; `rows` and `seed` configure the sample; `carrier` is the form of
    quantized activations (kernels/carriers.py), "e4m3" for a GPU with fp8 tensor cores; `rewrites` are what lowering
    applies. Raises GraphError when nothing can be quantized, CalibrationError when the calibration data is missing or
    not finite.
    """
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    # The program's own tensors are shared with `gm`; parameters that move are replaced there, never written to.
    params = {n.name: _attribute(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}
    found = find_regions(gm, params)
    found.regions = [
        r
        for r in (_quantizable(region, found, settings) for region in found.regions)
        if r is not None
    ]
    if not found.regions:
        raise GraphError("the exported program holds no linear that can be quantized")
    moments, arguments = _watch(gm, found, calibration, rows, seed)
    choices = {}
    for region in found.regions:
        weights = {name: params[name].detach() for p in region.points for name in p.linears}
        own = replace(settings, activation=None) if region.points[0].one_row else settings
        choices[region.name] = choose(region, moments, weights, own)
    perms = {name: c.fold for name, c in choices.items() if c.fold is not None}
    verify_folds(gm, params, found.regions, perms)
    with torch.no_grad():
        _fold(gm, found, perms, params)
        for region in found.regions:
            for point in region.points:
                columns = region.columns[point.name]
                fold = perms.get(region.name)
                sample = moments[point.name].sample()
                if fold is not None:
                    sample = sample[:, torch.from_numpy(axis_index(columns, fold))]
                _rewrite_point(
                    gm,
                    found,
                    point,
                    choices[region.name].points[point.name],
                    settings,
                    sample,
                    params,
                    carrier,
                )
    gm.graph.eliminate_dead_code()
    _drop_unused(gm)
    gm.recompile()
    rewritten = _export(gm, arguments, dynamic_shapes).module(check_guards=False)
    assert isinstance(rewritten, fx.GraphModule)
    lower(rewritten, rewrites)
    verify_graph(rewritten)
    return _export(rewritten, arguments, dynamic_shapes)


def _export(
    gm: fx.GraphModule, arguments: Sequence[Any], dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(
            gm, tuple(arguments), dynamic_shapes=dynamic_shapes, strict=False
        )


def _attribute(gm: fx.GraphModule, target: str) -> Tensor:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _quantizable(region: Region, found: RegionMap, settings: Settings) -> Region | None:
    """The region with the points whose linears are to be quantized and fit the formats."""
    points = []
    for point in region.points:
        linear = found.linears[point.name]
        formats = [settings.weight] + (
            [settings.activation] if settings.activation and not point.one_row else []
        )
        fits = all(not f.group_size or point.channels % f.group_size == 0 for f in formats)
        if linear.treatment != "leave" and fits:
            points.append(point)
    if not points:
        return None
    columns = region.columns if region.foldable else {p.name: np.arange(p.channels) for p in points}
    return replace(region, points=tuple(points), columns={p.name: columns[p.name] for p in points})


def _watch(
    gm: fx.GraphModule, found: RegionMap, calibration: Iterable[Sequence[Any]], rows: int, seed: int
) -> tuple[dict[str, Moments], Sequence[Any]]:
    """Run the float program and gather the points' statistics; also returns the last arguments."""
    moments = {
        p.name: Moments.create(p.channels, rows=rows) for r in found.regions for p in r.points
    }
    watched: dict[fx.Node, list[str]] = {}
    for name in moments:
        watched.setdefault(found.sources[name], []).append(name)

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            for name in watched.get(n, ()):
                observe(value, *moments[name].tensors(), seed)
            return value

    arguments: Sequence[Any] = ()
    with torch.no_grad():
        for arguments in calibration:
            Watcher(gm).run(*arguments)
    return moments, arguments


def _fold(
    gm: fx.GraphModule, found: RegionMap, perms: dict[str, np.ndarray], params: dict[str, Tensor]
) -> None:
    targets = {n.name: str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for region in found.regions:
        if region.name in perms:
            for (param, axis), index in fold_tensors(region, perms[region.name], params).items():
                params[param] = params[param].detach().index_select(axis, index)
                parent, _, leaf = targets[param].rpartition(".")
                owner = gm.get_submodule(parent)
                if leaf in owner._parameters:
                    owner._parameters[leaf] = torch.nn.Parameter(params[param], requires_grad=False)
                else:
                    owner._buffers[leaf] = params[param]


def _rewrite_point(
    gm: fx.GraphModule,
    found: RegionMap,
    point: Point,
    own: PointChoice,
    settings: Settings,
    sample: Tensor,
    params: dict[str, Tensor],
    carrier: str,
) -> None:
    """Replace the point's linears by packed ones that read one quantizer."""
    graph = gm.graph
    perm = None if own.perm is None else torch.from_numpy(own.perm).to(torch.int32)
    activation = None if point.one_row else settings.activation
    quantized: tuple[fx.Node, fx.Node] | None = None
    global_scale: fx.Node | None = None
    for name in point.linears:
        linear = found.linears[name]
        node, fmt = linear.node, settings.weight
        weight = permute_rotate(params[name].detach().float(), perm, own.rotation)
        q = quantize(weight, fmt, global_scale=_tensor_scale(weight, fmt, 1.0))
        with graph.inserting_before(node):
            if activation is not None and quantized is None:
                room = permute_rotate(sample.float(), perm, own.rotation)
                global_scale = _buffer(
                    gm, f"pq_{name}_input_scale", _tensor_scale(room, activation, GLOBAL_SCALE_ROOM)
                )
                order = _buffer(gm, f"pq_{name}_perm", perm)
                clip = None
                if own.clip != 1.0:
                    clip = _buffer(gm, f"pq_{name}_clip", torch.tensor(own.clip))
                arguments = (
                    node.args[0],
                    order,
                    global_scale,
                    clip,
                    activation.key,
                    own.rotation,
                    carrier,
                )
                call = graph.call_function(pq.quantize.default, arguments)
                quantized = (
                    graph.call_function(operator.getitem, (call, 0)),
                    graph.call_function(operator.getitem, (call, 1)),
                )
            packed = _buffer(gm, f"pq_{name}", pack(q.codes, fmt))
            scale = _buffer(gm, f"pq_{name}_scale", q.scale.contiguous())
            tensor_scale = _buffer(gm, f"pq_{name}_global", q.global_scale)
            bias = node.args[2] if len(node.args) > 2 else None
            if activation is None or quantized is None:
                new = graph.call_function(
                    pq.linear_weight_only.default,
                    (node.args[0], packed, scale, tensor_scale, fmt.key, bias),
                )
            else:
                data, activation_scale = quantized
                new = graph.call_function(
                    pq.linear.default,
                    (
                        data,
                        activation_scale,
                        global_scale,
                        activation.key,
                        packed,
                        scale,
                        tensor_scale,
                        fmt.key,
                        bias,
                        node.meta["val"].dtype,
                    ),
                )
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _tensor_scale(values: Tensor, fmt: Format, room: float) -> Tensor | None:
    return nvfp4_global_scale(values.abs().amax() * room) if fmt.two_level else None


def _buffer(gm: fx.GraphModule, name: str, tensor: Tensor | None) -> fx.Node | None:
    if tensor is None:
        return None
    gm.register_buffer(name, tensor)
    return gm.graph.get_attr(name)


def _drop_unused(gm: fx.GraphModule) -> None:
    """Delete the float weights that no node reads any more."""
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in [*gm.named_parameters(), *gm.named_buffers()]]:
        if name not in used:
            parent, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(parent), leaf)
