"""The layer that PEFT keeps around a quantized linear."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pq_fx.integrations import lora
from pq_fx.modules import QuantLinear


class QuantLoraLayer(nn.Module, LoraLayer):
    """base_layer(x) plus the active adapters' scale * B(A(x)), computed in the adapters' dtype."""

    base_layer: QuantLinear

    def __init__(self, base_layer: QuantLinear) -> None:
        super().__init__()
        with warnings.catch_warnings():  # that PEFT does not know the type beneath
            warnings.simplefilter("ignore")
            LoraLayer.__init__(self, base_layer)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT asks; LoraError for DoRA."""
        config = kwargs.get("config")
        if kwargs.get("use_dora") or getattr(config, "use_dora", False):
            lora.refuse_dora(kwargs.get("target_name", adapter_name))
        super().update_layer(adapter_name, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                down, up = self.lora_A[adapter], self.lora_B[adapter]
                low = down(self.lora_dropout[adapter](x.to(down.weight.dtype)))
                result = result + (up(low) * self.scaling[adapter]).to(result.dtype)
        return result

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: packed weights cannot take an update."""
        lora.fuse_lora(self)

    def unmerge(self) -> None:
        """Nothing was merged."""
