"""Matrices reordered and rotated some rows at a time, and exact products of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import nvfp4_global_scale, permute_rotate, rotate

# Elements of a weight that are quantized at once: a CPU's cache, or enough to fill a GPU.
_CPU_ELEMENTS = 1 << 18
_CUDA_ELEMENTS = 3 << 20
# Elements of a matrix of which one number a column is wanted: these need no copies.
_READ = 1 << 22
# Rows that a GPU adds up at once: of many at once it would take 512 bytes of workspace for each column and block of
# threads, 132 MiB for weights of FLUX.1.
_ADDED = 64


class Matrix(Protocol):
    """A float matrix [n, K]: a tensor, or what makes some of its rows when they are asked for."""

    @property
    def shape(self) -> torch.Size:
        """[n, K]."""

    @property
    def device(self) -> torch.device:
        """Where its rows are made."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Columns(Protocol):
    """A weight [N, K] of which a GPU holds the columns of a block at a time, made when they are rounded."""

    shape: torch.Size
    device: torch.device

    def columns(self, index: Tensor) -> Tensor:
        """Columns `index` (int64 [b]), float [N, b]."""
        ...


def elements(x: Matrix) -> int:
    """How many elements of a matrix on x's device are worked on at once."""
    return _CPU_ELEMENTS if x.device.type == "cpu" else _CUDA_ELEMENTS


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows of x [n, K], so many elements at a time."""
    return x.split(max(1, elements(x) // max(1, x.shape[1])))


def slices(x: Matrix) -> list[slice]:
    """The rows of `chunks`, of a matrix that may make them."""
    return _slices(x, elements(x))


def _slices(x: Matrix, at_once: int) -> list[slice]:
    step = max(1, at_once // max(1, x.shape[1]))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def pieces(x: Matrix) -> Iterator[Tensor]:
    """A tensor as it is; of another matrix some rows at a time."""
    if isinstance(x, Tensor):
        yield x
    else:
        yield from (x[part] for part in _slices(x, _READ))


def column_norms(x: Matrix) -> Tensor:
    """sqrt(sum_n x[n, k]^2), fp32 [K]."""
    norms = [_norms(part) for piece in pieces(x) for part in _evenly(piece)]
    return norms[0][0] if len(norms) == 1 == len(norms[0]) else _norms(torch.cat(norms)[None])[0]


def column_squares(x: Tensor) -> Tensor:
    """sum_n x[n, k]^2 of x fp32 [n, K], fp32 [K]."""
    return x.square().sum(dim=0) if x.device.type == "cpu" else column_norms(x).square()


def _norms(x: Tensor) -> Tensor:
    """Norms of the columns of each x[i], fp32 [len(x), K]."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def _evenly(x: Tensor) -> list[Tensor]:
    """x [n, K] as matrices [m, n', K] with few rows each on a GPU, and the rest."""
    if x.device.type == "cpu":
        return [x[None]]
    whole = len(x) // _ADDED * _ADDED
    return [
        part for part in (x[:whole].unflatten(0, (-1, _ADDED)), x[None, whole:]) if part.numel()
    ]


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
