"""Compiling block by block: the repeated blocks of a model share one compiled graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pq_fx.errors import ConfigError


def compile_blocks(model: nn.Module, *, backend: str = "permuquant", **options: Any) -> nn.Module:
    """Compile the repeated blocks of a model, each in place; diffusers' `compile_repeated_blocks` for any class.

    The blocks are the modules of the classes that the model's `_repeated_blocks` names, and where it names none (SANA),
    the members of its outermost `nn.ModuleList`s. Blocks of one class with equal shapes share what was compiled.

    Args:
        model: of any class; a quantized one for backend "permuquant".
        backend: of torch.compile.
        options: further arguments of torch.compile, such as ``fullgraph=True``.

    Returns:
        `model`.

    Raises:
        ConfigError: the model has no blocks; compile it whole then.
    """
    blocks = list(repeated_blocks(model))
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no nn.ModuleList of blocks; compile it whole: "
            f"torch.compile(model, backend={backend!r})"
        )
    for block in blocks:
        block.compile(backend=backend, **options)
    return model


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that `compile_blocks` compiles, in the model's order."""
    classes = getattr(model, "_repeated_blocks", None)
    if classes:
        yield from (m for m in model.modules() if type(m).__name__ in classes)
        return
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from repeated_blocks(child)
