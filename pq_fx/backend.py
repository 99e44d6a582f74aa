"""The torch.compile backend "permuquant".

On a quantized model it lowers: retrace, fuse, hand over to Inductor. On a float model, with `calibration_steps` in
its options, it calibrates in the first calls, converts, and lowers when Dynamo compiles the changed model again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from pq_fx import inductor
from pq_fx.calibrate import ObservedGraph
from pq_fx.config import QuantConfig
from pq_fx.errors import ConfigError, UnsupportedDeviceError
from pq_fx.hooks import callers, refuse_wrapped_parts
from pq_fx.kernels.ops import decompositions
from pq_fx.modules import quantized_linears
from pq_fx.passes import _torch, verify
from pq_fx.passes.lower import lower, quantized_operations
from pq_fx.passes.retrace import retrace
from pq_fx.pointwise import is_pointwise, linearize, restore
from pq_fx.quantizer import Quantizer
from pq_fx.seen import arguments_of, check_compiled, given_to, tensors

log = logging.getLogger("pq_fx")
Compiled = Callable[..., Any]
_OWN = {f for f in QuantConfig.__dataclass_fields__}
STEPS = "calibration_steps"


def permuquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Compile one graph of a quantized model, or start quantizing a float one.

    `options` may hold any field of QuantConfig or `preset`, and `calibration_steps` (how many calls calibrate a float
    model); all others, and `mode`, go to Inductor. Raises ConfigError for a float model without `calibration_steps`,
    CalibrationError for one with parts that hooks wrap.
    """
    settings, rest = _split(options or {})
    root = _torch.dynamo_root()
    _warn_of_last_graph(root)
    check_compiled(root, _torch.dynamo_scope())
    if _is_quantized(gm, root):
        return compile_quantized(gm, example_inputs, mode=mode, options=rest)
    wrapped = _torch.dynamo_wrapped()
    running = _running(wrapped if root is None else root)
    if running is not None:
        return running.compile(gm, example_inputs)
    if STEPS in settings and wrapped is not None and wrapped not in _converted:
        raise ConfigError(
            f"a hook wraps the forward of {type(wrapped).__name__} (offloading, a device map), and first calls cannot "
            "calibrate a model behind it: take the hooks off, or quantize it first (pq_fx.prepare, calibrate, convert)"
        )
    if _torch.dynamo_piece()[0] or root in _converted or not _has_linears(gm):
        # A piece of a model whose quantized linears are in other pieces.
        return compile_quantized(gm, example_inputs, mode=mode, options=rest)
    if root is None or STEPS not in settings:
        raise ConfigError(
            "this model is not quantized. Quantize it first (pq_fx.prepare, calibrate, convert; or pq_fx.load), or let "
            'its first calls calibrate it: torch.compile(model, backend="permuquant", options={"format": "int4", '
            '"calibration_steps": 28})'
        )
    for model in callers(root):
        refuse_wrapped_parts(model)
    return _first_calls(root, settings).compile(gm, example_inputs)


def compile_quantized(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Retrace, lower and hand a quantized model's graph to Inductor.

    Raises UnsupportedDeviceError where a CPU graph has no C++ compiler.
    """
    traced = retrace(gm)
    counts = lower(traced)
    verify.verify_graph(traced)
    log.info("lowered: %s; %s", counts, quantized_operations(traced))
    patches = dict(inductor.PATCHES)
    if mode and mode != "default":
        patches.update(_torch.list_mode_options(mode))
    patches.update(options or {})
    try:
        return _torch.compile_fx(
            traced,
            list(example_inputs),
            config_patches=patches,
            decompositions=_decompositions(example_inputs),
        )
    except Exception as error:
        if not _torch.lacks_compiler(error):
            raise
        raise UnsupportedDeviceError(
            "Inductor compiles for the CPU with a C++ compiler, and this machine has none: install g++ (or name one "
            "by CXX), or call the model without torch.compile, which gives the same numbers"
        ) from error


def _warn_of_last_graph(root: nn.Module | None) -> None:
    """Dynamo says when it gives a function up, not what this costs: a quantized model is slow without a compiler."""
    if _torch.graphs_left() == 0:
        code = _torch.dynamo_code()
        assert code is not None
        owner = "" if root is None else f"{type(root).__name__}."
        log.warning(
            "this is the last graph that Dynamo compiles of %s%s (its recompile_limit). Calls that "
            "need another run eagerly: the same numbers, but slowly. Raise the limit, pass dynamic=True where shapes "
            "vary, keep alike_blocks=True where blocks differ, or pass fullgraph=True to get an error instead",
            owner,
            code.co_name,
        )


def _decompositions(example_inputs: Sequence[Any]) -> dict[Any, Compiled] | None:
    """On a CPU the operations are taken apart, so that Inductor compiles the reference; elsewhere they are kernels."""
    if any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in example_inputs):
        return None
    return {**_torch.select_decomp_table(), **decompositions()}


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {k: v for k, v in options.items() if k in _OWN or k in (STEPS, "preset")}
    return own, {k: v for k, v in options.items() if k not in own}


def _is_quantized(gm: fx.GraphModule, root: nn.Module | None) -> bool:
    """A graph piece without quantized linears may still belong to a quantized model, so the root module decides.

    After a break it may be a submodule that was left in 16 bits (HiDream's embedders); then those that call it do.
    """
    if any(str(n.target).startswith("pq.") for n in gm.graph.nodes if n.op == "call_function"):
        return True
    return root is not None and any(quantized_linears(model) for model in callers(root))


class _FirstCalls:
    """Calibrates a float model in its first `steps` calls, then converts it.

    The first call is not counted where it came in several graphs, or the model has pointwise convolutions: it may have
    filled a cache (Z-Image's table of rotations), and convolutions become linears after it.
    """

    def __init__(self, model: nn.Module, config: QuantConfig, steps: int) -> None:
        self.model: nn.Module | None = model
        self.quantizer: Quantizer | None = Quantizer(model, config)
        self.observer = self.quantizer.observer()
        self.steps = steps
        self.leader: torch.Tensor | None = None
        # Whether this call is not counted; None until the first graph.
        self.warm_up: bool | None = None
        self.started = False
        self.frame: CodeType | None = None  # of the first graph
        log.info("permuquant: calibrating %s in its first %d calls", type(model).__name__, steps)

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Watch one graph."""
        assert self.model is not None
        statistics = self.observer.statistics
        frame = arguments_of(self.model, _torch.dynamo_scope())
        if frame is not None:
            statistics.inputs |= set(given_to(self.model, *frame))
            self.observer.begin(tensors(frame))
        run = self.observer(gm, example_inputs)
        breaks = _torch.dynamo_piece()[1]
        if self.warm_up is None:
            self.frame = _torch.dynamo_code()
            self.warm_up = breaks or any(is_pointwise(m) for m in self.model.modules())
        if self.leader is None and run.params:
            self.leader = example_inputs[next(iter(run.params.values()))]
        return lambda *args: self._call(run, gm.forward, breaks, args)

    def _call(self, run: ObservedGraph, plain: Compiled, breaks: bool, args: Sequence[Any]) -> Any:
        # A model with graph breaks runs several graphs a call; the one that reads the leader begins it.
        leads = any(args[i] is self.leader for i in run.params.values())
        if leads:
            if self.started:
                self.warm_up = False
            self.started = True
        quantizer = self.quantizer
        if quantizer is None or self.warm_up:
            result = plain(*args)
            run.note(result)
            if leads and self.warm_up:
                self._warmed()
            return result
        statistics = quantizer.statistics()
        # What follows a break is not over when this graph is: such a model is converted within the call after the last.
        done = leads and breaks and statistics.calls >= self.steps
        result = plain(*args) if done else run(*args)
        if leads and not done:
            statistics.broken |= breaks
            quantizer.count_call()
            log.info("permuquant: calibration call %d of %d", statistics.calls, self.steps)
            done = not breaks and statistics.calls >= self.steps
        if done:
            self._convert(quantizer)
        return result

    def _warmed(self) -> None:
        assert self.model is not None and self.quantizer is not None
        log.info("permuquant: the first call is not counted: it may have filled caches")
        if self.frame is not None:
            _torch.reset_code(self.frame)  # compiled anew, it may be one graph
        if linearize(self.model):
            self.leader = None  # its weight may be a linear's now
            self.observer.close()
            self.observer = self.quantizer.observer()

    def _convert(self, quantizer: Quantizer) -> None:
        report = quantizer.convert()
        restore(quantizer.model)
        log.info(
            "permuquant: converted; the next call compiles the quantized model; %s",
            report.summary,
        )
        self._let_go(quantizer.model)

    def _let_go(self, model: nn.Module) -> None:
        """Dynamo keeps this object with its compiled graphs; the float weights must not live as long."""
        self.observer.close()
        self.model = self.quantizer = self.leader = None
        _calibrating.pop(model, None)
        _converted.update(dict.fromkeys(model.modules(), True))


_calibrating: WeakIdKeyDictionary = WeakIdKeyDictionary()  # model -> _FirstCalls
# Modules of models that first calls converted.
_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _running(root: nn.Module | None) -> _FirstCalls | None:
    """The first calls that a graph belongs to; after a break its frame may be a submodule's, or know no module."""
    for first in reversed(list(_calibrating.values())):
        if root is None or any(m is root for m in first.model.modules()):
            return first
    return None


def _has_linears(gm: fx.GraphModule) -> bool:
    return any(n.target is torch._C._nn.linear for n in gm.graph.nodes)


def _first_calls(root: nn.Module, settings: dict[str, Any]) -> _FirstCalls:
    if root not in _calibrating:
        settings = dict(settings)
        steps = settings.pop(STEPS)
        preset = settings.pop("preset", None)
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"calibration_steps must be a positive whole number, found {steps!r}")
        config = QuantConfig.preset(preset, **settings) if preset else QuantConfig.of(settings)
        _calibrating[root] = _FirstCalls(root, config, steps)
    return _calibrating[root]
