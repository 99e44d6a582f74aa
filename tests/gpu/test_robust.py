"""Beyond int32, out of memory, determinism, chips without fp8: the checks of bench/robust_gpu.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import toy

import pq_fx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
robust_gpu = import_module("robust_gpu")


@pytest.mark.parametrize("check", robust_gpu.CHECKS, ids=lambda check: check.__name__)
def test_nothing_wrong(check: Callable[[], dict]) -> None:
    assert check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_packed_linear(dtype: torch.dtype) -> None:
    """Kernels and what surrounds them compute under autocast what they compute without."""
    model = toy.toy(dtype=dtype).to("cuda")
    quantizer = pq_fx.prepare(model, toy.CONFIG)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        model(toy.rows(0, dtype=dtype).cuda())
    quantizer.convert()
    x = torch.randn(64, toy.WIDTH, device="cuda", dtype=dtype)
    block = model.blocks[0]
    compiled = torch.compile(block.up, backend="permuquant")
    with torch.no_grad():
        want = block.up(x), block.down(block.up(x)), compiled(x)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = block.up(x), block.down(block.up(x)), compiled(x)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
