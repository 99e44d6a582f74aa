"""Launching a kernel now, or recording the launch in the graph that torch.compile is tracing.

Every launcher calls its kernel as ``launch(kernel)[grid](...)``. On real tensors that runs it. Inside
`recorded_launches` (pq_fx/inductor.py) the launch becomes a node of the graph through
`torch.library.wrap_triton`, and Inductor's generated code launches the kernel itself: one launcher
serves eager and compiled calls, and a compiled step never passes through Python's custom-op dispatch.
A tensor that is absent is None: with a stand-in Inductor would compute it once more for that argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def recording() -> bool:
    """Whether launches are being recorded; tensors are fake then and the GPU is not to be touched."""
    return _RECORDING.get()


@contextmanager
def recorded_launches() -> Iterator[None]:
    """Inside, launchers record their kernels in the graph being traced, and run nothing."""
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)


def launch(kernel: Any) -> Any:
    """The kernel itself, or the same kernel as a node of the graph inside `recorded_launches`.

    Inductor has no switch for `enable_fp_fusion`: where it launches, a product and a sum may contract
    into one operation. Kernels therefore write the roundings that decide a code so that no product
    meets a sum; a norm or a gate before them may still differ by an ulp from the eager launch.
    """
    return _Recorded(kernel) if recording() else kernel


@dataclass(frozen=True)
class _Recorded:
    kernel: Any

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        def record(*args: Any, enable_fp_fusion: bool = True, **options: Any) -> None:
            torch.library.wrap_triton(self.kernel)[grid](*args, **options)

        return record
