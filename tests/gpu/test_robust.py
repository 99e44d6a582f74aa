"""Beyond int32, out of memory, determinism, chips without fp8: the checks of bench/robust_gpu.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
robust_gpu = pytest.importorskip("robust_gpu")


@pytest.mark.parametrize("check", robust_gpu.CHECKS, ids=lambda check: check.__name__)
def test_nothing_wrong(check: Callable[[], dict]) -> None:
    assert check()
