"""What makes a quantized model at home in other libraries: diffusers, transformers' models, PEFT.

None of these libraries is imported from here. diffusers has no registry for quantizers from outside, only a table in
`diffusers.quantizers.auto`; `install` writes into it when that module is loaded, whichever is imported first.
"""

from __future__ import annotations

import sys

from torch import nn

from pq_fx.integrations.imports import when_imported


def install() -> None:
    """Register with each library, now or as soon as somebody imports it."""
    when_imported("diffusers.quantizers.auto", _register_with_diffusers)
    when_imported("transformers.quantizers.auto", _register_with_transformers)
    when_imported("diffusers.loaders.lora_pipeline", _tell_flux_of_shapes)


def adopt(model: nn.Module) -> None:
    """Let the library that a quantized model comes from treat it as quantized; other models are left alone."""
    if "diffusers.models.modeling_utils" in sys.modules:
        from pq_fx.integrations import diffusers

        diffusers.adopt(model)
    if "transformers.modeling_utils" in sys.modules:
        from pq_fx.integrations import transformers

        transformers.adopt(model)


def _register_with_diffusers() -> None:
    from pq_fx.integrations import diffusers

    diffusers.register()


def _register_with_transformers() -> None:
    from pq_fx.integrations import transformers

    transformers.register()


def _tell_flux_of_shapes() -> None:
    from pq_fx.integrations import lora

    lora.tell_flux_of_shapes()
