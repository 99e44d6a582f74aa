"""transformers: `AutoModel.from_pretrained(folder)` and `save_pretrained` of quantized models.

As in diffusers.py: the model is built on the meta device, gets empty quantized linears and is filled from the file, so
its 16-bit weights never exist. transformers makes what a file does not hold anew, name by name; so a quantizer that
several linears share is given to its first linear only, and to the others once everything is loaded.

Needs transformers 5, whose loading this was written for and tested with.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pq_fx import applied, checkpoint_config, checkpoint_model
from pq_fx.checkpoint_plan import Plan, check_kind
from pq_fx.errors import CalibrationError, CheckpointError
from pq_fx.integrations import loading, methods
from pq_fx.modules import QuantLinear
from pq_fx.report import Report


class PermuQuantHfConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint's config.json; transformers makes it, users do not."""

    def __init__(self, **stored: Any) -> None:
        stored.pop("quant_method", None)
        self.quant_method = checkpoint_config.QUANT_METHOD
        self.stored = stored

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Raises CheckpointError where it is of another version of the layout."""
        checkpoint_config.check_version(config_dict, checkpoint_config.CONFIG_FILE)
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as it was read."""
        return {"quant_method": self.quant_method, **self.stored}


class PermuQuantHfQuantizer(HfQuantizer):
    """Loads quantized models for `PreTrainedModel.from_pretrained`."""

    def __init__(self, quantization_config: PermuQuantHfConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise CalibrationError(
                "loading cannot quantize: the model has to run first. Load it without quantization_config, then "
                "quantizer = pq_fx.prepare(model, config); with quantizer.calibrate(): model(...); "
                "quantizer.convert(); model.save_pretrained(folder)"
            )
        super().__init__(quantization_config, **kwargs)
        self.plan = Plan.from_dict(quantization_config.stored)
        self.report: Report | None = None
        self.linears: dict[str, QuantLinear] = {}
        self.record: applied.Applied = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse the disk, from which accelerate would bring scales back in another dtype."""
        if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
            raise CheckpointError("device_map puts modules on the disk; keep them on the CPU")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a quantized model is loaded from a folder, not a state dict")
        self.record, self.report = loading.read_folder(checkpoint_files)
        self.linears = loading.put_empty(model, self.plan, self.record)
        for fqn, entry in self.plan.layers.items():
            if entry.input_quantizer != f"{fqn}.input_quantizer":
                self.linears[fqn].input_quantizer = None
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        records = {r"^permuquant_edits\."}
        model._keys_to_ignore_on_load_unexpected = ignored | records  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for fqn, entry in self.plan.layers.items():
            if entry.input_quantizer is not None:
                owner = entry.input_quantizer.removesuffix(".input_quantizer")
                self.linears[fqn].input_quantizer = self.linears[owner].input_quantizer
        state = checkpoint_model.state_of(model)
        for name, (kind, shape) in self.plan.expected().items():
            check_kind(name, state[name], kind, shape)
        for name, check in self.plan.checks().items():
            check(name, state[name])
        loading.finish(model, self.quantization_config.stored, self.record, self.report)
        adopt(model)
        return model.eval()

    def is_serializable(self) -> bool:
        """Yes, by its own `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: backend="permuquant"."""
        return True


def register() -> None:
    """Enter the method into transformers' registries."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[checkpoint_config.QUANT_METHOD] = PermuQuantHfConfig
    AUTO_QUANTIZER_MAPPING[checkpoint_config.QUANT_METHOD] = PermuQuantHfQuantizer


def adopt(model: nn.Module) -> None:
    """Give a quantized transformers model the `save_pretrained` that writes packed weights."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model.save_pretrained = MethodType(methods.save_pretrained, model)  # type: ignore[assignment]
