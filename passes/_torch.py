"""Every private or unstable import from torch, in one leaf file.

What each name is used for, and where it lives in torch 2.11 to 2.14, is said beside it; nothing else
in pq_fx may import from `torch._dynamo`, `torch._inductor`, `torch._guards` or `torch.fx.experimental`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from functools import cache
from threading import Lock
from types import CodeType
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.eval_frame import reset_code, skip_code
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    set_proxy_slot,
    snapshot_fake,
)
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

__all__ = [
    "PLAIN",
    "ConstantSource",
    "FakeTensor",
    "FakeTensorMode",
    "compile_fx",
    "decompose_when_functional",
    "detect_fake_mode",
    "dim_expr",
    "dynamo_code",
    "dynamo_piece",
    "dynamo_root",
    "dynamo_scope",
    "dynamo_value",
    "dynamo_wrapped",
    "every_graph",
    "get_data",
    "graph_breaks",
    "graphs_left",
    "hint",
    "is_fake",
    "is_traceable_wrapper_subclass",
    "lacks_compiler",
    "like",
    "list_mode_options",
    "make_fx",
    "proxy_tracer",
    "real_mode",
    "reset_code",
    "select_decomp_table",
    "skip_code",
    "statically_known_true",
    "trace_as",
    "trace_pre_dispatch",
    "traced_node",
    "unset_fake_temporarily",
]

# What Dynamo (2.11 to 2.14) writes for `tensor.data`.
get_data = torch._C._autograd._get_data_attr


def dim_expr(size: int | torch.SymInt) -> sympy.Expr:
    """The size of a dimension as a sympy expression; reading it adds no guard."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def hint(size: int | torch.SymInt, default: int = 1) -> int:
    """The size seen while tracing, without specializing on it; `default` where it is unbacked."""
    if isinstance(size, int):
        return size
    value = size.node.hint if size.node.has_hint() else None
    return default if value is None else int(value)


def is_fake(value: Any) -> bool:
    """Whether this is a fake tensor."""
    return isinstance(value, FakeTensor)


def real_mode() -> Any:
    """A context in which tensors are real: no fake mode, no functionalization, no dispatch modes."""
    return _disable_current_modes()


def trace_pre_dispatch(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode | None
) -> fx.GraphModule:
    """Trace `function` to ATen before any decomposition; `inputs` are fake tensors and SymInts."""
    with fx.traceback.preserve_node_meta():
        traced = make_fx(function, pre_dispatch=True)
        if mode is None:
            return traced(*inputs)
        with mode:
            return traced(*inputs)


# Tensors that a tracer knows by their metadata alone.
PLAIN = (FakeTensor,)


def proxy_tracer() -> Any:
    """What writes the graph while `trace_pre_dispatch` runs its function."""
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def traced_node(tensor: torch.Tensor, tracer: Any) -> fx.Node | None:
    """The node that stands for a fake tensor; None for one that the tracer does not know, or knows the value of."""
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None or slot.constant is not None else slot.proxy.node


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A new fake tensor with the metadata of this one."""
    new = snapshot_fake(tensor)
    assert new is not None
    return new


def trace_as(tensor: torch.Tensor, node: fx.Node, tracer: Any) -> None:
    """From now on `node` stands for this fake tensor."""
    set_proxy_slot(tensor, tracer, _ProxyTensor(fx.Proxy(node, tracer), None))


def decompose_when_functional(op: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Replace `op` by what `function` does with its arguments wherever AOTAutograd makes a graph functional.

    Kernels that write to tensors may be recorded there (`torch.library.wrap_triton`). `function` returns
    NotImplemented where the op is to stay. `torch.export` keeps every op, as it does for `torch.library.triton_op`.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not custom_triton_ops_decomposition_disabled():
            with mode:
                result = function(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return mode.__torch_dispatch__(op, types, args, kwargs)

    torch.library.register_torch_dispatch(op, FunctionalTensorMode, rule)


def lacks_compiler(error: BaseException | None) -> bool:
    """Whether Inductor failed because the machine has no C++ compiler."""
    from torch._inductor.exc import InvalidCxxCompiler

    while error is not None and not isinstance(error, InvalidCxxCompiler):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error is not None


def _translator() -> Any:
    """What Dynamo compiles a frame with just now, or None outside Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def dynamo_scope() -> dict[str, Any]:
    """The locals of the frame that Dynamo is compiling just now, as it was entered; empty outside Dynamo."""
    translator = _translator()
    return {} if translator is None else dict(translator.output.local_scope)


def dynamo_root() -> torch.nn.Module | None:
    """The module whose forward Dynamo is compiling just now (`self` of the root frame), or None."""
    root = dynamo_scope().get("self")
    return root if isinstance(root, torch.nn.Module) else None


def dynamo_code() -> CodeType | None:
    """The code of the frame that Dynamo is compiling just now."""
    translator = _translator()
    return None if translator is None else translator.f_code


def dynamo_wrapped() -> torch.nn.Module | None:
    """The module around whose forward the function is that Dynamo is compiling just now, as hooks put one; or None.

    Such a function is no method of a module and holds that one module (accelerate's and diffusers' `new_forward`).
    """
    modules = [v for v in dynamo_scope().values() if isinstance(v, torch.nn.Module)]
    return modules[0] if len(modules) == 1 and dynamo_root() is None else None


def dynamo_piece() -> tuple[bool, bool]:
    """Whether the graph that Dynamo hands over just now goes on after a graph break, and whether it ends at one."""
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX

    translator = _translator()
    if translator is None:
        return False, False
    resumes = translator.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)
    reason = translator.output.compile_subgraph_reason
    return resumes, reason is not None and reason.graph_break


def dynamo_value(node: fx.Node) -> Any:
    """The real argument behind a placeholder of Dynamo's graph, or None outside Dynamo."""
    grapharg = node.meta.get("grapharg")
    return None if grapharg is None else grapharg.example


_EVERY_GRAPH = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}
_every_graph_lock = Lock()
_every_graph_open: list[Any] = []  # what to close last, then a None for each further thread


@cache
def _threads_share_settings() -> bool:
    """Whether Dynamo's settings are one for all threads (torch 2.11) and not each thread's own."""
    from torch._dynamo import config

    with config.patch(recompile_limit=1 << 15):
        return Context().run(lambda: config.recompile_limit) == 1 << 15


@contextmanager
def every_graph() -> Iterator[None]:
    """While open, this thread's Dynamo compiles each graph, however many there are of one function.

    Beyond `recompile_limit` (8) graphs Dynamo runs a function eagerly, which would hide its linears. Where threads
    share the limit, the last one to leave sets it back.
    """
    from torch._dynamo import config

    with _every_graph_lock:
        shared = _threads_share_settings()
    if not shared:
        with config.patch(_EVERY_GRAPH):
            yield
        return
    with _every_graph_lock:
        _every_graph_open.append(None if _every_graph_open else config.patch(_EVERY_GRAPH))
        if len(_every_graph_open) == 1:
            _every_graph_open[0].__enter__()
    try:
        yield
    finally:
        with _every_graph_lock:
            last = _every_graph_open.pop()
            if last is not None:
                last.__exit__(None, None, None)


@contextmanager
def graph_breaks() -> Iterator[Counter[str]]:
    """While open, the reasons of Dynamo's graph breaks are counted in what this yields."""
    from torch._dynamo.utils import counters

    whole = counters["graph_break"].copy()
    reasons: Counter[str] = Counter()
    counters["graph_break"] = reasons
    try:
        yield reasons
    finally:
        counters["graph_break"] = whole + reasons


def graphs_left() -> int | None:
    """How many more graphs Dynamo will compile of the function that it compiles just now; None outside Dynamo."""
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    code = dynamo_code()
    return (
        None
        if code is None
        else config.recompile_limit - len(_debug_get_cache_entry_list(code)) - 1
    )
