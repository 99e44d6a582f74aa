"""What the launchers of the row kernels share: checks, outputs, tiles, modulation as rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pq_fx.kernels.carriers import data_dtype, data_width, int8_unit
from pq_fx.kernels.formats import Format
from pq_fx.kernels.rows import (
    Tile,
    check_global_scale,
    check_perm,
    check_rotation,
    require,
    tile_of,
)


def empty_outputs(x: Tensor, channels: int, fmt: Format, carrier: str) -> tuple[Tensor, Tensor]:
    """Empty (data, scale) of a quantize op: x's leading axes, K = `channels`, as the carrier has it.

    Data of the carrier "e2m1" comes as its bytes, which kernels write; `as_carried` names them.
    """
    lead = x.shape[:-1]
    dtype = torch.uint8 if carrier == "e2m1" else data_dtype(carrier)
    data = torch.empty((*lead, data_width(carrier, channels)), dtype=dtype, device=x.device)
    if carrier == "e4m3":
        return data, torch.empty((*lead, 1), dtype=torch.float32, device=x.device)
    groups = (*lead, fmt.groups(channels))
    return data, torch.empty(groups, dtype=fmt.scale_dtype, device=x.device)


def as_carried(data: Tensor, carrier: str) -> Tensor:
    """What `empty_outputs` gave, filled, in the carrier's dtype."""
    return data.view(data_dtype(carrier)) if carrier == "e2m1" else data


def rotates_by_dot(rotation: int, dtype: torch.dtype) -> bool:
    """Whether tensor cores rotate: rows of 16 bits, blocks that `tl.dot` takes."""
    return dtype != torch.float32 and 16 <= rotation <= 128


def row_tile(
    channels: int,
    fmt: Format,
    rotation: int,
    dtype: torch.dtype,
    gathered: bool = False,
    activated: bool = False,
) -> Tile:
    """How programs hold rows of `channels` (`rows.tile_of`) for a format, a rotation, an activation before them."""
    by_dot = rotates_by_dot(rotation, dtype)
    # Signed extremes and scales of scales take registers that gelu needs too.
    crowded = activated and (fmt.full_range or fmt.two_level)
    return tile_of(channels, max(fmt.group_size, rotation, 16), by_dot, gathered, crowded)


def row_constants(
    fmt: Format, tile: Tile, rotation: int, carrier: str, dtype: torch.dtype
) -> dict[str, object]:
    """The constexpr arguments of `quantize_rows_store` that a format and a tile determine."""
    return {
        "ROWS": tile.rows,
        "HEAD": tile.head,
        "TAIL": tile.tail,
        "GROUP": fmt.group_size,
        "ROTATION": rotation,
        "BY_DOT": rotates_by_dot(rotation, dtype),
        "ELEMENT": fmt.element,
        "SCALE": fmt.scale,
        "TOP": fmt.max_value,
        "GAIN": float(fmt.operand_gain),
        "CARRIER": carrier,
        "UNIT": int8_unit(fmt),
    }


def check_quantize(
    x: Tensor,
    channels: int,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    fmt: Format,
    rotation: int,
) -> None:
    """Raise KernelError or FormatError unless rows of K = `channels` made of x can be quantized."""
    fmt.check_channels(channels)
    check_rotation(rotation, channels)
    check_perm(perm, channels, x.device)
    require(
        x.dtype in (torch.float16, torch.bfloat16, torch.float32),
        f"x must be float16, bfloat16 or float32, got {x.dtype}",
    )
    check_global_scale(global_scale, fmt)
    if clip is not None:
        require(
            clip.dtype == torch.float32 and clip.numel() == 1 and clip.device == x.device,
            f"clip must be one float32 number on {x.device}; got {clip.dtype} "
            f"{tuple(clip.shape)} on {clip.device}",
        )


class Modulation(NamedTuple):
    """Modulation rows: tensor with unit channel stride or None, and how far apart its rows lie."""

    tensor: Tensor | None
    stride: int


def modulation_rows(mod: Tensor | None, x: Tensor, name: str) -> Modulation:
    """Rows [B, K] of a modulation [B, K], [B, 1, K] or [K] for x [B, ..., K]."""
    if mod is None:
        return Modulation(None, 0)
    channels = x.shape[-1]
    require(
        mod.shape[-1] == channels and mod.device == x.device,
        f"{name} {tuple(mod.shape)} on {mod.device} does not fit x {tuple(x.shape)} on {x.device}",
    )
    batch = mod.shape[0] if mod.dim() > 1 else 1
    expected = x.shape[0] if x.dim() > 1 else 1
    require(
        mod.numel() == batch * channels and batch in (1, expected),
        f"{name} {tuple(mod.shape)} must be [B, K] or [B, 1, K] with B = {expected} or 1: one row "
        "for all tokens of a batch entry",
    )
    if mod.stride(-1) != 1:
        mod = mod.contiguous()
    return Modulation(mod, mod.stride(0) if batch > 1 else 0)


def channel_vector(vector: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    """A vector [K] for x [..., K], contiguous; raises KernelError when it does not fit."""
    if vector is None:
        return None
    require(
        tuple(vector.shape) == (x.shape[-1],) and vector.device == x.device,
        f"{name} {tuple(vector.shape)} on {vector.device} must be ({x.shape[-1]},) on {x.device}",
    )
    return vector.contiguous()
