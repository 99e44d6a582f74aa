"""Matrices reordered and rotated some rows at a time, and exact products of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import nvfp4_global_scale, permute_rotate, rotate

# Elements of a weight that are quantized at once: a CPU's cache, or enough to fill a GPU.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 1 << 22


def elements(x: Tensor) -> int:
    """How many elements of a matrix on x's device are worked on at once."""
    return _CPU_ELEMENTS if x.device.type == "cpu" else _CUDA_ELEMENTS


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows of x [n, K], so many elements at a time."""
    return x.split(max(1, elements(x) // max(1, x.shape[1])))


def turned(x: Tensor, perm: Tensor | None, rotation: int) -> Tensor:
    """`permute_rotate` to within rounding: on a GPU one product with the Hadamard matrix instead of 28 launches."""
    if rotation == 0 or x.device.type == "cpu":
        return permute_rotate(x, perm, rotation)
    return rotate_by_product(permute_rotate(x, perm, 0), rotation)


def rotate_by_product(x: Tensor, rotation: int) -> Tensor:
    """`rotate` of x [..., channels] in blocks of `rotation` channels, as a product of fp32 matrices."""
    return (x.reshape(-1, rotation) @ _hadamard(rotation, x.device)).reshape(x.shape)


@lru_cache(maxsize=16)
def _hadamard(size: int, device: torch.device) -> Tensor:
    return rotate(torch.eye(size, device=device), size)


def whole_scale(parts: Iterable[Tensor], fmt: Format, room: float = 1.0) -> Tensor | None:
    """The scale of a whole tensor, given in parts, where the format has one."""
    if not fmt.two_level:
        return None
    return nvfp4_global_scale(torch.stack([part.abs().amax() for part in parts]).amax() * room)


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Real fp32 products on CUDA, whatever the user chose: TF32 would hide what is measured."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
