"""State dicts of packed modules: loading one checks that it holds this module's bytes, before anything is copied.

`nn.Module.load_state_dict` copies whatever has the right shape: a float weight into 8-bit codes (same shape), or codes
of another format or rotation. Neither would raise, and the model would compute nonsense. Nor would another conversion
of the same model: all of its tensors would go over but not the record of its folds (applied.py), which later undoes
them or fits a LoRA to them. Packed weights never change, so a state dict that says nothing of its conversion must hold
this model's own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pq_fx.errors import CheckpointError

_METADATA = "permuquant"
_CONVERSION = "conversion"


class PackedModule(nn.Module):
    """A module whose tensors mean something only together with the settings that `packed_settings` names.

    A state dict carries these settings in its metadata (beside the tensors, as PyTorch's own module versions are), and
    loading compares them. A state dict without metadata, such as one read from a file of tensors, is checked by dtype,
    shape and the packed weights themselves. Errors are collected by `load_state_dict`, which raises RuntimeError with
    all of them, strict or not.
    """

    castable: ClassVar[tuple[str, ...]] = ()  # parameters that may be loaded from any float dtype
    # Parameters that two conversions have in common only if they are equal.
    codes: ClassVar[tuple[str, ...]] = ()
    conversion: str | None = None  # digest of the whole model's record of folds

    def packed_settings(self) -> dict[str, Any]:
        """What the bytes depend on and no tensor says."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            own = self.packed_settings() | {_CONVERSION: self.conversion}
            metadata.setdefault(prefix[:-1], {})[_METADATA] = own

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = self._misfits(state_dict, prefix, local_metadata.get(_METADATA))
        if wrong:
            error_msgs += wrong
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _misfits(
        self, state_dict: dict[str, Any], prefix: str, settings: dict[str, Any] | None
    ) -> list[str]:
        wrong = []
        own = self.packed_settings()
        theirs = dict(settings or own)
        conversion = theirs.pop(_CONVERSION, None)  # an older release wrote none
        if None not in (conversion, self.conversion) and conversion != self.conversion:
            wrong.append(
                f"{prefix[:-1] or 'the module'} in the state dict is of another conversion of this model: its channels "
                "are in another order than this model's record of folds says; use pq_fx.save and pq_fx.load"
            )
        if theirs != own:
            wrong.append(
                f"{prefix[:-1] or 'the module'} was quantized as {theirs} in the state dict, and as {own} here; "
                "load it into a model that was quantized alike, or use pq_fx.load"
            )
        for name, value in self._parameters.items():
            new = state_dict.get(prefix + name)
            if value is None or not isinstance(new, Tensor):
                continue
            fits = new.is_floating_point() if name in self.castable else new.dtype == value.dtype
            if not fits or new.shape != value.shape:
                wrong.append(
                    f"{prefix}{name} is {new.dtype} {list(new.shape)} in the state dict; expected {value.dtype} "
                    f"{list(value.shape)}: it was not quantized as this model was"
                )
            elif settings is None and self._differ(name, value, new):
                wrong.append(
                    f"{prefix}{name} holds other packed weights than this model, and the state dict carries no "
                    "metadata that says of which conversion it is; use pq_fx.save and pq_fx.load"
                )
        return wrong

    def _differ(self, name: str, own: Tensor, new: Tensor) -> bool:
        """Whether the state dict is of another conversion; not known of meta tensors, and while a model is built."""
        known = self.conversion is not None and not (own.is_meta or new.is_meta)
        return known and name in self.codes and not torch.equal(new.to(own.device), own)


def guard(model: nn.Module, conversion: str) -> None:
    """Let `model` refuse a state dict that does not fit before any of its tensors, float ones too, is overwritten."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.conversion = conversion
    hooks = model._load_state_dict_pre_hooks.values()
    if all(getattr(hook, "hook", hook) is not _refuse_misfits for hook in hooks):
        model.register_load_state_dict_pre_hook(_refuse_misfits)


def _refuse_misfits(
    model: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, *_: Any
) -> None:
    """Raise CheckpointError with everything that does not fit."""
    metadata = getattr(state_dict, "_metadata", None) or {}
    wrong: list[str] = []
    for name, part in model.named_modules():
        if isinstance(part, PackedModule):
            at = f"{prefix}{name}"
            # PyTorch hands the hook of a part no metadata: there each module compares, in its turn.
            settings = metadata.get(at, {}).get(_METADATA, {} if prefix else None)
            wrong += part._misfits(state_dict, f"{at}." if at else "", settings)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"the state dict does not fit {type(model).__name__}, which is unchanged: {'; '.join(wrong[:5])}{more}"
        )
