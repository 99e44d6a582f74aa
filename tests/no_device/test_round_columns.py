"""The kernel that rounds a group's columns, in Triton's interpreter, against the loop over columns in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SCRIPT = """
import torch
from pq_fx.kernels.formats import get_format
from pq_fx.kernels.round_columns import round_columns as kernel
from pq_fx.kernels.rows import KernelError
from pq_fx.passes.rounding import _elements, round_columns

g = torch.Generator().manual_seed(SEED)
for name, columns, count in (("int4", 64, 37), ("int3f", 5, 99), ("nvfp4", 16, 64), ("mxfp4", 32, 1), ("int8", 17, 20)):
    values, bounds, _ = _elements(get_format(name), torch.device("cpu"))
    block = torch.randn(columns, count, generator=g)
    wide = torch.randn(columns, 128, generator=g) * 0.2
    within = wide[:, 40 : 40 + columns]
    if name != "int4":  # as a GPU's triangular solves leave it
        within = within.T.contiguous().T
    factor = torch.rand(count, generator=g) * 0.2 + 0.05
    factor[0] = 0.0
    factor[1::2] *= -1.0  # of int4f and int3f
    block[:, 0] = 0.0
    found = []
    for rounding in (round_columns, kernel):
        index, errors = torch.zeros(columns, count, dtype=torch.int32), torch.full((columns, count), 7.0)
        rounding(block.clone(), within, factor, values, bounds, index, errors)
        found.append((index, errors))
    (index, errors), (own, lost) = found
    # Sums in another order may round a tie the other way, which then spreads down its row of the weight.
    same = (index == own).all(0)
    assert same.float().mean() > 0.95, (name, same.float().mean())
    torch.testing.assert_close(lost[:, same], errors[:, same], rtol=1e-4, atol=1e-5)
try:
    kernel(block, within, factor[:3], values, bounds, index, errors)
except KernelError as error:
    assert "factor is torch.float32 [3], expected torch.float32 [20]" in str(error), error
else:
    raise AssertionError("another shape was taken")
print("done")
"""

# What GPTQ hands the kernel comes from solvers, whose answers lie column by column.
WHOLE = """
import torch
from pq_fx.kernels.formats import get_format
from pq_fx.kernels.reference import dequantize
from pq_fx.kernels.round_columns import round_columns as kernel
from pq_fx.passes.rounding import gptq, second_moment

g = torch.Generator().manual_seed(SEED)
for name, group, channels, rows in (("int4f", 64, 192, 50), ("int3", 32, 96, 300), ("nvfp4", 16, 80, 33)):
    fmt = get_format(name, group)
    x = torch.randn(rows, channels, generator=g) * (torch.rand(channels, generator=g) + 0.1)
    w = torch.randn(37, channels, generator=g)
    moment = second_moment(x, group=group)
    loop, own = (dequantize(gptq(w, moment, fmt, columns=c), fmt) for c in (None, kernel))
    same = (loop == own).all(1)
    assert same.float().mean() > 0.9, (name, same.float().mean())
print("done")
"""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("script", [SCRIPT, WHOLE], ids=["columns", "gptq"])
def test_kernel_equals_the_loop(script: str, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script.replace("SEED", str(seed))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-4000:]
