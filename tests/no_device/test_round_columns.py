"""The kernel that rounds a group's columns, in Triton's interpreter, against the loop over columns in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

BENCH = Path(__file__).resolve().parents[2] / "bench"

# Between guard bytes, each step against float64, and the loop over columns: bench/kernel_rounding.py.
SCRIPT = """
import sys
sys.path.insert(0, BENCH)
import torch
from kernel_rounding import check_rounding, inputs, round_columns
from pq_fx.kernels.formats import get_format
from pq_fx.kernels.rows import KernelError
from random_shapes import guarded_call

torch.manual_seed(SEED)
shapes = ("int4", 64, 37), ("int3f", 5, 99), ("int3", 128, 17), ("nvfp4", 16, 64), ("mxfp4", 32, 1), ("int8", 17, 20)
for i, (name, columns, count) in enumerate(shapes):
    args = inputs(get_format(name), columns, count, by_column=i % 2 == 1)
    check_rounding(name, args, guarded_call("cpu"))
block, within, factor, values, bounds = args
try:
    round_columns(block, within, factor[:3], values, bounds)
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
        [
            sys.executable,
            "-c",
            script.replace("SEED", str(seed)).replace("BENCH", repr(str(BENCH))),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-4000:]
