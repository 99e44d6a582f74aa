"""Compiled for CUDA, every pq op is taken apart into its Triton kernels, which Inductor launches itself.

Before (what the passes leave)              After (what Inductor gets)
    d, s = pq.quantize(x, ...)                  d, s = aten.empty(...), aten.empty(...)
    y = pq.linear(d, s, Wq, ...)                triton_kernel_wrapper(_act_quantize_kernel, x, d, s)
                                                w, r = aten.empty(...), aten.empty(...)
                                                triton_kernel_wrapper(_decode_kernel, Wq, w, r)
                                                y = aten._scaled_mm(d, w.t(), s, r.t(), bias)

An opaque custom op costs 80 to 180 us of Python a call, a launch by Inductor's generated code 5 to 10. The launchers
are the ones that eager calls use (kernels/launch.py). This happens where AOTAutograd makes the graph functional, as for
`torch.library.triton_op`; `torch.export` keeps the ops whole, and on a CPU `decompositions` apply.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pq_fx.kernels import ops
from pq_fx.kernels.launch import recorded_launches
from pq_fx.passes import _torch

# Settings of Inductor for quantized graphs; the user's options go before them.
PATCHES: dict[str, Any] = {
    # Never benchmark templates against cuBLAS for the fp8 GEMM: torch does so by default for _scaled_mm, takes
    # minutes for a large model, and cuBLAS wins at these shapes.
    "max_autotune_gemm_backends": "ATEN",
    # Norm, concatenation and rotary embedding of joint attention read more tensors than the default allows in one
    # kernel (4 reads, 30 operations).
    "realize_reads_threshold": 8,
    "realize_opcount_threshold": 64,
}


def _take_apart(launcher: Any) -> Any:
    def apply(*args: Any, **kwargs: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        if first.device.type != "cuda":
            return NotImplemented
        with recorded_launches():
            return launcher(*args, **kwargs)

    return apply


for _op, _launcher in ops.launchers().items():
    _torch.decompose_when_functional(_op, _take_apart(_launcher))
