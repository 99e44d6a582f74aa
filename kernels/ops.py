"""Ops of pq_fx in namespace ``pq``: schemas, shapes, dispatch to the reference or to Triton.

Importing this module registers them. On a CPU an op runs the plain-PyTorch reference; on CUDA the
Triton launcher of the same name, imported when the first CUDA tensor arrives. Compiled for a CPU,
Inductor replaces the ops by `decompositions`. The ops are functional and for inference: a backward
pass through one raises PQError. mxfp4 activations as "codes" are two uint8 tensors, which autograd
cannot follow: `inference_only(y, x)`, y with a tie to x, keeps their input from a partial gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor

from pq_fx.errors import PQError, UnsupportedDeviceError
from pq_fx.kernels import reference_ops
from pq_fx.kernels.carriers import channels_carried, check_carrier, data_dtype, data_width
from pq_fx.kernels.formats import Format

_TAIL = "Tensor? perm, Tensor? global_scale, Tensor? clip, str format, int rotation, str carrier"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? weight_global_scale, str weight_format"
_SCHEMAS = {
    "quantize": f"(Tensor x, {_TAIL}) -> (Tensor, Tensor)",
    "norm_quantize": "(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, "
    f"Tensor? mod_scale, Tensor? mod_shift, {_TAIL}) -> (Tensor, Tensor)",
    "act_quantize": f"(Tensor x, Tensor? gate, str act, Tensor? before, {_TAIL}) -> (Tensor, Tensor)",
    "linear": "(Tensor data, Tensor scale, Tensor? global_scale, str format, "
    f"{_WEIGHT}, Tensor? bias, ScalarType dtype) -> Tensor",
    "linears": "(Tensor data, Tensor scale, Tensor? global_scale, str format, Tensor[] weights, "
    "Tensor[] weight_scales, Tensor?[] weight_global_scales, str weight_format, Tensor?[] biases, "
    "ScalarType dtype) -> Tensor",
    "linear_weight_only": f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
}


def _in_fp32(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as it is outside autocast, which would compute its fp32 products in 16 bits."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return reference(*args)
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    return run


_REFERENCE = {name: _in_fp32(getattr(reference_ops, name)) for name in _SCHEMAS}
# Where the Triton launchers live; looked up when a CUDA tensor arrives, so a CPU needs no Triton.
_TRITON = {
    "quantize": "pq_fx.kernels.activation_quantize",
    "norm_quantize": "pq_fx.kernels.norm_quantize",
    "act_quantize": "pq_fx.kernels.activation_quantize",
    "linear": "pq_fx.kernels.linear",
    "linears": "pq_fx.kernels.linear",
    "linear_weight_only": "pq_fx.kernels.gemv",
}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every op with its plain-PyTorch form, for Inductor on a CPU: {OpOverload: function}."""
    return {getattr(torch.ops.pq, name).default: fn for name, fn in _REFERENCE.items()}


def launchers() -> dict[Any, Callable[..., Any]]:
    """Every op with its launcher on CUDA, {OpOverload: function}; Triton is imported when called."""
    return {getattr(torch.ops.pq, name).default: _triton_launcher(name) for name in _TRITON}


def _quantized_fake(x: Tensor, key: str, carrier: str, more: int = 0) -> tuple[Tensor, Tensor]:
    """Shapes of a quantize op on x [..., K - more]: nothing is asked of a symbolic size."""
    fmt = Format.parse(key)
    check_carrier(carrier, fmt)
    channels = x.shape[-1] + more
    if isinstance(channels, int):
        fmt.check_channels(channels)
    size = (*x.shape[:-1], data_width(carrier, channels))
    data = x.new_empty(size, dtype=data_dtype(carrier))
    if carrier == "e4m3":
        return data, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return data, x.new_empty((*x.shape[:-1], fmt.groups(channels)), dtype=fmt.scale_dtype)


def _quantize_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _quantized_fake(x, rest[-3], rest[-1])


def _norm_quantize_fake(x: Tensor, norm: str, *rest: Any) -> tuple[Tensor, Tensor]:
    reference_ops.check_choice("norm", norm, reference_ops.NORMS)
    return _quantized_fake(x, rest[-3], rest[-1])


def _act_quantize_fake(
    x: Tensor, gate: Tensor | None, act: str, before: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    reference_ops.check_choice("act", act, reference_ops.ACTIVATIONS)
    return _quantized_fake(x, rest[-3], rest[-1], 0 if before is None else before.shape[-1])


def _linear_fake(
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
    return _linear_output(data, weight, weight_format, dtype)


def _linears_fake(
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
    for weight in weights:
        _linear_output(data, weight, weight_format, dtype)
    return data.new_empty((*data.shape[:-1], sum(w.shape[0] for w in weights)), dtype=dtype)


def _linear_weight_only_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global_scale: Tensor | None,
    weight_format: str,
    bias: Tensor | None,
) -> Tensor:
    return _linear_output(x, weight, weight_format, x.dtype)


def _linear_output(x: Tensor, weight: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    fmt = Format.parse(key)
    if isinstance(x.shape[-1], int) and isinstance(weight.shape[-1], int):
        reference_ops.check_weight(weight, fmt, channels_carried(x))
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _quantize_fake,
    "norm_quantize": _norm_quantize_fake,
    "act_quantize": _act_quantize_fake,
    "linear": _linear_fake,
    "linears": _linears_fake,
    "linear_weight_only": _linear_weight_only_fake,
}


def _triton_launcher(name: str) -> Callable[..., Any]:
    """Kernel for CUDA tensors that imports its Triton module at its first call."""
    launcher: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            try:
                launcher = getattr(import_module(_TRITON[name]), name)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "triton":
                    raise
                raise UnsupportedDeviceError(
                    f"pq::{name} on {_device_of(args)} needs Triton, which is not installed; "
                    "install it (pip install triton) or move the model to the CPU, where the "
                    "plain-PyTorch reference runs"
                ) from error
        return launcher(*args)

    return launch


def _other_device(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any) -> NoReturn:
        raise UnsupportedDeviceError(
            f"pq::{name} has no kernel for {_device_of(args)}; supported: cpu, cuda"
        )

    return refuse


def _device_of(args: tuple[Any, ...]) -> str:
    devices = {str(a.device): None for a in args if isinstance(a, Tensor)}
    return " and ".join(devices) or "no device"


def _inference_only(name: str) -> tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]:
    """setup_context and backward of an op without gradients.

    The error is raised by an op that the backward inserts, not by the backward itself: a compiled
    forward in grad mode is traced together with its backward, and must still run.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.like = [(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else None for a in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        known = [g for g in grads if g is not None]
        if not known:
            return tuple(None for _ in ctx.like)
        return tuple(
            torch.ops.pq.no_gradient(known[0], *like, name) if like is not None and needed else None
            for like, needed in zip(ctx.like, ctx.needs_input_grad, strict=True)
        )

    return setup_context, backward


def _no_gradient(grad: Tensor, size: list[int], dtype: torch.dtype, name: str) -> NoReturn:
    raise PQError(
        f"backward through pq::{name}: quantized ops are for inference only and have no gradient; "
        "call the model under torch.no_grad() or torch.inference_mode(), or train the float model"
    )


def _no_gradient_fake(grad: Tensor, size: list[int], dtype: torch.dtype, name: str) -> Tensor:
    return grad.new_empty(size, dtype=dtype)


def _register() -> torch.library.Library:
    library = torch.library.Library("pq", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "no_gradient(Tensor grad, SymInt[] size, ScalarType dtype, str name) -> Tensor", tags=tags
    )
    library.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")
    torch.library.register_fake("pq::no_gradient", _no_gradient_fake, lib=library)
    library.define("inference_only(Tensor y, Tensor x) -> Tensor", tags=tags)
    library.impl("inference_only", lambda y, x: y.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("pq::inference_only", lambda y, x: y.clone(), lib=library)
    setup_context, backward = _inference_only("linear")
    torch.library.register_autograd(
        "pq::inference_only", backward, setup_context=setup_context, lib=library
    )
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=tags)
        library.impl(name, _REFERENCE[name], "CPU")
        library.impl(name, _triton_launcher(name), "CUDA")
        library.impl(name, _other_device(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pq::{name}", _FAKES[name], lib=library)
        setup_context, backward = _inference_only(name)
        torch.library.register_autograd(
            f"pq::{name}", backward, setup_context=setup_context, lib=library
        )
    return library


# Kept alive by the module: the ops vanish with their Library. A fragment, since passes/observe.py
# defines pq::observe in the same namespace.
_LIBRARY = _register()
