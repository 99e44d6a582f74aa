"""What the launchers share on the host: checks of arguments, tensors as rows, the device."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_fx.errors import FormatError, PQError
from pq_fx.kernels.formats import Format
from pq_fx.kernels.launch import recording

# Entries of a CUDA grid's second axis.
MAX_BATCH = 65535
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class KernelError(PQError, ValueError):
    """A tensor handed to a kernel has the wrong shape, dtype or device; the message says which."""


def require(condition: bool, message: str) -> None:
    """Raise KernelError with `message` unless `condition` holds."""
    if not condition:
        raise KernelError(message)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one for a launch; nothing to do where it is already."""
    require(
        x.device.type == "cuda" or INTERPRETED,
        f"a Triton kernel got a tensor on {x.device}; it needs CUDA (or TRITON_INTERPRET=1)",
    )
    if recording() or x.device.type != "cuda":
        return nullcontext()
    if x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)


def native_fp8(device: torch.device) -> bool:
    """Whether Triton converts to e4m3 in hardware on `device` (sm_89 and newer)."""
    if INTERPRETED or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(frozen=True)
class Rows:
    """A tensor [..., K] as `batch` times `tokens` rows, at batch * outer_stride + token * stride."""

    tensor: Tensor
    batch: int
    tokens: int
    outer_stride: int
    stride: int


def as_rows(x: Tensor, name: str) -> Rows:
    """View [..., K] as [B, T, K] without a copy where two strides describe it, else copy it.

    B is the first axis of tensors with three or more, if a grid has room for it, else 1. Sliced
    and chunked tensors (q, k, v of one projection, the halves of a GLU) need no copy.
    """
    require(x.dim() >= 1, f"{name} must have at least one axis, got a scalar")
    channels = x.shape[-1]
    if x.stride(-1) != 1 and channels > 1:
        x = x.contiguous()
    if x.dim() <= 2 or x.shape[0] > MAX_BATCH:
        y = x.reshape(1, -1, channels)
    elif x.dim() == 3:
        y = x
    else:
        y = x.reshape(x.shape[0], -1, channels)
    return Rows(y, y.shape[0], y.shape[1], y.stride(0), y.stride(1))


def storage_bytes(tensor: Tensor) -> Tensor:
    """e4m3 tensors as uint8 for Triton's interpreter and for chips without fp8; others as they are.

    Kernels take either (`rounding.as_bytes`).
    """
    if tensor.element_size() > 1 or native_fp8(tensor.device):
        return tensor
    return tensor.view(torch.uint8)


# triton.cdiv and triton.next_power_of_2 serve kernels too, and take the host microseconds a call.
def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; sizes may be symbolic."""
    return (a + b - 1) // b


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (int(n) - 1).bit_length()


def padded_length(channels: int) -> int:
    """Power of two that holds a row; raises KernelError for rows too long for one program."""
    require(
        0 < channels <= 65536,
        f"rows of {channels} channels do not fit one program (1 to 65536); split the linear",
    )
    return max(16, power_of_2(channels))


@dataclass(frozen=True)
class Tile:
    """How programs hold rows: `rows` of them, each as pieces of `head` and `tail` channels."""

    rows: int
    head: int
    tail: int
    warps: int


def tile_of(channels: int, unit: int, by_dot: bool, gathered: bool, crowded: bool = False) -> Tile:
    """Tile for rows of `channels`, as measured (bench/results/micro_h100.json, row_warps_h200.json).

    `unit` divides both pieces (group and rotation sizes). `by_dot`: a rotation by `tl.dot`, which
    wants 16 groups a piece or more. `gathered`: two warps or more, because Triton makes a gather
    inside one warp of shuffles, one for each pair of a thread's channels. `crowded`: a kernel with no
    registers left for 96 channels a thread.
    """
    return _tile_of(int(channels), unit, by_dot, gathered, crowded)


@functools.cache
def _tile_of(channels: int, unit: int, by_dot: bool, gathered: bool, crowded: bool) -> Tile:
    length = padded_length(channels)
    head, tail = length, 0
    if channels > 64 and length // 2 >= unit:
        head = length // 2
        tail = max(power_of_2(channels - head), unit)
    # A row a warp where a rotation moves nothing between threads (`rotate_row._rotate_64`).
    alone = by_dot and unit == 64 and not gathered and length > 2048
    rows = 1 if alone or length > 4096 else 2
    while by_dot and rows * (tail or head) < 16 * unit:
        rows *= 2
    each = 3072 if by_dot or gathered or length <= 4096 else 1536  # channels that a warp holds
    if by_dot and not gathered and (length == 8192 or (crowded and length > 8192)):
        each = 2560
    warps = power_of_2(ceil_div(rows * (head + tail), each))
    return Tile(rows, head, tail, min(max(warps, 2 if gathered else 1), 32))


def check_scale(name: str, scale: Tensor, count: int, channels: int, fmt: Format) -> None:
    """Raise KernelError unless `scale` is what a format stores for `count` rows of `channels`, [count, K / g]."""
    expected = (count, fmt.groups(channels))
    require(
        tuple(scale.shape) == expected and scale.dtype == fmt.scale_dtype,
        f"{name} is {scale.dtype} {tuple(scale.shape)}; {fmt.key} with K={channels} wants "
        f"{fmt.scale_dtype} {expected}",
    )


def check_global_scale(global_scale: Tensor | None, fmt: Format) -> None:
    """Raise KernelError unless it is None, or one number of a format that has one (nvfp4)."""
    if global_scale is not None:
        require(
            fmt.two_level and global_scale.numel() == 1,
            f"a global scale is one number and only for nvfp4; got shape "
            f"{tuple(global_scale.shape)} for {fmt.key}",
        )


def check_perm(perm: Tensor | None, channels: int, device: torch.device) -> None:
    """Raise KernelError unless perm is None or int32 [channels] on `device`."""
    if perm is None:
        return
    require(perm.dtype == torch.int32, f"perm must be int32, got {perm.dtype}; call perm.int()")
    require(
        tuple(perm.shape) == (channels,),
        f"perm has shape {tuple(perm.shape)}, expected ({channels},), one entry a channel",
    )
    require(perm.device == device, f"perm is on {perm.device}, x on {device}")


def check_rotation(rotation: int, channels: int) -> None:
    """Raise FormatError unless rotation is 0 or a power of two that divides the channels."""
    if rotation and (rotation < 0 or rotation & (rotation - 1) or channels % rotation):
        raise FormatError(
            f"rotation size {rotation} is not a power of two that divides K={channels}; "
            "use the group size, or 0 for none"
        )
