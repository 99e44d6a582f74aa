"""NaN and infinity in Triton's kernels and in the reference; run with TRITON_INTERPRET=1, prints JSON."""

from __future__ import annotations

import json
from importlib import import_module

import torch
from torch import Tensor

from pq_fx.kernels import reference_ops
from pq_fx.kernels.formats import Format
from pq_fx.kernels.ops import _TRITON
from pq_fx.kernels.reference import Quantized, dequantize

KEYS = (
    "int4:64:bf16", "int4:16:pow2", "int3:64:bf16", "int3f:64:bf16", "nvfp4:16:e4m3", "nvfp4:16:4over6",
    "mxfp4:32:e8m0", "fp8:0:fp32", "fp8:64:fp32", "int8:0:fp32",
)  # fmt: skip
# Op -> the arguments between x and perm.
FIRST: dict[str, tuple] = {
    "quantize": (),
    "act_quantize": (None, "relu", None),
    "norm_quantize": ("rms", None, None, 1e-6, None, None),
}


def values(data: Tensor, scale: Tensor, whole: Tensor | None, fmt: Format, carrier: str) -> Tensor:
    if carrier == "codes":
        return dequantize(Quantized(data, scale, whole), fmt)
    return data.float() * scale


def not_finite_agrees(name: str, key: str, carrier: str, rotation: int) -> bool:
    """Whether kernel and reference are finite at the same places, and not in the groups that were spoiled."""
    fmt = Format.parse(key)
    whole = torch.tensor(0.01) if fmt.two_level else None
    x = torch.randn(6, 128).half()
    x[0, 70], x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, -torch.inf, 0.0
    args = (*FIRST[name], None, whole, None, key, rotation, carrier)
    kernel = values(*getattr(import_module(_TRITON[name]), name)(x, *args), whole, fmt, carrier)
    wanted = values(*getattr(reference_ops, name)(x, *args), whole, fmt, carrier)
    spoiled = not wanted[0, 64:80].isfinite().any() and not wanted[1, :16].isfinite().any()
    return torch.equal(kernel.isfinite(), wanted.isfinite()) and spoiled


def ties_agree(key: str, carrier: str) -> bool:
    """Whether bytes are the reference's where a group's largest magnitude stands in it with both signs."""
    x = torch.randint(-2, 3, (6, 128)).half()
    args = (None, None, None, key, 0, carrier)
    kernel = import_module(_TRITON["quantize"]).quantize(x, *args)
    wanted = reference_ops.quantize(x, *args)
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(kernel, wanted, strict=True)
    )


def main() -> None:
    torch.manual_seed(0)
    cases = [(n, k, c, r) for n in FIRST for k in KEYS for c in ("codes", "e4m3") for r in (0, 16)]
    different = [case for case in cases if not not_finite_agrees(*case)]
    ties = [ties_agree(f"{n}:64:bf16", c) for n in ("int4f", "int3f") for c in ("codes", "e4m3")]
    print(json.dumps({"compared": len(cases), "different": different, "ties": ties}))


if __name__ == "__main__":
    main()
