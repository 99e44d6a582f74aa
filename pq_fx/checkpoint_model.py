"""The tensors of a model as a checkpoint names them, and putting loaded ones into a model."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx.checkpoint_plan import Plan
from pq_fx.errors import CheckpointError
from pq_fx.kernels.formats import Format
from pq_fx.modules import ActivationQuantizer, QuantLinear, quantized_linears
from pq_fx.places import Places


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the tensors themselves, not detached views, so that sharing shows by identity."""
    return model.state_dict(keep_vars=True)


def stored_names(model: nn.Module) -> dict[str, str]:
    """Name of each tensor of the state dict -> the name it is stored under.

    They differ for what the model holds more than once: tied parameters, and the input quantizer
    that several linears share. The first name in the model's order is stored.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[Any, str] = {}
    result = {}
    for name, value in state_of(model).items():
        parent, _, leaf = name.rpartition(".")
        module = modules.get(parent)
        # The tensors of quantized modules are listed by the plan, so only whole modules are shared.
        own = isinstance(module, QuantLinear | ActivationQuantizer)
        result[name] = first.setdefault((id(module), leaf) if own else id(value), name)
    return result


def tied_names(model: nn.Module) -> dict[str, str]:
    """Those of `stored_names` that differ, outside quantized linears: the model's own tied parameters."""
    linears = quantized_linears(model)
    names = stored_names(model).items()
    return {n: first for n, first in names if n != first and not _inside(n, linears)}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What goes into the weights file: each tensor once, contiguous and with memory of its own."""
    state, result = state_of(model), {}
    seen: set[int] = set()
    for name in dict.fromkeys(stored_names(model).values()):
        value = state[name]
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in the state dict is {type(value).__name__}, not a tensor: cannot save it"
            )
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no data to save")
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage()
        whole = memory.nbytes() == value.nbytes and memory.data_ptr() not in seen
        seen.add(memory.data_ptr())
        result[name] = value if whole else value.clone()  # safetensors refuses shared memory
    return result


def linear_aliases(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Each name of each replaced linear -> its name in the plan; a shared one has several."""
    names = {id(model.get_submodule(fqn)): fqn for fqn in plan.layers}
    modules = model.named_modules(remove_duplicate=False)
    return {name: names[id(module)] for name, module in modules if id(module) in names}


def float_names(model: nn.Module, aliases: Mapping[str, str]) -> dict[str, str]:
    """Name of each tensor outside the replaced linears -> the first of its names, as stored."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name)
        for name, value in state_of(model).items()
        if not _inside(name, aliases)
    }


def float_shapes(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the float model by name, also where `model` is quantized already."""
    named = model.named_parameters, model.named_buffers
    shapes = {n: tuple(t.shape) for f in named for n, t in f(remove_duplicate=False)}
    for fqn, layer in plan.layers.items():
        shapes[f"{fqn}.weight"] = layer.out_features, layer.in_features
    return shapes


def _inside(name: str, prefixes: Container[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in prefixes for count in range(1, len(parts)))


def check_nothing_missing(
    model: nn.Module, aliases: Container[str], stored: Container[str]
) -> None:
    """Refuse a meta model whose tensors outside the state dict (rope tables) would stay empty."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [
        name
        for name, value in tensors
        if value.is_meta and name not in stored and not _inside(name, aliases)
    ]
    if missing:
        raise CheckpointError(
            f"{', '.join(missing)}: on the meta device and not part of a state dict, so no file "
            "can fill them. Build the model on a real device and load again."
        )


def build_linears(plan: Plan, tensor: Callable[[str, str], Tensor]) -> dict[str, QuantLinear]:
    """The quantized linears of a plan, each shared input quantizer one object.

    `tensor(name, fqn)` gives a tensor by its stored name, for the linear `fqn` (or its quantizer).
    """
    quantizers: dict[str, ActivationQuantizer] = {}
    linears: dict[str, QuantLinear] = {}
    for fqn, entry in plan.layers.items():
        shared = entry.input_quantizer
        if shared is not None and shared not in quantizers:
            made = plan.quantizers[shared]
            quantizers[shared] = ActivationQuantizer(
                made.channels,
                made.format,
                made.rotation,
                tensor(f"{shared}.perm", fqn) if made.perm else None,
                tensor(f"{shared}.global_scale", fqn) if made.global_scale else None,
                tensor(f"{shared}.clip", fqn) if made.clip else None,
                tensor(f"{shared}.smooth", fqn) if made.smooth else None,
            )
        two_level = Format.parse(entry.weight_format).two_level
        linears[fqn] = QuantLinear(
            entry.in_features,
            entry.out_features,
            entry.weight_format,
            tensor(f"{fqn}.weight", fqn),
            tensor(f"{fqn}.weight_scale", fqn),
            tensor(f"{fqn}.weight_global_scale", fqn) if two_level else None,
            tensor(f"{fqn}.bias", fqn) if entry.bias else None,
            None if shared is None else quantizers[shared],
            tensor(f"{fqn}.low_rank_up", fqn) if entry.low_rank else None,
            tensor(f"{fqn}.low_rank_down", fqn) if entry.low_rank else None,
        )
    return linears


def places_for(model: nn.Module, plan: Plan) -> Places:
    """Where the model holds its parts; CheckpointError where one of the plan's linears could not be replaced."""
    places = Places(model)
    places.check((model.get_submodule(fqn) for fqn in plan.layers), CheckpointError)
    return places


def put_linears(model: nn.Module, places: Places, linears: Mapping[str, QuantLinear]) -> None:
    """Put each linear wherever the model holds its float one."""
    for fqn, linear in linears.items():
        places.put(model.get_submodule(fqn), linear.eval())


def place(value: Tensor, like: Tensor, device: torch.device | str | None) -> Tensor:
    """`value` on `device`, by default where `like` is; a meta tensor's place is the value's own."""
    if device is not None:
        return value.to(device)
    return value if like.is_meta else value.to(like.device)


def assign(model: nn.Module, stored: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Put the loaded tensors where the model held the old ones, at every name that shared them."""
    made: dict[str, nn.Parameter] = {}
    for name, first in stored.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        old = module._parameters.get(leaf)
        if old is None:
            module._buffers[leaf] = tensors[first]
        else:
            if first not in made:
                made[first] = nn.Parameter(tensors[first], requires_grad=old.requires_grad)
            module._parameters[leaf] = made[first]


def model_dtype(model: nn.Module, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """What libraries call the model's dtype: that of its first float parameter outside the codes."""
    linears = quantized_linears(model)
    floats = [v.dtype for n, v in tensors.items() if v.is_floating_point()]
    own = [
        value.dtype
        for name, value in tensors.items()
        if value.is_floating_point() and not _inside(name, linears)
    ]
    return (own or floats or [torch.float32])[0]
