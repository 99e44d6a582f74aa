"""Every op on a CUDA device against the reference: the checks of bench/check_kernels.py."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
check_kernels = import_module("check_kernels")


@pytest.mark.parametrize("key", check_kernels.KEYS)
@pytest.mark.parametrize("name", list(check_kernels.GROUPS))
def test_op_agrees_with_reference(name: str, key: str) -> None:
    checks = check_kernels.run_one(name, key, False, 11, check_kernels.on_cuda)
    channels_fit = not (name == "norm_quantize" and not checks)
    assert checks or not channels_fit
