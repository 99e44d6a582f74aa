"""What Inductor gets for CUDA: Triton kernels that it launches itself, and no opaque pq op. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

import pq_fx.inductor  # noqa: F401  (the rules under test)

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pq = torch.ops.pq
INT4 = "int4:64:bf16"
K, N = 512, 768


class _Hopper:
    """A driver that names a target and can do nothing else: what the mutation analysis of kernels asks for."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Hopper())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield
    driver._active = before


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        result = self.function(*args)
        return result if isinstance(result, tuple) else (result,)


def _functional_graph(function: Callable[..., Any], device: str) -> fx.Graph:
    """The graph that AOTAutograd would hand to Inductor for x [2, 96, K], modulation and a packed weight."""
    with FakeTensorMode(), torch.no_grad():
        half = {"device": device, "dtype": torch.bfloat16}
        args = (
            torch.empty(2, 96, K, **half),
            torch.empty(2, 1, K, **half),
            torch.empty(N, K // 2, device=device, dtype=torch.uint8),
            torch.empty(N, K // 64, **half),
            torch.empty(N, **half),
        )
        gm, _ = aot_export_module(_Call(function), args, trace_joint=False)
    return gm.graph


def _tail(op: Any) -> tuple[Any, ...]:
    """perm, global_scale and whatever else is optional, then format, rotation, carrier."""
    names = [a.name for a in op._schema.arguments]
    return (*[None] * (names.index("format") - names.index("perm")), INT4, 64, "e4m3")


def _norm(x: Tensor, mod: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Any:
    return pq.norm_quantize(
        x, "layer", None, None, 1e-6, mod, mod, *_tail(pq.norm_quantize.default)
    )


def _quantize(x: Tensor, mod: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Any:
    return pq.quantize(x, *_tail(pq.quantize.default))


def _linear(x: Tensor, mod: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Any:
    data, scale = _quantize(x, mod, w, s, b)
    return pq.linear(data, scale, None, INT4, w, s, None, INT4, b, torch.bfloat16)


def _joint(x: Tensor, mod: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Any:
    data, scale = _quantize(x, mod, w, s, b)
    no = [None, None]
    return pq.linears(data, scale, None, INT4, [w, w], [s, s], no, INT4, [b, b], torch.bfloat16)


def _one_row(x: Tensor, mod: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Any:
    return pq.linear_weight_only(mod, w, s, None, INT4, b)


def _targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "kernels", "gemms"),
    [(_norm, 1, 0), (_quantize, 1, 0), (_linear, 2, 1), (_joint, 2, 1), (_one_row, 1, 0)],
)
def test_ops_become_kernels_that_write_only_their_outputs(
    hopper: None, function: Callable[..., Any], kernels: int, gemms: int
) -> None:
    graph = _functional_graph(function, "cuda")
    names = _targets(graph)
    assert not [n for n in names if n.startswith("pq.")]
    assert names.count("triton_kernel_wrapper_functional") == kernels
    assert names.count("aten._scaled_mm.default") == gemms
    for node in graph.nodes:
        if str(node.target) == "triton_kernel_wrapper_functional":
            # Anything else in this list would be copied before every launch.
            cloned = set(node.kwargs["tensors_to_clone"])
            outputs = {"data_ptr", "scale_ptr", "out_ptr", "row_ptr", "joint_ptr"}
            assert cloned <= outputs and cloned


@pytest.mark.parametrize(
    ("capability", "key", "carrier"),
    [
        ((8, 0), INT4, "int8"),
        ((10, 0), "mxfp4:32:e8m0", "e2m1"),
        ((8, 0), "mxfp4:32:e8m0", "codes"),
    ],
)
def test_other_carriers_become_kernels_too(
    hopper: None,
    capability: tuple[int, int],
    key: str,
    carrier: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    def linear(x: Tensor, mod: Tensor, w: Tensor, s: Tensor, b: Tensor) -> Any:
        norm = (x, "layer", None, None, 1e-6, mod, mod)
        data, scale = pq.norm_quantize(*norm, None, None, None, key, 32, carrier)
        if key != INT4:  # one byte a group
            s = torch.empty((N, K // 32), dtype=torch.uint8, device=x.device)
        return pq.linear(data, scale, None, key, w, s, None, key, b, torch.bfloat16)

    graph = _functional_graph(linear, "cuda")
    names = _targets(graph)
    assert not [n for n in names if n.startswith("pq.")]
    assert names.count("triton_kernel_wrapper_functional") == 2
    assert names.count("aten._scaled_mm.default") == 0
    assert {"aten.clone.default", "aten._to_copy.default"}.isdisjoint(names)


def test_nothing_is_copied_between_a_quantizer_and_its_gemm(hopper: None) -> None:
    copies = {
        "aten.clone.default",
        "aten._to_copy.default",
        "aten.copy.default",
        "aten.cat.default",
    }
    for function in (_linear, _joint):
        assert copies.isdisjoint(_targets(_functional_graph(function, "cuda")))


def test_on_a_cpu_the_ops_stay_for_their_decompositions() -> None:
    names = _targets(_functional_graph(_linear, "cpu"))
    assert [n for n in names if n.startswith("pq.")] == ["pq.quantize.default", "pq.linear.default"]


def test_export_keeps_the_ops() -> None:
    half = torch.bfloat16
    args = (
        torch.randn(2, 96, K, dtype=half),
        torch.randn(2, 1, K, dtype=half),
        torch.zeros(N, K // 2, dtype=torch.uint8),
        torch.ones(N, K // 64, dtype=half),
        torch.zeros(N, dtype=half),
    )
    with torch.no_grad():
        program = torch.export.export(_Call(_linear), args, strict=False).run_decompositions({})
    assert "pq.linear.default" in _targets(program.graph)
