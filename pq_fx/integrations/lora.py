"""LoRA on a quantized diffusers model: a side branch in the model's dtype beside each quantized linear, through PEFT.

An adapter was made for the float model, whose channels conversion may have reordered and scaled by folding. So the
same is done to it when it is loaded: to A's columns what was done to the linear's input axis, to B's rows what was done
to its output axis (`pq_fx.applied`). Then

    y = QuantLinear(x) + scale * (x A^T) B^T

needs nothing more at run time, and adapters of layers that were left in float fit, too. Fusing into packed weights is
refused: fuse into the float model and quantize that.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from pq_fx import applied
from pq_fx.errors import LoraError
from pq_fx.modules import QuantLinear, quantized_linears
from pq_fx.places import Places

_FUSE_FIRST = (
    "load it into the float pipeline, fuse it (pipe.load_lora_weights(...); pipe.fuse_lora(); "
    "pipe.unload_lora_weights()) and quantize that"
)


def load_lora_adapter(
    model: nn.Module, source: Any, prefix: str | None = "transformer", **kwargs: Any
) -> None:
    """`PeftAdapterMixin.load_lora_adapter` of a quantized model; pipelines' `load_lora_weights` ends here.

    Raises:
        LoraError: the adapter is hotswapped or has DoRA's magnitudes; no adapter is left on the model then.
    """
    from pq_fx.integrations.lora_layer import QuantLoraLayer

    if kwargs.pop("hotswap", False):
        raise LoraError(
            "a LoRA cannot be hotswapped on a quantized model: it is reordered when it is loaded. "
            "Delete the old adapter (pipe.delete_adapters(name)) and load the new one"
        )
    before = set(getattr(model, "peft_config", {}))
    # PEFT adds to layers that are its own, and does not know ours: so all become its own for a while.
    places = Places(model)
    for name, linear in quantized_linears(model).items():
        if not name.endswith(".base_layer"):
            places.put(linear, QuantLoraLayer(linear))
    try:
        type(model).load_lora_adapter(model, source, prefix=prefix, **kwargs)
        added = set(getattr(model, "peft_config", {})) - before
        try:
            _fit(model, added)
        except LoraError:
            for adapter in added:
                model.delete_adapters(adapter)
            raise
    finally:
        places = Places(model)
        for module in list(model.modules()):
            if isinstance(module, QuantLoraLayer) and not module.lora_A:
                places.put(module, module.base_layer)


def tell_flux_of_shapes() -> None:
    """Let FLUX pipelines compare an adapter with a quantized linear's sizes and not with those of its packed weight.

    diffusers pads or refuses FLUX adapters by the shape of `weight`; for bitsandbytes and GGUF it knows where to look.
    """
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    inner = FluxLoraLoaderMixin._calculate_module_shape

    def shape(
        model: nn.Module,
        base_module: nn.Module | None = None,
        base_weight_param_name: str | None = None,
    ) -> torch.Size:
        if base_weight_param_name is not None:
            found = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
            if isinstance(found, QuantLinear):
                return torch.Size((found.out_features, found.in_features))
        return inner(model, base_module, base_weight_param_name)

    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)


def fuse_lora(model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: packed weights cannot take an update."""
    raise LoraError(
        "a LoRA cannot be fused into packed weights. Leave it as it is: it runs as a side branch. "
        f"Or {_FUSE_FIRST}"
    )


def refuse_dora(name: str) -> NoReturn:
    """Refuse an adapter that needs the float weight."""
    raise LoraError(
        f"{name}: DoRA scales by norms of the float weight, which a quantized linear does not have; "
        f"{_FUSE_FIRST}"
    )


def _fit(model: nn.Module, adapters: set[str]) -> None:
    """Do to each adapter what was done to the layer beneath, and give it the model's dtype."""
    edits = applied.of_model(model)
    for name, layer in model.named_modules():
        for adapter in adapters & set(getattr(layer, "lora_A", {})):
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            columns, rows = edits.get((f"{name}.weight", 1)), edits.get((f"{name}.weight", 0))
            if getattr(layer, "lora_magnitude_vector", {}) and (columns or rows):
                refuse_dora(name)
            if columns is not None:
                if columns.center is not None:
                    # The input comes without it; what B A would have made of it is a bias, as in the layer beneath.
                    center = columns.center.to(down.weight)
                    given = up.weight.data @ (down.weight.data @ center)
                    bias = given if up.bias is None else up.bias.data + given
                    up.bias = torch.nn.Parameter(bias, requires_grad=False)
                down.weight.data = columns.apply(down.weight.data, 1)
            if rows is not None:
                up.weight.data = rows.apply(up.weight.data, 0)
                if up.bias is not None:
                    up.bias.data = rows.apply(up.bias.data, 0)
            if isinstance(layer.get_base_layer(), QuantLinear):
                down.to(model.dtype)
                up.to(model.dtype)
