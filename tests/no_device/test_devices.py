"""Which carrier a device gets, and that what it cannot do is refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pq_fx.kernels.ops as pq_ops
from pq_fx.errors import UnsupportedDeviceError
from pq_fx.kernels.devices import TABLE, execution
from pq_fx.kernels.formats import get_format

INT4, FP8, INT8 = get_format("int4"), get_format("fp8"), get_format("int8")


@pytest.mark.parametrize(
    ("capability", "carrier", "ran"),
    [
        ((8, 0), "int8", False),
        ((8, 6), "int8", False),
        ((8, 9), "e4m3", False),
        ((9, 0), "e4m3", True),
        ((10, 0), "codes", False),
        ((12, 0), "codes", False),
    ],
)
def test_cuda(capability: tuple[int, int], carrier: str, ran: bool) -> None:
    cuda = torch.device("cuda", 0)
    found = execution(cuda, INT4, INT4, capability=capability)
    assert (found.carrier, found.on_hardware) == (carrier, ran)
    assert found.device == f"sm_{capability[0]}{capability[1]}"
    assert execution(cuda, INT4, None, capability=capability).carrier is None
    if capability >= (10, 0):
        for name in ("nvfp4", "mxfp4"):
            fmt = get_format(name)
            native = execution(cuda, fmt, fmt, capability=capability)
            assert native.carrier == "e2m1" and "block-scaled" in native.path


def test_cpu() -> None:
    assert execution(torch.device("cpu"), INT4, INT4).carrier == "codes"
    assert execution("cpu", INT8, INT8).on_hardware
    assert execution("cpu", INT4, None).carrier is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 1), (13, 0)])
def test_unknown_gpus_are_refused_with_the_alternatives(capability: tuple[int, int]) -> None:
    with pytest.raises(
        UnsupportedDeviceError, match=r"sm_\d+\) has no 4-bit path.*sm_90.*to\('cpu'\)"
    ):
        execution(torch.device("cuda", 0), INT4, INT4, capability=capability)


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta"])
def test_other_devices_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedDeviceError, match=f"{kind}.*supported: {', '.join(TABLE)}"):
        execution(torch.device(kind), INT4, INT4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(UnsupportedDeviceError, match="finds no CUDA device; use 'cpu'"):
        execution(torch.device("cuda"), INT4, INT4)


@pytest.mark.parametrize(("weight", "activation"), [(INT8, INT8), (INT4, INT8), (INT8, FP8)])
def test_fp8_tensor_cores_refuse_int8(weight, activation) -> None:
    with pytest.raises(UnsupportedDeviceError, match="int8:0:fp32 (weights|activations).*'fp8'"):
        execution(torch.device("cuda"), weight, activation, capability=(9, 0))
    ampere = execution(torch.device("cuda"), weight, activation, capability=(8, 0))
    assert ampere.carrier == ("codes" if activation is FP8 else "int8")
    assert execution(torch.device("cuda"), INT4, FP8, capability=(9, 0)).carrier == "e4m3"


def test_missing_triton_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", *pq_ops._TRITON.values()):
        monkeypatch.setitem(sys.modules, name, None if name == "triton" else sys.modules.get(name))
    monkeypatch.setattr(pq_ops, "_TRITON", dict.fromkeys(pq_ops._TRITON, "triton"))
    launch = pq_ops._triton_launcher("quantize")
    with pytest.raises(UnsupportedDeviceError, match=r"pq::quantize on cpu needs Triton.*CPU"):
        launch(torch.zeros(1, 64))


def test_the_package_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, pq_fx.kernels.ops;"
        "torch.ops.pq.quantize(torch.ones(1, 64), None, None, None, 'int4:64:bf16', 64, 'codes')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
