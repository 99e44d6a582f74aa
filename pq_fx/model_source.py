"""From what a user types to a model and the arguments of one call: a class name, a folder, or module:function."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pq_fx.errors import ConfigError
from pq_fx.example_inputs import InputSizes, example_inputs

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def find_model(source: str, config: str | None = None, sizes: InputSizes | None = None) -> Call:
    """(model, args, kwargs) of `source`; classes and folders give a model without weights, on the meta device in bf16.

    `source`: a class of diffusers or transformers; a folder with `config.json`, or with a pipeline's `model_index.json`
    (its transformer is taken); or "module:function", a function without arguments that returns a model, or a model and
    its arguments as a dict, a tuple or one tensor. `config` is a JSON file or a JSON object. Raises ConfigError.
    """
    if ":" in source and not Path(source).exists():
        if config is not None:
            raise ConfigError(
                "--config goes with a class name or a folder; module:function builds the model itself"
            )
        return _from_function(source, sizes)
    changes = read_config(config) if config is not None else {}
    if Path(source).is_dir():
        name, stored = _from_folder(Path(source))
        changes = stored | changes
    else:
        name = source
    model = build(find_class(name), changes)
    return model, (), example_inputs(model, sizes)


def read_config(text: str, option: str = "--config") -> dict[str, Any]:
    """A JSON object, given as it is or as the name of a file; errors name `option`."""
    plain = text
    if not text.lstrip().startswith("{"):
        if not Path(text).is_file():
            raise ConfigError(f"{option} {text!r} is neither a file nor a JSON object")
        plain = Path(text).read_text()
    try:
        value = json.loads(plain)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} holds a {type(value).__name__}; expected a JSON object")
    return value


def find_class(name: str) -> type[nn.Module]:
    """The model class of this name in diffusers or transformers."""
    for library in ("diffusers", "transformers"):
        found = getattr(importlib.import_module(library), name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ConfigError(
        f"{name!r} is no model class of diffusers or transformers, no folder and no module:function. Class names are "
        "such as FluxTransformer2DModel"
    )


def build(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """An instance without weights, bf16, in eval mode. Raises ConfigError when the configuration does not fit."""
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    config_class = getattr(cls, "config_class", None)
    settings = plain if config_class is not None else _known(cls, plain)
    try:
        with torch.device("meta"):
            model = cls(config_class(**settings)) if config_class is not None else cls(**settings)
    except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{cls.__name__} cannot be built from this configuration: {error}"
        ) from error
    nn.Module.to(model, torch.bfloat16)  # diffusers' own `to` warns about modules kept in fp32
    return model.eval()


def _known(cls: type[nn.Module], config: dict[str, Any]) -> dict[str, Any]:
    from inspect import signature

    known = signature(cls.__init__).parameters
    unknown = [k for k in config if k not in known]
    if unknown:
        raise ConfigError(
            f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(list(known)[1:])}"
        )
    # JSON has no tuples; diffusers' defaults are tuples where lists are meant to stay unchanged.
    return {
        k: tuple(v) if isinstance(v, list) and isinstance(known[k].default, tuple) else v
        for k, v in config.items()
    }


def _from_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    index = folder / "model_index.json"
    if index.is_file():
        parts = read_config(str(index))
        part = next((p for p in ("transformer", "unet") if p in parts), None)
        if part is None:
            raise ConfigError(f"{index} names no transformer; give the model's own folder")
        folder = folder / part
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json")
    stored = read_config(str(path))
    if "quantization_config" in stored:
        raise ConfigError(
            f"{folder} is quantized already; inspect the float model that it was made from, or its class. "
            "`pq-fx report` tells what became of each layer"
        )
    name = stored.get("_class_name") or next(iter(stored.get("architectures") or []), None)
    if name is None:
        raise ConfigError(f"{path} names no class (neither _class_name nor architectures)")
    return str(name), stored


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """The working directory is on the path behind the installed packages, which it must not shadow, and no longer."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _from_function(source: str, sizes: InputSizes | None) -> Call:
    module_name, _, function_name = source.partition(":")
    with _working_directory_importable():
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"cannot import {function_name!r} from {module_name!r}: {error}"
            ) from error
        result = function()
    model, *rest = result if isinstance(result, tuple) else (result,)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{source} returned a {type(model).__name__}; expected a model, or (model, arguments)"
        )
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for value in rest:
        if isinstance(value, dict):
            kwargs |= value
        else:
            args += value if isinstance(value, (tuple, list)) else [value]
    if not rest:
        kwargs = example_inputs(model, sizes)
    return model, tuple(args), kwargs
