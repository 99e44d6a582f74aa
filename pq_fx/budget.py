"""Mixed formats under a budget: more bits for the weights that need them, fewer for the others.

Every weight is measured in each format: relative squared error of its outputs on held-out rows,
weight errors alone. All start from the fewest bits; then, step by step, the weight that lowers the
sum of errors most for each added byte gets the next format, while the average stays in the budget.
(The greedy form of the Lagrangian: exact for convex error curves up to the last step.)
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pq_fx.config_values import full_range
from pq_fx.errors import ConfigError
from pq_fx.kernels.formats import Format, get_format
from pq_fx.kernels.reference import fake_quantize
from pq_fx.passes.turned import exact_matmul
from pq_fx.scope import Layer

LADDER = ("int3", "int4", "int8")


def ladder(layer: Layer) -> tuple[Format, ...]:
    """Formats from the fewest bits up, in the group size of the layer's own integer format.

    Linears of one row a sample (modulation) scale whole channels of the residual stream: an error
    there costs more than its relative size says, so they get no fewer bits than int4.
    """
    own = layer.weight_format
    group = own.group_size if own.element.startswith("int") else None
    names = LADDER[1:] if layer.one_row else LADDER
    full = own.full_range or layer.config.recipe.full_range
    formats = (get_format(name, group or 64) for name in names)
    return tuple(full_range(fmt) if full else fmt for fmt in formats)


def weight_errors(rows: Tensor, weight: Tensor, formats: Sequence[Format]) -> list[float]:
    """||X (W - Q(W))^T||^2 / ||X W^T||^2 for each format; rows fp32 [R, K], weight [N, K]."""
    w = weight.float()
    with exact_matmul():
        whole = (rows @ w.T).square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        lost = [(rows @ (w - fake_quantize(w, f)).T).square().sum() for f in formats]
    return [float(e / whole) for e in lost]


def spread(
    sizes: Mapping[str, int],
    errors: Mapping[str, Sequence[float]],
    bits: Mapping[str, Sequence[float]],
    budget: float,
) -> dict[str, int]:
    """The rung of each weight, by name.

    Args:
        sizes: number of elements of each weight.
        errors: its error on each rung.
        bits: its bits an element on each rung, rising.
        budget: average bits an element, over all weights.

    Raises:
        ConfigError: the budget is below the lowest rung.
    """
    total = sum(sizes.values())
    smallest = sum(bits[name][0] * size for name, size in sizes.items())
    if budget * total < smallest:
        raise ConfigError(
            f"budget_bits={budget:g} is less than the {smallest / total:g} bits of the smallest formats"
        )
    rungs = dict.fromkeys(sizes, 0)
    left = budget * total - smallest
    heap = [_step(name, 0, sizes[name], errors[name], bits[name]) for name in sizes]
    heapq.heapify(heap)
    while heap:
        _, name, rung = heapq.heappop(heap)
        cost = (bits[name][rung + 1] - bits[name][rung]) * sizes[name]
        if cost > left:
            continue  # a smaller weight may still fit
        left -= cost
        rungs[name] = rung + 1
        if rung + 2 < len(bits[name]):
            heapq.heappush(heap, _step(name, rung + 1, sizes[name], errors[name], bits[name]))
    return rungs


def _step(
    name: str, rung: int, size: int, errors: Sequence[float], bits: Sequence[float]
) -> tuple[float, str, int]:
    """A heap entry: minus what one more bit saves on this step."""
    saved = errors[rung] - errors[rung + 1]
    return (-saved / ((bits[rung + 1] - bits[rung]) * size), name, rung)


def apply_budget(
    layers: dict[str, Layer],
    rows: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    budget: float,
) -> None:
    """Give each layer its weight format, in place; formats of activations stay.

    `rows` and `weights` are by weight name: fp32 [R, K] on the weight's device, and [N, K].
    """
    errors, sizes, rungs = {}, {}, {}
    bits: dict[str, tuple[float, ...]] = {}
    for name, layer in layers.items():
        rungs[name] = formats = ladder(layer)
        bits[name] = tuple(f.bits_per_weight for f in formats)
        errors[name] = weight_errors(rows[name], weights[name], formats)
        sizes[name] = weights[name].numel()
    chosen = spread(sizes, errors, bits, budget)
    for name, layer in layers.items():
        layer.weight_format = rungs[name][chosen[name]]
