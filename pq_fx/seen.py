"""What calibration saw of a model, and the refusal of what it did not see.

Folded permutations are proven for the graphs that calibration met. A ControlNet's residuals that are passed only
later would be added to permuted channels, and a branch that no call took would read them: wrong pictures without a
word. So a converted model knows the names of the tensors that its calibration was given, its switches (arguments that
are True or False), the modules that it never entered, and the forward hooks in it; a call with other ones raises
`UnseenError` before anything is computed.

    calibrated with      hidden_states, timestep
    called with          hidden_states, timestep, controlnet_block_samples    -> UnseenError, names the argument
    called with          hidden_states, timestep, output_hidden_states=True   -> UnseenError
    called after         model.config.output_hidden_states = True             -> UnseenError
    called with          hidden_states, timestep, a mask of integers or bools -> runs: it carries no channels

A compiled model is checked when Dynamo compiles it, which it does for each new set of arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx.errors import CheckpointError, UnseenError
from pq_fx.hooks import forward_hooks
from pq_fx.passes._torch import skip_code

_DEEPEST = 6  # levels of objects in an argument that are looked into
# Switches that choose what holds the result and nothing else, in diffusers and transformers.
_HOLDERS = ("return_dict",)
_WHAT_TO_DO = (
    "Calibrate with everything switched on that you will use: give it to the model in some call "
    "inside calibrate()"
)


def given_to(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, bool]:
    """The tensors and switches of one call by name, and whether calibration must have been given each.

    A tensor's name is the argument's, with the keys of dicts and the attributes of objects behind dots; lists count as
    one (`joint_attention_kwargs.ip_adapter_image_embeds`). Those of integers and bools carry no channels. A switch,
    defaults among them, is named with its value (`output_hidden_states=True`); so are those of `model.config` that
    choose what is returned (`config.output_hidden_states=True`). Empty where the arguments do not fit `model.forward`.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {}  # the call says so itself
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    found: dict[str, bool] = {}
    for name, value in leaves(named, (Tensor, bool)):
        if isinstance(value, Tensor):
            found[name] = found.get(name, False) or value.is_floating_point()
        elif name not in _HOLDERS:
            found[f"{name}={value}"] = True
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    for name, value in settings.items():  # diffusers' are fixed, and hold none of these
        if name.startswith("output_") and value is True:
            found[f"config.{name}=True"] = True
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument."""
    return (tensor for _, tensor in leaves(value, Tensor))


def leaves(
    value: Any, kinds: type | tuple[type, ...], path: str = "", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """What an argument holds of these types, with names; of objects that are no dataclasses, tensors only."""
    if isinstance(value, kinds):
        yield path, value
        return
    if id(value) in above or isinstance(value, (str, int, float, type, Tensor, nn.Module)):
        return
    inside: Mapping[Any, Any] | None = None
    if isinstance(value, Mapping):
        inside = value
    elif is_dataclass(value):
        inside = {f.name: getattr(value, f.name, None) for f in fields(value)}
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item, kinds, path, (*above, id(value)))
    elif not callable(value) and len(above) < _DEEPEST:  # a cache of keys and values, for one
        inside, kinds = getattr(value, "__dict__", {}), Tensor
    for key, item in (inside or {}).items():
        yield from leaves(item, kinds, f"{path}.{key}" if path else str(key), (*above, id(value)))


class Seen:
    """A forward pre-hook of a converted model: refuses tensors, switches and hooks that calibration never had.

    `names` are those of `given_to`; `hooks` the forward hooks that are part of the model.
    """

    def __init__(self, names: frozenset[str], hooks: tuple[Callable[..., Any], ...]) -> None:
        self.names = names
        self.hooks = hooks

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise UnseenError for what calibration never saw."""
        if not torch.compiler.is_compiling():  # else the backend checks
            self.check(model, args, kwargs)

    @torch.compiler.disable
    def check(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise UnseenError for what calibration never saw."""
        given = given_to(model, args, kwargs)
        unseen = [name for name, needed in given.items() if needed and not self._knows(name)]
        if unseen:
            raise UnseenError(
                f"{type(model).__name__} is called with {', '.join(unseen)}, which no call of its calibration had "
                f"(those had {', '.join(sorted(self.names))}). Channels are folded into another order, proven only "
                f"for what calibration saw; this may meet them in the wrong order. {_WHAT_TO_DO}. If it is a mask, a "
                "tensor without hidden channels, or a switch of something else: "
                f"pq_fx.allow_input(model, {unseen[0]!r})"
            )
        for name, hook in foreign_hooks(model):
            if all(hook is not known for known in self.hooks):
                raise UnseenError(
                    f"{name} has a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)}) that the model "
                    "did not have when it was converted or loaded. Channels are folded into another order there: the "
                    "hook would read or write them in the wrong one. Register it before calibrating; or, if the order "
                    "of channels does not matter to it, pq_fx.allow_hooks(model)"
                )

    def _knows(self, name: str) -> bool:
        """An argument that was never given is False as good as not given."""
        switch = name.removesuffix("=False")
        return name in self.names or (switch != name and f"{switch}=True" not in self.names)


# Where Dynamo starts at the model's forward, it would compile the hook apart, for ever as one of a call that compiles.
skip_code(Seen.__call__.__code__)


def foreign_hooks(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Forward hooks of submodules but for those of this file."""
    return ((n, h) for n, h in forward_hooks(model) if not isinstance(h, (Seen, UnseenModule)))


class UnseenModule:
    """A forward pre-hook of a module whose parameters no graph of calibration read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise UnseenError."""
        raise UnseenError(
            f"{self.name} ({type(module).__name__}) runs, but no call of the calibration reached it. Channels are "
            "folded into another order, proven only for what calibration saw; this branch may meet them in the "
            f"wrong order. {_WHAT_TO_DO}"
        )


def attach(model: nn.Module, inputs: frozenset[str], modules: tuple[str, ...]) -> None:
    """Let a converted model refuse what is neither in `inputs` (empty: nothing is known) nor outside `modules`."""
    detach(model)
    if inputs:
        hooks = tuple(hook for _, hook in foreign_hooks(model))
        model.register_forward_pre_hook(Seen(inputs, hooks), with_kwargs=True)
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(UnseenModule(name))


def detach(model: nn.Module) -> None:
    """Take the refusals off: the model has its own order of channels again."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (Seen, UnseenModule)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def attached(model: nn.Module) -> tuple[frozenset[str], tuple[str, ...]]:
    """What `attach` was given."""
    guard = _guard(model)
    hooks = (h for m in model.modules() for h in m._forward_pre_hooks.values())
    modules = tuple(h.name for h in hooks if isinstance(h, UnseenModule))
    return frozenset() if guard is None else guard.names, modules


def to_config(model: nn.Module) -> dict[str, list[str]]:
    """What a checkpoint records of `attached`."""
    inputs, modules = attached(model)
    return {"inputs": sorted(inputs), "modules": list(modules)}


def from_config(
    model: nn.Module, config: Mapping[str, Any]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """What a checkpoint's `quantization_config` records, for `attach` on a model of its architecture.

    Raises:
        CheckpointError: it names no modules of this model.
    """
    recorded = config.get("seen", {"inputs": (), "modules": ()})
    try:
        inputs, modules = names_in(recorded["inputs"]), names_in(recorded["modules"])
        for name in modules:
            model.get_submodule(name)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"quantization_config names what calibration saw in a way that does not fit the model ({error}): it is "
            "damaged, or of another architecture"
        ) from error
    return frozenset(inputs), tuple(modules)


def names_in(recorded: Any) -> list[str]:
    """A list of names as JSON has it, or TypeError."""
    if not isinstance(recorded, (list, tuple)) or not all(isinstance(n, str) for n in recorded):
        raise TypeError(f"{str(recorded)[:80]} is no list of names")
    return list(recorded)


def allow_input(model: nn.Module, name: str) -> None:
    """Let a converted model take a tensor or a switch that its calibration was never given.

    Args:
        model: that `Quantizer.convert` or `load` gave.
        name: of the argument, as `UnseenError` says it. You vouch that it has nothing to do with hidden channels: a
            mask or a scalar has none, ControlNet residuals and adapter states have; a switch has where it adds or
            returns something inside.
    """
    inner = getattr(model, "_orig_mod", model)
    guard = _guard(inner)
    if guard is not None:
        guard.names |= {name}


def allow_hooks(model: nn.Module) -> None:
    """Let a converted model keep the forward hooks that are in it now, in any of its submodules.

    You vouch that the order of hidden channels does not matter to them: a timer or a norm, no addition, no picture of
    features. Compiled code runs the hooks that were there when it was compiled.
    """
    inner = getattr(model, "_orig_mod", model)
    guard = _guard(inner)
    if guard is not None:
        guard.hooks = tuple(hook for _, hook in foreign_hooks(inner))


def arguments_of(
    model: nn.Module, scope: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a call of `model` from the locals of its frame; None where it is another function's frame."""
    expected = inspect.signature(model.forward).parameters
    if scope.keys() >= expected.keys():
        rest = [n for n, p in expected.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        named = {name: scope[name] for name in expected if name not in rest}
        return (), named | {k: v for name in rest for k, v in scope[name].items()}
    if {"args", "kwargs"} <= scope.keys():  # a wrapper around forward
        return scope["args"], scope["kwargs"]
    return None


def check_compiled(root: nn.Module | None, scope: Mapping[str, Any]) -> None:
    """The check of `Seen` while Dynamo compiles `root`; `scope` holds the locals of the frame that it compiles.

    Raises UnseenError.
    """
    guard = None if root is None else _guard(root)
    call = None if root is None or guard is None else arguments_of(root, scope)
    if root is not None and guard is not None and call is not None:
        guard.check(root, *call)


def _guard(model: nn.Module) -> Seen | None:
    hooks = model._forward_pre_hooks.values()
    return next((h for h in hooks if isinstance(h, Seen)), None)
