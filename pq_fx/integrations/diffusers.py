"""diffusers: `from_pretrained`, `save_pretrained` and `dequantize` of quantized models, alone and in pipelines.

Loading builds the model on the meta device, puts empty quantized linears into it and fills them from the mapped file,
so the 16-bit model never exists. Saving goes through `pq_fx.save`, whichever way it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from pq_fx import applied, checkpoint_config, checkpoint_model
from pq_fx.checkpoint_plan import Plan, check_kind
from pq_fx.config import QuantConfig
from pq_fx.dequantize import dequantize
from pq_fx.errors import CalibrationError, CheckpointError
from pq_fx.integrations import loading, methods
from pq_fx.report import Report


class _Method(str):
    """The name of our method; diffusers wants an enum's `value`, and compares with plain strings, too."""

    @property
    def value(self) -> str:
        return str(self)


METHOD = _Method(checkpoint_config.QUANT_METHOD)


class PermuQuantConfig(QuantizationConfigMixin):
    """`pq_fx.QuantConfig` as diffusers passes it around; what `config.json` holds under `quantization_config`.

    >>> PermuQuantConfig("w4a4-nvfp4", modules_to_not_convert=["proj_out"])

    Args:
        config: a QuantConfig, a preset's or format's name, or None.
        settings: fields of QuantConfig; with a `config` they change it.

    Raises:
        ConfigError: a setting is unknown, out of range or contradicts another one.
    """

    def __init__(
        self, config: QuantConfig | str | Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        self.quant_method = METHOD
        self._stored: dict[str, Any] | None = None
        plain = QuantConfig.of(config).to_dict() if config is not None else {}
        self.config = QuantConfig.from_dict(plain | settings)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Out of `quantization_config` of a config.json.

        Raises:
            CheckpointError: it is of another version of the layout.
        """
        checkpoint_config.check_version(config_dict, checkpoint_config.CONFIG_FILE)
        made = cls(config_dict.get("config"))
        made._stored = dict(config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    @property
    def modules_to_not_convert(self) -> list[str]:
        """Names of modules that are left in float, by diffusers' substring rule."""
        return list(self.config.modules_to_not_convert)

    @property
    def stored(self) -> dict[str, Any]:
        """The whole `quantization_config` of the checkpoint that this was read from; empty if it was not."""
        return self._stored or {}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; diffusers serializes it on every load. Permutations and scales are in the weight files."""
        if self._stored is not None:
            return dict(self._stored)
        return {"quant_method": str(self.quant_method), "config": self.config.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`; what diffusers prints."""
        return self.to_dict()


class PermuQuantizer(DiffusersQuantizer):
    """Loads quantized models for `ModelMixin.from_pretrained`; diffusers makes it, users do not."""

    use_keep_in_fp32_modules = True  # where the caller asks for a dtype, as for float models

    def __init__(
        self, quantization_config: PermuQuantConfig, pre_quantized: bool = True, **kwargs: Any
    ) -> None:
        if not pre_quantized:
            raise CalibrationError(
                "loading cannot quantize: PermuQuant chooses permutations, rotations and scales from "
                "activations, so the model has to run first. Load the float pipeline without "
                "quantization_config, then: quantizer = pq_fx.prepare(pipe.transformer, "
                "your_config.config); with quantizer.calibrate(): pipe(prompts); "
                "quantizer.convert(); pipe.save_pretrained(folder). Loading that folder needs no "
                "quantization_config. On the command line: pq-fx quantize"
            )
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.modules_to_not_convert = quantization_config.modules_to_not_convert
        self._expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        self._checks: dict[str, Callable[[str, Tensor], None]] = {}
        self._dtype_given = False
        self._report: Report | None = None
        self._record: applied.Applied = {}
        self._ties: dict[str, str] = {}  # name of a tensor that is not stored -> the one that is

    # Before the weights are read ----------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what would damage scales: diffusers casts tensors that it offloads to disk."""
        if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
            raise CheckpointError(
                "device_map puts modules on the disk, and diffusers casts what it puts there, scales "
                "among it. Keep them on the CPU (device_map with 'cpu'), or load and then call "
                "enable_group_offload(offload_to_disk_path=...)"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The caller's dtype, or the one that the model was saved in."""
        self._dtype_given = torch_dtype is not None
        if torch_dtype is not None:
            return torch_dtype
        stored = getattr(torch, str(self.quantization_config.stored.get("dtype")), None)
        if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
            raise CheckpointError(
                f"{checkpoint_config.CONFIG_FILE} names no float dtype of the model"
            )
        return stored

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Check config.json and the weight files before anything is made of them."""
        self._record, self._report = loading.read_folder(checkpoint_files)
        return [key for key in loaded_keys if not applied.is_record(key)]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        plan = Plan.from_dict(self.quantization_config.stored)
        self._expected, self._checks = plan.expected(), plan.checks()
        loading.put_empty(model, plan, self._record)
        stored = checkpoint_model.stored_names(model).items()
        self._ties = {name: first for name, first in stored if name != first}
        # On the meta device accelerate makes tied parameters two, so the checkpoint knows them.
        self._ties |= checkpoint_config.ties(self.quantization_config.stored)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Of tensors that the model holds under several names one is stored; any other missing one is an error."""
        missing = set(missing_keys) - set(self._ties)
        if missing:
            names = ", ".join(sorted(missing)[:5])
            raise CheckpointError(f"the checkpoint lacks tensors of the model: {names}")
        return []

    # While they are read ------------------------------------------------------------------------

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """All tensors are placed here, since diffusers would cast scales and global scales."""
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put one tensor where the model expects it: as it was stored, or in the dtype that the caller gave.

        Raises:
            CheckpointError: its dtype or shape is not that of the format, or its scales are not finite.
        """
        name = param_name
        value = state_dict[name]
        kind, shape = self._expected.get(name, (None, tuple(value.shape)))
        if name in self._expected:
            check_kind(name, value, kind, shape)
        if name in self._checks:
            self._checks[name](name, value)
        if self._dtype_given and kind is None:
            value = param_value  # diffusers has cast it
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        value = value.to(target_device)
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            grad = old is not None and old.requires_grad
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=grad)
        else:
            owner._buffers[leaf] = value

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> None:
        """Called where the shapes differ, which they never do in a whole checkpoint."""
        raise CheckpointError(
            f"{param_name} is {list(loaded_param.shape)} in the checkpoint; the model expects "
            f"{list(current_param.shape)}"
        )

    # Afterwards ---------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        state = checkpoint_model.state_of(model)
        for name, first in self._ties.items():
            if name in state and first in state and state[name].is_meta:
                parent, _, leaf = name.rpartition(".")
                owner = model.get_submodule(parent)
                table = owner._parameters if leaf in owner._parameters else owner._buffers
                table[leaf] = state[first]
        loading.finish(model, self.quantization_config.stored, self._record, self._report)
        methods.take_over(model)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        methods.give_back(model)
        dequantize(model)
        Report.detach(model)
        del model.quantization_method
        model._internal_dict = type(model._internal_dict)(
            {k: v for k, v in model.config.items() if k != "quantization_config"}
        )
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """diffusers' own writer knows neither checksums nor shared quantizers."""
        raise CheckpointError(
            "save a quantized model by model.save_pretrained(folder) or pq_fx.save"
        )

    @property
    def is_serializable(self) -> bool:
        """Yes, as safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: packed weights have no gradient. LoRA side branches can be loaded, not trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: backend="permuquant", whole or by repeated blocks."""
        return True


def register() -> None:
    """Enter the method into diffusers' tables, which are what it has for a registry."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[str(METHOD)] = PermuQuantConfig
    AUTO_QUANTIZER_MAPPING[str(METHOD)] = PermuQuantizer


def adopt(model: nn.Module) -> None:
    """Make a model that was converted or loaded here what `from_pretrained` would have made of it."""
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(model, ModelMixin):
        return
    report = Report.of_model(model)
    config = PermuQuantConfig(None if report is None else report.config)
    model.hf_quantizer = PermuQuantizer(config)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.register_to_config(quantization_config=config)
    methods.take_over(model)
