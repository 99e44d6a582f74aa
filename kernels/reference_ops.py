"""Plain-PyTorch definition of the ops in namespace ``pq``: same arguments, any device, traceable.

These run on a CPU, are the decompositions that Inductor compiles there, and are what the Triton
kernels are tested against. Norms, activations and products are fp32; they agree with a kernel up to
the order of fp32 sums, everything after them step by step (`pq_fx.kernels.reference`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_fx.errors import ConfigError, FormatError
from pq_fx.kernels.carriers import (
    carried_values,
    carrier_of,
    carry,
    channels_carried,
    check_carrier,
)
from pq_fx.kernels.formats import Format
from pq_fx.kernels.pack import channels_of
from pq_fx.kernels.reference import permute_rotate
from pq_fx.kernels.reference import quantize as quantize_groups
from pq_fx.kernels.values import (
    apply_scale,
    fold_scale,
    packed_values,
    round_bf16,
    round_to,
    scale_values,
)

NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "none")


def quantize(
    x: Tensor,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
) -> tuple[Tensor, Tensor]:
    """Gather channels by `perm`, rotate, quantize; returns (data, scale) in the carrier's form.

    Args:
        x: float [..., K].
        perm: int32 or int64 [K] or None.
        global_scale: fp32 [], nvfp4 only, or None.
        clip: fp32 [], a ratio: scales are computed from clip * amax of their group, and elements
            beyond saturate. None = 1.
        format: a format key.
        rotation: block-Hadamard size in channels, 0 = none.
        carrier: the form of (data, scale), see `pq_fx.kernels.carriers`.

    Raises:
        FormatError: K does not fit the format or the rotation, or the carrier cannot hold the format.
        ConfigError: unknown carrier.
    """
    fmt = Format.parse(format)
    check_carrier(carrier, fmt)
    fmt.check_channels(x.shape[-1])
    y = permute_rotate(x.float(), perm, rotation)
    q = quantize_groups(y, fmt, global_scale=global_scale, clip=clip)
    return carry(q, fmt, carrier)


def norm_quantize(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
) -> tuple[Tensor, Tensor]:
    """Layer or RMS norm over the last axis, affine, modulation in fp32, then `quantize`.

    What is quantized is rounded to x's dtype first, as a float model hands it to its linear.

    ``y = norm(x) * weight + bias``, then ``y * (1 + mod_scale) + mod_shift``; weight and bias [K];
    mod_* [B, 1, K] or [B, K], one row for all tokens of a batch entry of x [B, ..., K].

    Raises:
        ConfigError: unknown norm or carrier.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("norm", norm, NORMS)
    channels = x.shape[-1]
    wide = x.float()
    if norm == "layer":
        y = F.layer_norm(wide, (channels,), eps=eps)
    else:
        y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    if mod_scale is not None:
        y = y * (_per_token(mod_scale, x).float() + 1.0)
    if mod_shift is not None:
        y = y + _per_token(mod_shift, x).float()
    return quantize(round_to(y, x.dtype), perm, global_scale, clip, format, rotation, carrier)


def act_quantize(
    x: Tensor,
    gate: Tensor | None,
    act: str,
    before: Tensor | None,
    perm: Tensor | None,
    global_scale: Tensor | None,
    clip: Tensor | None,
    format: str,
    rotation: int,
    carrier: str,
) -> tuple[Tensor, Tensor]:
    """``cat([before, act(x) * gate], -1)`` in fp32, then `quantize` of that whole row.

    What is quantized is rounded to x's dtype first, as a float model hands it to its linear.

    Args:
        x: float [..., K - B], B the channels of `before`.
        gate: shaped like x, or None.
        before: float [..., B], leading axes as x, or None (B = 0): channels that come first, as in
            transformer blocks whose last linear reads attention and MLP at once.

    Raises:
        ConfigError: unknown activation function or carrier.
        FormatError: K does not fit the format or the rotation.
    """
    check_choice("act", act, ACTIVATIONS)
    y = x.float()
    if act == "gelu":
        y = F.gelu(y)
    elif act == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif act == "silu":
        y = F.silu(y)
    elif act == "relu":
        y = F.relu(y)
    if gate is not None:
        y = y * gate.float()
    if before is not None:
        y = torch.cat([before.float(), y], dim=-1)
    return quantize(round_to(y, x.dtype), perm, global_scale, clip, format, rotation, carrier)


def linear(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    weight_format: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ W^T + bias`` of a quantized activation and a packed weight; fp32, returned in `dtype`.

    data, scale: as `quantize` returns them; data's dtype tells the carrier. weight uint8
    [N, K * bits / 8], weight_scale [N, K / g]. The exact carriers: both are dequantized exactly.
    Carrier "e4m3": the weight is brought into that carrier too (rounded to e4m3 with row scales w),
    and the result is ``(data @ weight^T) * scale * w + bias``, as fp8 tensor cores compute it.

    Raises:
        FormatError: data is of no carrier, or the weight holds another number of channels.
    """
    carrier = carrier_of(data)
    values, weight_s = _weight(
        weight, weight_scale, weight_global_scale, weight_format, channels_carried(data)
    )
    wide_bias = None if bias is None else bias.float()
    if carrier == "e4m3":
        operand, row = fold_scale(values, weight_s, Format.parse(weight_format))
        y = F.linear(data.float(), operand.float()) * scale * row.squeeze(-1)
        return _cast(y if wide_bias is None else y + wide_bias, dtype)
    fmt = Format.parse(format)
    x = apply_scale(carried_values(data, fmt), scale_values(scale, fmt, global_scale))
    return _cast(F.linear(x, apply_scale(values, weight_s), wide_bias), dtype)


def linears(
    data: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    format: str,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    weight_global_scales: Sequence[Tensor | None],
    weight_format: str,
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """`linear` with each weight, concatenated: [..., sum N_i]; the weights share one format."""
    parts = [
        linear(data, scale, global_scale, format, w, s, g, weight_format, b, dtype)
        for w, s, g, b in zip(weights, weight_scales, weight_global_scales, biases, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def linear_weight_only(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    weight_format: str,
    bias: Tensor | None,
) -> Tensor:
    """``x @ dequantize(weight)^T + bias`` for float x [..., K]; fp32 products, x.dtype out."""
    values, weight_s = _weight(
        weight, weight_scale, weight_global_scale, weight_format, x.shape[-1]
    )
    wide_bias = None if bias is None else bias.float()
    return _cast(F.linear(x.float(), apply_scale(values, weight_s), wide_bias), x.dtype)


def check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def check_weight(weight: Tensor, fmt: Format, channels: int) -> None:
    """Raise FormatError unless packed `weight` holds rows of `channels` channels."""
    if weight.dtype != torch.uint8 or weight.dim() != 2:
        raise FormatError(
            f"a packed weight is uint8 of 2 axes, got {weight.dtype} of {weight.dim()} axes"
        )
    if channels_of(weight, fmt) != channels:
        raise FormatError(
            f"the input has K={channels} channels but the {fmt.key} weight holds "
            f"{channels_of(weight, fmt)}; was the weight packed in another format?"
        )


def _weight(
    weight: Tensor, scale: Tensor, global_scale: Tensor | None, key: str, channels: int
) -> tuple[Tensor, Tensor]:
    """Elements fp32 [N, K] and group scales fp32 [N, G] of a packed weight."""
    fmt = Format.parse(key)
    check_weight(weight, fmt, channels)
    return packed_values(weight, fmt, channels), scale_values(scale, fmt, global_scale)


def _cast(y: Tensor, dtype: torch.dtype) -> Tensor:
    # Rounded by itself: a compiled consumer of this output would else see it unrounded.
    return round_bf16(y).to(dtype) if dtype == torch.bfloat16 else y.to(dtype)


def _per_token(mod: Tensor, x: Tensor) -> Tensor:
    """Give a modulation [B, K] the axes of x [B, ..., K], so that it broadcasts over tokens."""
    if mod.dim() == 2 and x.dim() > 2:
        return mod.reshape(mod.shape[0], *([1] * (x.dim() - 2)), mod.shape[1])
    return mod
