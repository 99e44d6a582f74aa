"""Hooks inside a model: which break the graph of calibration, which go with a module that is replaced, which are new.

accelerate's and diffusers' (offloading by parts, device maps over parts, casting)   refused while quantizing
    they wrap the forward of a submodule, the graph breaks there, and a region ends at every break
around the whole model (enable_model_cpu_offload)                                     fine
PyTorch's own (register_forward_hook), there while calibrating                        in the graph; they stay
PyTorch's own, added after conversion                                                 refused (seen.py)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pq_fx.errors import CalibrationError

# PyTorch's tables of a module's hooks around its forward.
_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
# Their hooks carry arguments and results that the model is called for; new ones need arguments that seen.py refuses.
_LIBRARIES = ("peft", "transformers")


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new`, which takes the place of `old`, its hooks; handles go on working, for the tables are shared."""
    for table in _TABLES:
        if getattr(old, table):
            setattr(new, table, getattr(old, table))


def forward_hooks(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """PyTorch's hooks around the forwards of a model's submodules, with the submodule's name."""
    if not _any_hooked(
        model
    ):  # as a rule; every call of a converted model asks, and names cost more than the walk
        return
    for name, module in model.named_modules():
        if name and (module._forward_hooks or module._forward_pre_hooks):
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if getattr(hook, "__module__", "").split(".")[0] not in _LIBRARIES:
                    yield name, hook


def _any_hooked(model: nn.Module) -> bool:
    parts = {id(model): model}  # parts may be shared, or hold what holds them
    todo = [model]
    while todo:
        for part in todo.pop()._modules.values():
            if part is not None and id(part) not in parts:
                if part._forward_hooks or part._forward_pre_hooks:
                    return True
                parts[id(part)] = part
                todo.append(part)
    return False


def refuse_wrapped_parts(model: nn.Module) -> None:
    """Raise CalibrationError where accelerate or diffusers wraps the forward of a submodule."""
    wrapped = [name for name, module in model.named_modules() if name and _is_wrapped(module)]
    if wrapped:
        raise CalibrationError(
            f"hooks of accelerate or diffusers wrap {len(wrapped)} parts of {type(model).__name__} (first: "
            f"{wrapped[0]}): group or sequential offloading, a device map over parts, or layerwise casting. The graph "
            "breaks at each, and what should be quantized together would be torn apart. Calibrate and convert first, "
            "offload afterwards; or calibrate with the model whole on one device, or under enable_model_cpu_offload, "
            "whose hook is around the whole model"
        )


def callers(part: nn.Module) -> Iterator[nn.Module]:
    """The modules that are calling `part` just now, of which it is a part, and itself.

    Where a graph breaks, Dynamo may hand over a submodule as if it were a model.
    """
    yield part
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        for name in ("self", "module"):  # of methods, and of the wrappers that hooks make
            value = frame.f_locals.get(name)
            if isinstance(value, nn.Module) and any(m is part for m in value.modules()):
                yield value


def _is_wrapped(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or bool(registry is not None and registry.hooks)
