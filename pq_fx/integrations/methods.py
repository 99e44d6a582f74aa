"""Methods of a quantized diffusers model that must do another thing than its class's.

They are set on the model, not on diffusers' classes: float models are left alone, and a deep copy takes them along.
"""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

from torch import nn

from pq_fx import checkpoint
from pq_fx.errors import CheckpointError
from pq_fx.integrations import lora


def take_over(model: nn.Module) -> None:
    """Give a quantized model its own methods."""
    for method in (save_pretrained, lora.load_lora_adapter, lora.fuse_lora):
        setattr(model, method.__name__, MethodType(method, model))


def give_back(model: nn.Module) -> None:
    """Undo `take_over`, for a model that is dequantized."""
    for method in (save_pretrained, lora.load_lora_adapter, lora.fuse_lora):
        delattr(model, method.__name__)


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`ModelMixin.save_pretrained` of a quantized model: `pq_fx.save` with diffusers' arguments.

    Raises:
        CheckpointError: an argument asks for what a checkpoint is not, such as `variant` or `push_to_hub`.
    """
    refused = [
        ("safe_serialization=False", not safe_serialization),
        (f"variant={variant!r}", variant is not None),
        ("push_to_hub=True", push_to_hub),
        *((f"{name}={value!r}", bool(value)) for name, value in kwargs.items()),
    ]
    if wrong := [text for text, asked in refused if asked]:
        raise CheckpointError(
            f"save_pretrained of a quantized model takes no {', '.join(wrong)}: it writes safetensors "
            "into a folder. To publish it: huggingface_hub.upload_folder(repo_id=..., folder_path=...)"
        )
    if is_main_process:
        checkpoint.save(model, save_directory, max_shard_size=max_shard_size)
