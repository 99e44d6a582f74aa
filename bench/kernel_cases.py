"""Inputs and comparisons of bench/check_kernels.py: ops on a device against the reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from typing import Any

import torch
from kernel_checks import BOUNDS, Call, CheckFailed, as_bytes, check_quantized
from kernel_rounding import round_columns
from torch import Tensor

from pq_fx.kernels import reference, reference_ops
from pq_fx.kernels.carriers import CARRIERS, carries
from pq_fx.kernels.formats import Format
from pq_fx.kernels.ops import _TRITON
from pq_fx.kernels.pack import pack, unpack
from pq_fx.kernels.rows import INTERPRETED

KEYS = (
    "int4:64:bf16",
    "int4:16:pow2",
    "int4:128:bf16",
    "int3:64:bf16",
    "int3:32:pow2",
    "int4f:64:bf16",
    "int4f:16:bf16",
    "int3f:32:bf16",
    "nvfp4:16:e4m3",
    "nvfp4:16:4over6",
    "mxfp4:32:e8m0",
    "fp8:0:fp32",
    "fp8:64:fp32",
    "int8:0:fp32",
    "int8:32:fp32",
)
LONG_ROW_KEYS = ("int4:64:bf16", "nvfp4:16:e4m3", "fp8:0:fp32")
SMALL_KEYS = ("int4:64:bf16", "int3:32:pow2", "int4f:64:bf16", "nvfp4:16:e4m3", "nvfp4:16:4over6")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def launcher(name: str) -> Callable[..., Any]:
    """The Triton launcher of an op, without PyTorch's dispatch; GPTQ's kernel, which is no op."""
    if name == "round_columns":
        return round_columns
    return getattr(import_module(_TRITON[name]), name)


def on_cuda(name: str, args: tuple[Any, ...]) -> Any:
    """Call an op as a model does, on a CUDA device."""
    op = getattr(torch.ops.pq, name) if name in _TRITON else launcher(name)
    return op(*to_device(args, "cuda"))


def interpreted(name: str, args: tuple[Any, ...]) -> Any:
    """Call an op's launcher on the CPU, in Triton's interpreter."""
    return launcher(name)(*to_device(args, "cpu"))


def to_device(args: tuple[Any, ...], device: str) -> list[Any]:
    """Arguments with their tensors on `device`, strides kept."""
    moved = []
    for a in args:
        if isinstance(a, Tensor):
            b = torch.empty_strided(a.size(), a.stride(), dtype=as_bytes(a).dtype, device=device)
            a = b.copy_(as_bytes(a)).view(a.dtype)
        moved.append(a)
    return moved


def random_rows(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal values with outlier channels, a row of zeros and a group of zeros."""
    x = torch.randn(shape)
    x *= torch.exp(torch.randn(shape[-1]))
    if x.numel() and x.shape[-2] > 2:
        x[..., 1, :] = 0
        x[..., 2, : x.shape[-1] // 2] = 0
    return x.to(dtype)


def random_perm(channels: int) -> Tensor:
    return torch.randperm(channels).to(torch.int32)


def activation_global(x: Tensor, fmt: Format) -> Tensor | None:
    if not fmt.two_level or x.numel() == 0:
        return None
    return reference.nvfp4_global_scale(x.float().abs().amax())


def carriers_of(fmt: Format) -> list[str]:
    """Carriers that hold a format."""
    return [c for c in CARRIERS if carries(c, fmt)]


def quantize_cases(key: str, small: bool, call: Call) -> Iterator[dict[str, Any]]:
    shapes = (
        ((3, 192), (0, 128)) if small else ((1, 128), (5, 384), (37, 1536), (0, 128), (3, 15360))
    )
    fmt = Format.parse(key)
    for carrier, rotate, permute in product(carriers_of(fmt), (False, True), (False, True)):
        for i, (rows, channels) in enumerate(shapes):
            if fmt.group_size and channels % fmt.group_size:
                continue
            if channels > 1024 and rotate != permute:
                continue
            if channels > 4096 and (carrier != "e4m3" or key not in LONG_ROW_KEYS):
                continue
            dtype = DTYPES[i % 3]
            x = random_rows(rows, channels, dtype=dtype)
            if rows == 5:  # rows of a slice of a wider tensor
                x = torch.cat([x, x], dim=-1)[:, channels:]
            perm = random_perm(channels) if permute else None
            rotation = (fmt.group_size or 64) if rotate else 0
            clip = torch.tensor(0.8) if rows in (3, 37) else None
            args = (x, perm, activation_global(x, fmt), clip, key, rotation, carrier)
            case = f"quantize {key} {carrier} {rows}x{channels} {dtype} p{permute:d} r{rotation}"
            # Tensor cores rotate rows of 16 bits: sums in another order.
            exact = rotation == 0 or dtype == torch.float32
            allowed = 0.0 if exact else BOUNDS.FLIPPED_CODES
            yield check_quantized(case, "quantize", args, call, allowed)


def act_cases(key: str, small: bool, call: Call) -> Iterator[dict[str, Any]]:
    channels, rows = (128, 3) if small else (1536, 41)
    fmt = Format.parse(key)
    every = key == KEYS[0] and not small
    acts = reference_ops.ACTIVATIONS if every else ("gelu_tanh", "none")
    for act, gated, permute in product(acts, (False, True), (False, True)):
        both = random_rows(2, rows, 2 * channels, dtype=torch.bfloat16)
        x, gate = both.chunk(2, dim=-1)
        perm = random_perm(channels) if permute else None
        rotation = (fmt.group_size or 64) if permute else 0
        before = None
        if gated == permute:  # rows joined on chip from two tensors
            before = random_rows(2, rows, channels // 2, dtype=torch.bfloat16)
            x, gate = x[..., channels // 2 :], gate[..., channels // 2 :]
        glob = activation_global(x, fmt)
        args = (x, gate if gated else None, act, before, perm, glob, None, key, rotation)
        exact = act in ("none", "relu") and rotation == 0
        case = f"act_quantize {key} {act} gate{gated:d} p{permute:d} r{rotation}"
        yield check_quantized(
            case, "act_quantize", (*args, "e4m3"), call, 0.0 if exact else BOUNDS.FLIPPED_CODES
        )


def norm_cases(key: str, small: bool, call: Call) -> Iterator[dict[str, Any]]:
    channels, tokens = (192, 3) if small else (3072, 29)
    fmt = Format.parse(key)
    if fmt.group_size and channels % fmt.group_size:
        return
    for norm, carrier, permute in product(reference_ops.NORMS, carriers_of(fmt), (False, True)):
        x = random_rows(2, tokens, channels, dtype=torch.bfloat16)
        mods = torch.randn(2, 6 * channels).chunk(6, dim=-1)
        scale = mods[1].unsqueeze(1) if permute else mods[1]
        weight = torch.rand(channels) + 0.5 if permute else None
        bias = torch.randn(channels) if norm == "layer" and permute else None
        perm = random_perm(channels) if permute else None
        rotation = (fmt.group_size or 64) if permute else 0
        glob = torch.tensor(0.004) if fmt.two_level else None
        clip = torch.tensor(0.7) if permute else None
        head = (x, norm, weight, bias, 1e-6, scale, mods[0])
        args = (*head, perm, glob, clip, key, rotation, carrier)
        case = f"norm_quantize {key} {norm} {carrier} p{permute:d} r{rotation}"
        yield check_quantized(case, "norm_quantize", args, call, BOUNDS.FLIPPED_CODES)


def random_weight(rows: int, channels: int, fmt: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    w = random_rows(rows, channels, dtype=torch.float32)
    glob = activation_global(w, fmt)
    q = reference.quantize(w, fmt, global_scale=glob)
    packed = pack(q.codes, fmt)
    if not torch.equal(unpack(packed, fmt, channels), q.codes):
        raise CheckFailed(f"pack and unpack of {fmt.key} are no inverses")
    return packed, q.scale, glob


def check_output(
    case: str, name: str, args: tuple[Any, ...], call: Call, bound: float
) -> dict[str, Any]:
    expected = getattr(reference_ops, name)(*args)
    out = call(name, args).cpu()
    if INTERPRETED and out.dtype == torch.bfloat16:
        bound = BOUNDS.INTERPRETER_BF16_ERROR
    if out.shape != expected.shape or out.dtype != expected.dtype:
        raise CheckFailed(f"{case}: {out.shape} {out.dtype}, expected {expected.shape}")
    if not bool(out.isfinite().all()):
        raise CheckFailed(f"{case}: the output is not finite")
    error = 0.0
    if out.numel():
        difference = out.double() - expected.double()
        error = float(difference.norm() / expected.double().norm())
    if not error <= bound:
        raise CheckFailed(f"{case}: relative error {error:.2e} above {bound:.0e}")
    return {"case": case, "relative_error": error, "allowed": bound}


def linear_cases(key: str, small: bool, call: Call) -> Iterator[dict[str, Any]]:
    sizes = (
        ((3, 48, 128), (5, 37, 128), (0, 16, 128))
        if small
        else ((33, 80, 384), (1, 48, 128), (7, 37, 384), (0, 16, 128), (200, 320, 3072))
    )
    fmt = Format.parse(key)
    for carrier, (m, n, k) in product(CARRIERS, sizes):
        weight, weight_scale, weight_global = random_weight(n, k, fmt)
        for activation, dtype in (
            (key, torch.bfloat16),
            ("fp8:0:fp32", torch.float16),
            (key, torch.float32),
        ):
            act = Format.parse(activation)
            if not carries(carrier, act):
                continue
            x = random_rows(2, m, k, dtype=torch.bfloat16)
            glob = activation_global(x, act)
            data, scale = reference_ops.quantize(x, None, glob, None, activation, 0, carrier)
            bias = torch.randn(n).to(dtype) if m != 7 else None
            args = (data, scale, glob, activation, weight, weight_scale, weight_global, key, bias)
            case = f"linear {activation} x {key} {carrier} {2 * m}x{n}x{k} {dtype}"
            bound = BOUNDS.FP8_OUTPUT_ERROR
            if carrier != "e4m3":
                bound = BOUNDS.OUTPUT_ERROR[str(dtype).removeprefix("torch.")]
            yield check_output(case, "linear", (*args, dtype), call, bound)


def weight_only_cases(key: str, small: bool, call: Call) -> Iterator[dict[str, Any]]:
    rows = (1, 5) if small else (0, 1, 2, 5, 17, 64, 100)
    n, k = (37, 128) if small else (333, 384)
    fmt = Format.parse(key)
    for dtype, m in product(DTYPES[:1] if small else DTYPES, rows):
        weight, weight_scale, weight_global = random_weight(n, k, fmt)
        x = random_rows(m, 2 * k, dtype=dtype)[:, k:]
        bias = torch.randn(n).to(dtype) if m % 2 else None
        table = BOUNDS.OUTPUT_ERROR if m <= 64 else BOUNDS.DECODED_WEIGHT_ERROR
        bound = table[str(dtype).removeprefix("torch.")]
        args = (x, weight, weight_scale, weight_global, key, bias)
        case = f"linear_weight_only {key} {m}x{n}x{k} {dtype}"
        yield check_output(case, "linear_weight_only", args, call, bound)
