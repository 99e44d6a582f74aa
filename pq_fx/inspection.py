"""`inspect`: what quantizing a model would do, found without weights and without running a tensor operation.

The model is copied to the meta device, traced by Dynamo and searched for regions by the same passes as in calibration;
what each linear would become is decided by the same function as in conversion (`pq_fx.decide`). Which permutations
pay is decided by calibration data, so `absorb` says where a permutation of that input would go.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx, nn

from pq_fx.config import QuantConfig
from pq_fx.decide import Decision, decide
from pq_fx.errors import GraphError
from pq_fx.inspection_report import Inspection, LinearInspection
from pq_fx.kernels.formats import Format
from pq_fx.passes import _torch
from pq_fx.passes.nodes import shape_of, source
from pq_fx.passes.regions import find_regions
from pq_fx.passes.retrace import parameter_inputs, retrace, stored_tensors
from pq_fx.plan import LinearFact, Plan
from pq_fx.pointwise import linearized

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default}


def inspect(
    model: nn.Module,
    *args: Any,
    config: QuantConfig | str | dict[str, Any] | None = None,
    real: bool = False,
    **kwargs: Any,
) -> Inspection:
    """Say what quantizing `model` would do, from one call `model(*args, **kwargs)` on tensors without values.

    `config` is as for `pq_fx.prepare`. The model is left as it is; its parameters are not copied. With `real` the call
    is made on the model itself, for one whose forward reads values on the host (token counts of experts, lengths of
    masks). Raises ConfigError for a wrong setting, GraphError when the model needs values or shows no linear.
    """
    start, settings = time.perf_counter(), QuantConfig.of(config)
    watched = model if real else without_weights(model)
    if not real:
        args, kwargs = _to_meta(args), _to_meta(kwargs)
    with linearized(watched):
        looker = _Looker(watched)
        compiled = torch.compile(watched, backend=looker, dynamic=False)
        with torch.no_grad(), _torch.every_graph(), _torch.graph_breaks() as breaks:
            try:
                compiled(*args, **kwargs)
                if looker.graphs > 1:
                    # A first call may fill a cache in a way that breaks the graph (Z-Image's table of rotations).
                    looker = _Looker(watched)  # another backend: Dynamo traces anew
                    breaks.clear()
                    torch.compile(watched, backend=looker, dynamic=False)(*args, **kwargs)
            except GraphError:
                raise
            except Exception as error:
                inner = getattr(error, "inner_exception", error)
                if isinstance(inner, GraphError):
                    raise inner from None
                if real:
                    raise
                raise GraphError(
                    f"{type(model).__name__} could not be traced without weights ({_first_line(error)}); if its "
                    "forward reads values on the host, inspect it with real weights (real=True, --real); otherwise "
                    "check the inputs"
                ) from error
        if not looker.plan.linears:
            raise GraphError(f"{type(model).__name__} has no linear that the graph shows")
        return looker.result(type(model).__name__, settings, time.perf_counter() - start, breaks)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are on the meta device; no weight is copied.

    A model that is on the meta device already is returned itself.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.device.type == "meta" for t in tensors):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)


def _to_meta(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), value)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


@dataclass
class _Gemm:
    """A product with a parameter: `weight` is the placeholder's name."""

    weight: str
    flops: int
    rows: int
    shape: tuple[int, ...]


@dataclass
class _Looker:
    """A Dynamo backend that looks at every graph and adds up products per parameter, as the calls come."""

    model: nn.Module
    plan: Plan = field(default_factory=Plan)
    flops: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attention_flops: int = 0
    graphs: int = 0
    bound: set[tuple[int, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names = stored_tensors(self.model)

    def __call__(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        traced = retrace(gm)
        params = {n: t for n, t in parameter_inputs(traced).items() if id(t) in self.names}
        found = find_regions(traced, params)
        index = {n.name: i for i, n in enumerate(traced.graph.find_nodes(op="placeholder"))}
        gemms, attention = products(traced, set(params))
        run = gm.forward

        def call(*args: Any) -> Any:
            self.graphs += 1
            key = (id(gm), *(id(args[index[n]]) for n in params))
            names = {n: self.names[id(args[index[n]])] for n in params}
            if key not in self.bound:
                self.bound.add(key)
                self.plan.add(found, names, frozenset(names.values()))
            self.attention_flops += attention
            for gemm in gemms:
                name = names[gemm.weight]
                self.flops[name] = self.flops.get(name, 0) + gemm.flops
                self.shapes[name] = gemm.shape
            return run(*args)

        return call

    def result(
        self, model: str, config: QuantConfig, seconds: float, breaks: dict[str, int]
    ) -> Inspection:
        """Decide about every linear and sum up."""
        modules = dict(self.model.named_modules())
        numbered = {n for n, m in modules.items() if isinstance(m, nn.ModuleList)}
        where: dict[str, tuple[str | None, str | None, str | None]] = {}
        for region in self.plan.regions.values():
            for point in region.points:
                absorb = region.fold_name if region.foldable else point.absorb
                where.update({name: (region.name, point.name, absorb) for name in point.linears})
        rows = []
        for name, flops in self.flops.items():
            fqn = name.removesuffix(".weight")
            shape = self.shapes[name]
            fact = self.plan.linears.get(fqn)
            if fact is None:
                fact = LinearFact(fqn, prod(shape[1:]), shape[0], "leave", "it is not a linear")
                decision = Decision(skip_reason=_not_linear(shape))
            else:
                decision = decide(fact, config, modules.get(fqn))
            region_name, point_name, place = where.get(name, (None, None, None))
            kept = decision.config is not None
            treatment = "leave" if not kept else fact.treatment
            if kept and treatment != "weight_only":
                treatment = "quantize" if decision.activation is not None else "weight_only"
            rows.append(
                LinearInspection(
                    fqn=fqn,
                    in_features=fact.in_features,
                    out_features=fact.out_features,
                    treatment=treatment,
                    format=decision.weight.key if decision.weight else None,
                    activation_format=decision.activation.key if decision.activation else None,
                    region=region_name if kept else None,
                    point=point_name if kept else None,
                    absorb=place if kept else None,
                    flops=flops,
                    parameters=prod(shape),
                    in_block=any(_inside(fqn, block) for block in numbered),
                    skip_reason=decision.skip_reason or None,
                )
            )
        parameters = {id(p): p for p in self.model.parameters()}
        before = sum(p.numel() * p.element_size() for p in parameters.values())
        own = {name: p for name, p in self.model.named_parameters()}
        after = before
        for row in rows:
            weight = own.get(f"{row.fqn}.weight")
            if row.format is not None and weight is not None:
                after += _packed_bytes(row) - weight.numel() * weight.element_size()
        return Inspection(
            model=model,
            linears=tuple(rows),
            config=config,
            parameters=sum(p.numel() for p in parameters.values()),
            regions=len({r.region for r in rows if r.region}),
            attention_flops=self.attention_flops,
            float_bytes=before,
            quantized_bytes=after,
            graphs=self.graphs,
            graph_breaks=breaks,
            seconds=seconds,
        )


def _inside(fqn: str, block: str) -> bool:
    return fqn.startswith(block + ".")


def _not_linear(shape: tuple[int, ...]) -> str:
    if len(shape) > 2:
        return f"convolution with a kernel of {'x'.join(map(str, shape[2:]))}"
    return "a product with a parameter that is no linear"


def _packed_bytes(row: LinearInspection) -> int:
    """Bytes of the packed weight, its scales, and the order of its input where that is gathered."""
    fmt = Format.parse(row.format or "")
    scale = torch.empty((), dtype=fmt.scale_dtype).element_size()
    packed = row.out_features * (
        fmt.packed_bytes(row.in_features) + fmt.groups(row.in_features) * scale
    )
    order = (
        4 * row.in_features
        if row.point == f"{row.fqn}.weight" and row.absorb not in ("fold", "stream")
        else 0
    )
    return packed + order + (4 if fmt.two_level else 0)


def products(gm: fx.GraphModule, params: set[str]) -> tuple[list[_Gemm], int]:
    """The graph's products with parameters, and the FLOPs of products of activations (attention).

    A depthwise convolution is no GEMM and does not count. Sizes are those seen while tracing.
    """
    gemms, attention = [], 0
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, v = (_sizes(a) for a in node.args[:3])
            attention += 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
            continue
        is_convolution = node.target in CONVOLUTIONS
        if (
            not is_convolution
            and node.target is not aten.linear.default
            and node.target not in PRODUCTS
        ):
            continue
        weight = next(
            (
                s
                for s in (source(a) for a in node.all_input_nodes[:3])
                if s.name in params and len(shape_of(s)) > 1
            ),
            None,
        )
        rows = prod(_sizes(node))
        if weight is None:
            operand = node.args[1 if node.target is aten.addmm.default else 0]
            attention += 0 if is_convolution else 2 * rows * _sizes(operand)[-1]
            continue
        shape = _sizes(weight)
        groups = (
            (node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1))
            if is_convolution
            else 1
        )
        if groups == 1:
            out = shape[0] if is_convolution or node.target is aten.linear.default else shape[-1]
            flops = 2 * rows * (prod(shape) // out)
            gemms.append(_Gemm(weight.name, flops, rows // out, shape))
    return gemms, attention


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(_torch.hint(n) for n in shape_of(node))
