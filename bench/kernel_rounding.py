"""Checks of the kernel that rounds a group's columns (GPTQ's): inputs, and each step held in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kernel_checks import BOUNDS, Call, CheckFailed
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.round_columns import round_columns as kernel
from pq_fx.passes.rounding import _elements
from pq_fx.passes.rounding import round_columns as reference

# Formats of few small checks.
SMALL_KEYS = ("int4:64:bf16", "int4f:64:bf16", "int3f:32:bf16", "nvfp4:16:e4m3")
# Columns, rows of the weight: parts of a group, groups of every size, one row, none, and several programs.
SMALL = ((5, 1), (16, 131), (32, 37), (64, 99), (128, 35))
LARGE = (*SMALL, (16, 0), (17, 3073), (64, 1), (128, 3073))


def round_columns(
    block: Tensor, within: Tensor, factor: Tensor, values: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernel, as `pq_fx.kernels.round_columns` takes it: (index int32 [b, N], errors fp32 [b, N])."""
    index = torch.empty(block.shape, dtype=torch.int32, device=block.device)
    errors = torch.empty(block.shape, dtype=torch.float32, device=block.device)
    kernel(block, within, factor, values, bounds, index, errors)
    return index, errors


def inputs(fmt: Format, columns: int, count: int, by_column: bool) -> tuple[Tensor, ...]:
    """block [b, N], within [b, b], factor [N], values [v], bounds [v - 1].

    `within` is a part of a wider tensor, or lies column by column as solvers leave it; on and below its diagonal,
    where nobody may read, it is NaN. Where N > 1 one row is zeros with a scale of zero; half of the scales are
    negative, as int4f's and int3f's are.
    """
    values, bounds, _ = _elements(fmt, torch.device("cpu"))
    block = torch.randn(columns, count)
    within = torch.randn(columns, columns) * 0.2
    within = within.masked_fill(torch.ones_like(within).tril() > 0, torch.nan)
    wide = torch.cat([within, within.fliplr()], dim=1)
    within = within.T.contiguous().T if by_column else wide[:, :columns]
    factor = (torch.rand(count) + 0.2) * 2 / fmt.max_value
    factor[1::2] *= -1
    if count > 1:
        block[:, 0], factor[0] = 0, 0
    return block, within, factor, values, bounds


def check_rounding(case: str, args: tuple[Tensor, ...], call: Call) -> dict[str, Any]:
    """Each step rounds what earlier errors leave of a column to the nearest value; few rows are not the reference's.

    A step is computed in float64 from the kernel's own earlier errors: there a tie may fall either way.
    """
    block, within, factor, values, bounds = args
    index, errors = (found.cpu() for found in call("round_columns", args))
    if index.shape != block.shape or index.dtype != torch.int32 or errors.dtype != torch.float32:
        raise CheckFailed(f"{case}: {index.shape} {index.dtype}, {errors.dtype}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(values):
        raise CheckFailed(f"{case}: an index outside the {len(values)} values")
    share = torch.where(within.isnan(), 0, within).double()
    now = block.double() - share.T @ errors.double()
    # What a step adds up: the unit of its rounding errors.
    size = (
        block.double().abs() + share.T.abs() @ errors.double().abs() + factor.double().abs() + 1e-30
    )
    stored = values[index.long()].double() * factor.double()
    step = ((now - stored - errors.double()).abs() / size).amax() if index.numel() else 0.0
    # In units of the scale; a scale of zero divides by one.
    unit = torch.where(factor == 0, 1, factor).double()
    scaled = now / unit
    far = (scaled - values[index.long()].double()).abs()
    nearest = torch.stack([(scaled - v).abs() for v in values.double()]).amin(dim=0)
    beyond = ((far - nearest) * unit.abs() / size).amax() if index.numel() else 0.0
    worst = max(float(step), float(beyond))
    allowed = BOUNDS.ROUNDED_STEP
    if not worst <= allowed:
        raise CheckFailed(f"{case}: a step is {worst:.1e} off, {allowed} allowed")
    wanted, lost = torch.empty_like(index), torch.empty_like(errors)
    reference(block.clone(), within, factor, values, bounds, wanted, lost)
    other = int((index != wanted).any(dim=0).sum())
    if other > max(2, BOUNDS.ROUNDED_ROWS * block.shape[1]):
        raise CheckFailed(f"{case}: {other} of {block.shape[1]} rows differ from the reference's")
    return {"case": case, "relative_error": worst, "allowed": allowed, "rows_differ": other}


def round_cases(key: str, small: bool, call: Call) -> Iterator[dict[str, Any]]:
    """Every size of group with this format's values, one layout of the shares after the other."""
    for i, (columns, count) in enumerate(SMALL if small else LARGE):
        args = inputs(Format.parse(key), columns, count, by_column=i % 2 == 0)
        yield check_rounding(f"round_columns {key} {columns}x{count}", args, call)
