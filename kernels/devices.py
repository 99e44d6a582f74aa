"""What runs where: how a device carries quantized activations, as one table.

`execution` answers before any weight is loaded, and refuses by name what a device cannot do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pq_fx.errors import UnsupportedDeviceError
from pq_fx.kernels.carriers import carries
from pq_fx.kernels.formats import Format


@dataclass(frozen=True)
class Execution:
    """How linears run on a device.

    Attributes:
        device: "cpu" or the compute capability, e.g. "sm_90".
        carrier: form of quantized activations (`pq_fx.kernels.carriers`), None for weights only.
        path: what computes, in words.
        on_hardware: whether this path was run on that hardware; False = compiled or reasoned only.
    """

    device: str
    carrier: str | None
    path: str
    on_hardware: bool


@dataclass(frozen=True)
class _Row:
    carriers: tuple[str, ...]  # the first that holds the activations' format is taken
    on_hardware: bool


_PATHS = {
    "e4m3": "Triton decode and cuBLAS, fp8 tensor cores, group scales inside the e4m3 operands",
    "e2m1": "Triton, block-scaled 4-bit tensor cores (other weights: decoded, 16-bit tensor cores)",
    "int8": "Triton, lattice points as int8, int8 tensor cores",
    "codes": "Triton, code points decoded to 16 bits, 16-bit tensor cores",
}
TABLE: dict[str, _Row] = {
    "cpu": _Row(("codes",), True),
    "sm_80": _Row(("int8", "codes"), False),
    "sm_86": _Row(("int8", "codes"), False),
    "sm_89": _Row(("e4m3",), False),
    "sm_90": _Row(("e4m3",), True),
    "sm_100": _Row(("e2m1", "codes"), False),
    "sm_120": _Row(("e2m1", "codes"), False),
}
_CPU = "plain-PyTorch reference, compiled by Inductor"
_WEIGHTS_ONLY = "Triton, packed weights decoded in the kernel, 16-bit activations"


def execution(
    device: torch.device | str,
    weight_fmt: Format,
    activation_fmt: Format | None,
    *,
    capability: tuple[int, int] | None = None,
) -> Execution:
    """How linears with these formats run on `device`.

    Args:
        device: where the model is or will be.
        weight_fmt: format of the packed weights.
        activation_fmt: format of the quantized activations; None = weights only.
        capability: CUDA compute capability to assume instead of asking the driver (for planning
            on a machine without that GPU).

    Raises:
        UnsupportedDeviceError: the device, or these formats on it; names what to use instead.
    """
    device = torch.device(device)
    name = _name(device, capability)
    row = TABLE.get(name)
    if row is None:
        raise UnsupportedDeviceError(
            f"{device} ({name}) has no 4-bit path in pq_fx; supported: {', '.join(TABLE)}. "
            "Move the model to one of them, e.g. model.to('cpu'), or leave it in float"
        )
    if activation_fmt is None:
        return Execution(name, None, _CPU if name == "cpu" else _WEIGHTS_ONLY, row.on_hardware)
    if row.carriers[0] == "e4m3":
        for what, fmt in (("weights", weight_fmt), ("activations", activation_fmt)):
            if fmt.element == "int8":
                raise UnsupportedDeviceError(
                    f"{device} ({name}) computes in fp8, which cannot hold {fmt.key} {what}: 8-bit "
                    "integers have more significant bits than e4m3; use the format 'fp8' instead"
                )
    chosen = _first(row, activation_fmt)
    path = _CPU if name == "cpu" else _PATHS[chosen]
    return Execution(name, chosen, path, row.on_hardware)


def _first(row: _Row, fmt: Format) -> str:
    return next(c for c in row.carriers if carries(c, fmt))


def _name(device: torch.device, capability: tuple[int, int] | None) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None and capability is None:
        return "rocm"  # its "capabilities" look like NVIDIA's but name other hardware
    if capability is None:
        if not torch.cuda.is_available():
            raise UnsupportedDeviceError(
                f"{device} was asked for but this PyTorch finds no CUDA device; use 'cpu', or "
                "install a CUDA build of PyTorch and a driver"
            )
        capability = torch.cuda.get_device_capability(device)
    return f"sm_{capability[0]}{capability[1]}"


@torch.compiler.assume_constant_result
def carrier(device: torch.device, format: str) -> str:
    """Carrier of activations quantized to `format` (a key) on `device`; a constant to Dynamo.

    Raises:
        UnsupportedDeviceError: as `execution`.
    """
    name = _name(torch.device(device), None)
    row = TABLE.get(name)
    if row is None:
        execution(device, Format("int4", 64, "bf16"), None)
        raise AssertionError(name)
    return _first(row, Format.parse(format))
