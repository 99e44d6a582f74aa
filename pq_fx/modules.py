"""What a quantized model is made of: packed linears and the quantizers of their inputs, as ordinary modules.

Packed weights, scales and permutations are parameters without gradient, so Dynamo lifts them as graph inputs: one
compiled graph serves all blocks of a class, and `state_dict`, `.to()` and deep copies work without special cases. So
do offload hooks: by default accelerate moves parameters and leaves buffers behind. A cast to another dtype changes
the bias only; scales belong to the format. The modules only store; which operations are fused is decided by the graph
passes (passes/lower.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pq_fx.kernels.ops  # noqa: F401  (registers torch.ops.pq)
from pq_fx.errors import PQError
from pq_fx.kernels import devices
from pq_fx.kernels.formats import Format
from pq_fx.packed_state import PackedModule

_INFERENCE_ONLY = (
    "a quantized model is for inference only: its packed weights have no gradient. Call model.eval() to use it; to "
    "train, fine-tune the float model, or fuse a LoRA into it, and quantize again"
)


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value, requires_grad=False)


def _keeping_dtype(fn: Callable[[Tensor], Tensor], cast: tuple[Tensor | None, ...]) -> Callable:
    """`fn` of `Module._apply` (a move, a cast, or both) that casts no tensor but those in `cast`."""

    def apply(value: Tensor) -> Tensor:
        new = fn(value)
        return (
            new
            if any(value is c for c in cast) or new.dtype == value.dtype
            else value.to(new.device)
        )

    return apply


class ActivationQuantizer(PackedModule):
    """Quantizes one tensor for all linears that read it; those share this module, as one object.

    `perm` (int32 [channels]) reorders the channels and `rotation` applies the block Hadamard transform of that size
    afterwards (0: none); `global_scale` (float32 []) is nvfp4's scale of the whole tensor, fixed by calibration. `clip`
    (float32 [], None: 1) multiplies each group's largest magnitude before its scale is made from it: finer steps,
    and what lies beyond saturates. `smooth` (float32 [channels], None: 1) multiplies the tensor first, where
    smoothing could not be folded into what produces it: an operation of its own in the graph.
    """

    perm: Tensor | None
    global_scale: Tensor | None
    clip: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        channels: int,
        format: str,
        rotation: int = 0,
        perm: Tensor | None = None,
        global_scale: Tensor | None = None,
        clip: Tensor | None = None,
        smooth: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.format = Format.parse(format).key
        self.rotation = rotation
        self.register_parameter("perm", _parameter(perm))
        self.register_parameter("global_scale", _parameter(global_scale))
        self.register_parameter("clip", _parameter(clip))
        self.register_parameter("smooth", _parameter(smooth))

    @classmethod
    def empty(
        cls,
        channels: int,
        format: str,
        rotation: int,
        has_perm: bool,
        has_global_scale: bool,
        has_clip: bool = False,
        has_smooth: bool = False,
        device: torch.device | str | None = None,
    ) -> ActivationQuantizer:
        """An uninitialized quantizer for a checkpoint to fill."""
        perm = torch.empty(channels, dtype=torch.int32, device=device) if has_perm else None
        scale = torch.empty((), dtype=torch.float32, device=device) if has_global_scale else None
        clip = torch.empty((), dtype=torch.float32, device=device) if has_clip else None
        smooth = torch.empty(channels, dtype=torch.float32, device=device) if has_smooth else None
        return cls(channels, format, rotation, perm, scale, clip, smooth)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        return super()._apply(_keeping_dtype(fn, cast=()), recurse)

    def packed_settings(self) -> dict[str, Any]:
        """Channels, format and rotation."""
        return {"channels": self.channels, "format": self.format, "rotation": self.rotation}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantize x [..., channels] to (data, scale, global_scale), in the carrier of x's device (kernels/ops.py).

        The global scale is returned, not read by the linear, because an offload hook may take it back after this call.
        """
        carrier = devices.carrier(x.device, self.format)
        if self.smooth is not None:
            x = x * self.smooth.to(x.dtype)
        data, scale = torch.ops.pq.quantize(
            x, self.perm, self.global_scale, self.clip, self.format, self.rotation, carrier
        )
        whole = self.global_scale
        if whole is not None and not torch.compiler.is_compiling():
            whole = (
                whole.detach()
            )  # diffusers' hooks change the parameter in place, but not an alias of it
        return data, scale, whole

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        order = "reordered" if self.perm is not None else "in order"
        return f"{self.channels}, {self.format}, {order}, rotation={self.rotation}"


class QuantLinear(PackedModule):
    """y = x W^T + b with packed weights; 4-bit activations where it has an input quantizer, else weights only.

    Parameters: `weight` uint8 [out_features, bytes], `weight_scale` [out_features, groups] in the format's scale dtype,
    `weight_global_scale` float32 [] or None, `bias` [out_features] or None. `low_rank_up` [out_features, r] and
    `low_rank_down` [r, in_features], or None: a 16-bit branch x -> x down^T up^T beside the packed weight (SVDQuant).
    Inference only.
    """

    castable: ClassVar[tuple[str, ...]] = ("bias", "low_rank_up", "low_rank_down")
    codes: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    bias: Tensor | None
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: str,
        weight: Tensor,
        weight_scale: Tensor,
        weight_global_scale: Tensor | None,
        bias: Tensor | None,
        input_quantizer: ActivationQuantizer | None,
        low_rank_up: Tensor | None = None,
        low_rank_down: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = Format.parse(weight_format).key
        # The bias goes first: libraries take a model's dtype from its first float parameter.
        self.register_parameter("bias", _parameter(bias))
        self.register_parameter("weight", _parameter(weight))
        self.register_parameter("weight_scale", _parameter(weight_scale))
        self.register_parameter("weight_global_scale", _parameter(weight_global_scale))
        self.register_parameter("low_rank_up", _parameter(low_rank_up))
        self.register_parameter("low_rank_down", _parameter(low_rank_down))
        self.input_quantizer = input_quantizer
        self.training = False

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        weight_format: str,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> QuantLinear:
        """An uninitialized linear for a checkpoint to fill; its input quantizer is set by the caller."""
        fmt = Format.parse(weight_format)
        return cls(
            in_features,
            out_features,
            fmt.key,
            torch.empty(
                out_features, fmt.packed_bytes(in_features), dtype=torch.uint8, device=device
            ),
            torch.empty(
                out_features, fmt.groups(in_features), dtype=fmt.scale_dtype, device=device
            ),
            torch.empty((), dtype=torch.float32, device=device) if fmt.two_level else None,
            torch.empty(out_features, dtype=dtype, device=device) if bias else None,
            None,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        return super()._apply(
            _keeping_dtype(fn, (self.bias, self.low_rank_up, self.low_rank_down)), recurse
        )

    def packed_settings(self) -> dict[str, Any]:
        """Input channels and format."""
        return {"in_features": self.in_features, "weight_format": self.weight_format}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        if self.training:
            raise PQError(_INFERENCE_ONLY)
        y = self._packed(x)
        if self.low_rank_up is not None and self.low_rank_down is not None:
            y = y + F.linear(F.linear(x, self.low_rank_down), self.low_rank_up)
        return y

    def _packed(self, x: Tensor) -> Tensor:
        quantizer = self.input_quantizer
        if quantizer is None:
            return torch.ops.pq.linear_weight_only(
                x,
                self.weight,
                self.weight_scale,
                self.weight_global_scale,
                self.weight_format,
                self.bias,
            )
        data, scale, global_scale = quantizer(x)
        y = torch.ops.pq.linear(
            data,
            scale,
            global_scale,
            quantizer.format,
            self.weight,
            self.weight_scale,
            self.weight_global_scale,
            self.weight_format,
            self.bias,
            x.dtype,
        )
        if data.is_floating_point() or scale.is_floating_point() or not x.requires_grad:
            return y
        # Autograd cannot follow two integer tensors: without this, x would get a gradient that lacks this linear.
        return torch.ops.pq.inference_only(y, x)

    def train(self, mode: bool = True) -> QuantLinear:
        """Quantized linears have no gradient; asking for training is an error, not a silent no-op."""
        super().train(mode)  # also where it raises: modules around have changed, calls must fail
        if mode:
            raise PQError(_INFERENCE_ONLY)
        return self

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.weight_format}"


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linears of a model by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
