"""How bench/kernel_cases.py compares bytes of a quantize op with the reference's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pq_fx.kernels import reference_ops
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import unpack


def thresholds() -> Any:
    path = Path(__file__).resolve().parent.parent / "tests" / "thresholds.py"
    spec = importlib.util.spec_from_file_location("thresholds", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOUNDS = thresholds()


class CheckFailed(AssertionError):
    """A kernel disagrees with the reference; the message names the case."""


Call = Callable[[str, tuple[Any, ...]], Any]


def as_bytes(x: Tensor) -> Tensor:
    """float4_e2m1fn_x2 as uint8, since PyTorch neither copies nor compares it; others as they are."""
    return x.view(torch.uint8) if x.dtype == torch.float4_e2m1fn_x2 else x


def check_quantized(
    case: str, name: str, args: tuple[Any, ...], call: Call, allowed: float
) -> dict[str, Any]:
    """Run a quantize op on both devices, compare bytes; `allowed` is the share that may differ.

    Bytes under a scale that moved by one step (its group's or row's largest value did) are not
    counted; at most one scale, or BOUNDS.MOVED_SCALES of them (MOVED_SCALES_ROTATED), may move.
    """
    expected_data, expected_scale = getattr(reference_ops, name)(*args)
    data, scale = call(name, args)
    data, scale = as_bytes(data).cpu().view(data.dtype), scale.cpu()
    if data.shape != expected_data.shape or scale.shape != expected_scale.shape:
        raise CheckFailed(f"{case}: shapes {data.shape}, {scale.shape}")
    if data.dtype != expected_data.dtype or scale.dtype != expected_scale.dtype:
        raise CheckFailed(f"{case}: dtypes {data.dtype}, {scale.dtype}")
    if scale.dtype != torch.uint8 and not bool(scale.float().isfinite().all()):
        raise CheckFailed(f"{case}: a scale is not finite")
    found, expected, negative_zero = _comparable(data), _comparable(expected_data), 0
    if data.dtype == torch.float8_e4m3fn:
        negative_zero = 0x80
    elif Format.parse(args[-3]).element == "e2m1" and data.dtype != torch.int8:
        negative_zero = 0x08
    different = found != expected
    if allowed > 0.0:  # exp and erf near zero: the sign of a zero is not a step
        different &= (found | expected) != negative_zero
    # fp32 scales differ by sums in another order; a step of a 16-bit value is at least 2^-11.
    apart = (scale.double() - expected_scale.double()).abs()
    moved = apart > (1e-5 if allowed > 0.0 else 0.0) * expected_scale.double().abs()
    if not _one_step(scale, expected_scale, Format.parse(args[-3])):
        raise CheckFailed(f"{case}: a scale is more than a step off")
    if moved.any():
        different &= ~moved.repeat_interleave(different.shape[-1] // scale.shape[-1], dim=-1)
    share = float(different.float().mean()) if data.numel() else 0.0
    scales = float(moved.float().mean()) if scale.numel() else 0.0
    rotated = scale.dtype == torch.float32 and args[-2] > 0
    some = BOUNDS.MOVED_SCALES_ROTATED if rotated else BOUNDS.MOVED_SCALES
    most = max(1.0, some * scale.numel()) if allowed > 0.0 else 0.0
    if share > allowed or float(moved.sum()) > most:
        raise CheckFailed(f"{case}: {share:.2e} of the codes, {scales:.2e} of the scales differ")
    return {"case": case, "codes_differ": share, "scales_differ": scales, "allowed": allowed}


def _one_step(scale: Tensor, expected: Tensor, fmt: Format) -> bool:
    """Whether scales are a step apart at most: a power of two, or what a bf16 step of the largest value makes.

    Signs do not count: that of int4f's goes with the larger of two elements a step apart. Under 4over6 a step of an
    element can turn the choice between two scales, of which one is 1.5 times the other.
    """
    if scale.dtype == torch.uint8:  # e8m0 exponents
        return bool(((scale.int() - expected.int()).abs() <= 1).all())
    found, wanted = scale.double().abs(), expected.double().abs()
    part = 2.0**-3 if scale.dtype == torch.float8_e4m3fn else 2.0**-6
    near = (found - wanted).abs() <= part * wanted.abs()
    if fmt.scale == "4over6":
        for other in (1.5 * wanted, wanted / 1.5):
            near |= (found - other).abs() <= part * other
    return bool((near | (found == 2 * wanted) | (2 * found == wanted)).all())


def _comparable(data: Tensor) -> Tensor:
    """Data of any carrier as one byte an element."""
    found = data.view(torch.uint8)
    if data.dtype == torch.float4_e2m1fn_x2:
        return unpack(found, Format.parse("mxfp4:32:e8m0"), found.shape[-1] * 2)
    return found
