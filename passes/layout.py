"""Layout arithmetic on channel labels: reshape, squeeze and expand, with symbolic sizes left symbolic."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import sympy

from pq_fx.passes._torch import dim_expr

Labels = np.ndarray
# So many tokens are spelled out where a reshape merges them with channels; sequences are not, modulation rows are.
MAX_SPREAD = 64


def groups(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal volume into the finest runs of axes whose volumes agree.

    (B, T, 24) -> (B, T, 4, 6) gives [([0], [0]), ([1], [1]), ([2], [2, 3])]. Volumes are compared as sympy
    expressions, so symbolic sizes need no guard. Axes of size 1 join the run beside them.
    """
    left, right = _volumes(before), _volumes(after)
    cuts: list[tuple[int, int]] = [(0, 0)]
    j = 0
    for i, volume in enumerate(left, start=1):
        for k in range(j, len(right)):
            if sympy.expand(right[k] - volume) == 0:
                j = k + 1
                cuts.append((i, j))
                break
    result = [(list(range(a, c)), list(range(b, d))) for (a, b), (c, d) in pairwise(cuts)]
    rest_left = list(range(cuts[-1][0], len(left)))
    rest_right = list(range(cuts[-1][1], len(right)))
    if rest_left or rest_right:
        if (
            result
            and all(sympy.expand(dim_expr(before[i]) - 1) == 0 for i in rest_left)
            and all(sympy.expand(dim_expr(after[i]) - 1) == 0 for i in rest_right)
        ):
            result[-1] = (result[-1][0] + rest_left, result[-1][1] + rest_right)
        else:
            result.append((rest_left, rest_right))
    return result


def _volumes(shape: tuple[Any, ...]) -> list[sympy.Expr]:
    total: sympy.Expr = sympy.Integer(1)
    result = []
    for size in shape:
        total = total * dim_expr(size)
        result.append(total)
    return result


def reshape_labels(
    labels: Labels, before: tuple[Any, ...], after: tuple[Any, ...]
) -> Labels | None:
    """The labels of a reshaped value, or None where channels and tokens are merged into one axis."""
    shape: dict[int, int] = {}
    spread: dict[int, int] = {}
    order: list[int] = []
    for old, new in groups(before, after):
        sizes = [labels.shape[i] for i in old]
        if all(n == 1 for n in sizes):
            shape.update(dict.fromkeys(new, 1))
        elif all(n == before[i] for n, i in zip(sizes, old, strict=True)) and all(
            isinstance(after[j], int) for j in new
        ):
            shape.update({j: after[j] for j in new})
        elif all(isinstance(n, int) for n in (*(before[i] for i in old), *(after[j] for j in new))):
            tokens = [i for i, n in zip(old, sizes, strict=True) if n == 1 and before[i] != 1]
            if math.prod(before[i] for i in tokens) > MAX_SPREAD:
                return None
            # Few tokens of known number beside channels (modulation rows): spell every token out.
            spread.update({i: int(before[i]) for i in tokens})
            shape.update({j: after[j] for j in new})
        else:
            return None
        order += new
    if spread:
        full = [spread.get(i, n) for i, n in enumerate(labels.shape)]
        labels = np.ascontiguousarray(np.broadcast_to(labels, full))
    return labels.reshape([shape[j] for j in range(len(after))])


def squeeze_to(labels: Labels, before: tuple[Any, ...], after: tuple[Any, ...]) -> Labels | None:
    """The labels of a squeezed value; None where it is not known which axes went."""
    ones = [i for i, n in enumerate(before) if isinstance(n, int) and n == 1]
    if len(before) == len(after):
        return labels
    kept = [n for i, n in enumerate(before) if i not in ones]
    if len(kept) == len(after):
        return np.squeeze(labels, tuple(ones))
    # Only some of the ones went: find the first choice that gives the shape seen.
    for axis in ones:
        rest = (*before[:axis], *before[axis + 1 :])
        if len(rest) == len(after) and all(
            sympy.expand(dim_expr(a) - dim_expr(b)) == 0 for a, b in zip(rest, after, strict=True)
        ):
            return np.squeeze(labels, axis)
    return None


def expand_rule(labels: Labels, rank: int) -> Labels:
    """The labels of an expanded value: new axes in front carry no channels, old ones keep theirs."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
