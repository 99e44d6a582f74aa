"""Quantized models on disk: `save` and `load`. docs/checkpoint.md describes the files.

`load` checks everything that a file can get wrong before it touches the model: a model is either
loaded whole or left as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pq_fx.checkpoint_plan import LayerEntry, Plan, QuantizerEntry
from pq_fx.config import QuantConfig
from pq_fx.errors import CheckpointError, PQError
from pq_fx.modules import ActivationQuantizer, QuantLinear, quantized_linears
from pq_fx.report import Report
from pq_fx.storage import atomic_folder, sha256

QUANT_METHOD = "permuquant"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
REPORT_FILE = "quantization_report.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE)

PathLike = str | os.PathLike[str]


def save(model: nn.Module, path: PathLike, report: Report | None = None) -> None:
    """Write a converted model into the folder `path`: config.json, weights, and the report.

    Equal models give equal bytes. A folder that is there already is replaced as a whole, and only
    if it holds nothing but a checkpoint.

    Args:
        model: a model that `Quantizer.convert` or `load` gave, compiled or not.
        path: the folder to write.
        report: of the conversion; by default the one that the conversion left on the model.

    Raises:
        CheckpointError: the model has no quantized linear or holds tensors without data, or `path`
            holds something else.
    """
    model = getattr(model, "_orig_mod", model)
    linears = quantized_linears(model)
    if not linears:
        raise CheckpointError(
            f"{type(model).__name__} has no quantized linear; convert it first: "
            "quantizer = pq_fx.prepare(model, config); ...; quantizer.convert()"
        )
    report = Report.of_model(model) if report is None else report
    tensors = stored_tensors(model)
    with atomic_folder(path, _only_a_checkpoint) as folder:
        # One metadata key: safetensors writes several in an order that changes from run to run.
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        quantization = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "config": None if report is None else report.config.to_dict(),
            "weights": {
                "file": WEIGHTS_FILE,
                "bytes": (folder / WEIGHTS_FILE).stat().st_size,
                "sha256": sha256(folder / WEIGHTS_FILE),
            },
            **Plan.of_model(linears).to_dict(),
        }
        config = _model_config(model) | {"quantization_config": quantization}
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if report is not None:
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")


def load(
    path: PathLike, model: nn.Module, *, device: torch.device | str | None = None
) -> nn.Module:
    """Turn a float model of the same architecture into the saved one, in place.

    Args:
        path: a folder that `save` wrote.
        model: of the saved architecture, in any dtype; its values are not used, so it may be on the
            meta device (``with torch.device("meta"): model = Model(...)``).
        device: where the tensors go; by default where the model's are, or the CPU for meta tensors.

    Returns:
        `model`, in eval mode.

    Raises:
        CheckpointError: the folder is damaged or of another version, or the model is of another
            architecture; the model is unchanged then.
    """
    inner = getattr(model, "_orig_mod", model)
    folder = Path(path)
    config = read_config(folder)
    plan = Plan.from_dict(config)
    plan.check_model(inner)
    report = _read_report(folder)
    tensors = _read_tensors(folder, config)
    aliases = _aliases(inner, plan)
    stored = _float_names(inner, aliases)
    state = _state(inner)
    floats = {name: state[name] for name in stored.values()}
    plan.check_tensors(tensors, floats)
    _check_nothing_missing(inner, aliases, stored)
    linears = _build(plan, tensors, inner, device)
    placed = {name: _place(tensors[name], like, device) for name, like in floats.items()}

    _assign(inner, stored, placed)  # from here on nothing computes, so nothing can fail
    for alias, fqn in aliases.items():
        parent, _, name = alias.rpartition(".")
        setattr(inner.get_submodule(parent), name, linears[fqn])
    inner.eval()
    if report is not None:
        report.attach(inner)
    return model


def read_config(folder: PathLike) -> dict[str, Any]:
    """The `quantization_config` of a saved model, its version checked.

    Raises:
        CheckpointError: no checkpoint, damaged, or of another version.
    """
    file = Path(folder) / CONFIG_FILE
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: not a saved model") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    config = whole.get("quantization_config") if isinstance(whole, dict) else None
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        found = config.get("quant_method") if isinstance(config, dict) else None
        raise CheckpointError(
            f"{file} says quant_method {found!r}; expected {QUANT_METHOD!r}: pq_fx.save did not "
            "write it"
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {version!r}; this release reads {FORMAT_VERSION}. "
            + ("Upgrade pq_fx." if isinstance(version, int) and version > FORMAT_VERSION else "")
        )
    return config


def saved_config(folder: PathLike) -> QuantConfig | None:
    """The settings that a saved model was quantized with; None if they were not recorded."""
    config = read_config(folder).get("config")
    return None if config is None else QuantConfig.from_dict(config)


# The model's tensors ----------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)  # keep_vars: the objects themselves, to see sharing


def stored_names(model: nn.Module) -> dict[str, str]:
    """Name of each tensor of the state dict -> the name it is stored under.

    They differ for what the model holds more than once: tied parameters, and the input quantizer
    that several linears share. The first name in the model's order is stored.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[Any, str] = {}
    result = {}
    for name, value in _state(model).items():
        parent, _, leaf = name.rpartition(".")
        module = modules.get(parent)
        # The tensors of quantized modules are listed by the plan, so only whole modules are shared.
        own = isinstance(module, QuantLinear | ActivationQuantizer)
        result[name] = first.setdefault((id(module), leaf) if own else id(value), name)
    return result


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What goes into the weights file: each tensor once, contiguous and with memory of its own."""
    state, result = _state(model), {}
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


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    recorded = config.get("weights")
    if not isinstance(recorded, dict) or recorded.get("file") != WEIGHTS_FILE:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not describe {WEIGHTS_FILE}")
    file = folder / WEIGHTS_FILE
    try:
        size = file.stat().st_size
        if size != recorded.get("bytes"):
            raise CheckpointError(
                f"{file} has {size} bytes; {CONFIG_FILE} expects {recorded.get('bytes')}: the file "
                "was cut off or changed. Copy or save it again."
            )
        if sha256(file) != recorded.get("sha256"):
            raise CheckpointError(
                f"{file} does not have the checksum that {CONFIG_FILE} expects: it was damaged or "
                "changed. Copy or save it again."
            )
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _read_report(folder: Path) -> Report | None:
    file = folder / REPORT_FILE
    if not file.exists():
        return None
    try:
        return Report.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, PQError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _aliases(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Each name of each replaced linear -> its name in the plan; a shared one has several."""
    names = {id(model.get_submodule(fqn)): fqn for fqn in plan.layers}
    modules = model.named_modules(remove_duplicate=False)
    return {name: names[id(module)] for name, module in modules if id(module) in names}


def _float_names(model: nn.Module, aliases: Mapping[str, str]) -> dict[str, str]:
    """Name of each tensor outside the replaced linears -> the first of its names, as stored."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name)
        for name, value in _state(model).items()
        if not _inside(name, aliases)
    }


def _inside(name: str, prefixes: Container[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in prefixes for count in range(1, len(parts)))


def _check_nothing_missing(
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


def _build(
    plan: Plan, tensors: Mapping[str, Tensor], model: nn.Module, device: torch.device | str | None
) -> dict[str, QuantLinear]:
    """The quantized linears, complete, each shared input quantizer one object."""
    quantizers: dict[str, ActivationQuantizer] = {}
    linears: dict[str, QuantLinear] = {}
    for fqn, entry in plan.layers.items():
        old = model.get_submodule(fqn).weight
        assert isinstance(old, Tensor)

        def tensor(name: str, old: Tensor = old) -> Tensor | None:
            return _place(tensors[name], old, device) if name in tensors else None

        shared = entry.input_quantizer
        if shared is not None and shared not in quantizers:
            made = plan.quantizers[shared]
            quantizers[shared] = ActivationQuantizer(
                made.channels,
                made.format,
                made.rotation,
                tensor(f"{shared}.perm"),
                tensor(f"{shared}.global_scale"),
                tensor(f"{shared}.clip"),
            )
        weight, scale = tensor(f"{fqn}.weight"), tensor(f"{fqn}.weight_scale")
        assert weight is not None and scale is not None
        linears[fqn] = QuantLinear(
            entry.in_features,
            entry.out_features,
            entry.weight_format,
            weight,
            scale,
            tensor(f"{fqn}.weight_global_scale"),
            tensor(f"{fqn}.bias"),
            None if shared is None else quantizers[shared],
        )
    return linears


def _place(value: Tensor, like: Tensor, device: torch.device | str | None) -> Tensor:
    if device is not None:
        return value.to(device)
    return value if like.is_meta else value.to(like.device)


def _assign(model: nn.Module, stored: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
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


# The folder -------------------------------------------------------------------------------------


def _model_config(model: nn.Module) -> dict[str, Any]:
    """A diffusers or transformers model's own configuration, for its class to read back."""
    to_json = getattr(model, "to_json_string", None)
    plain = json.loads(to_json()) if callable(to_json) and hasattr(model, "config") else {}
    plain.setdefault("_class_name", type(model).__name__)
    for local in ("_name_or_path", "quantization_config"):  # a machine's path; ours follows
        plain.pop(local, None)
    return plain


def _only_a_checkpoint(folder: Path) -> None:
    """Raise unless replacing this folder loses nothing but an older checkpoint."""
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
    if foreign:
        raise CheckpointError(
            f"{folder} holds other files ({', '.join(foreign[:5])}), which saving would delete; "
            "save into a new or empty folder, or move them away"
        )
    if any(folder.iterdir()):
        read_config(folder)


__all__ = ["LayerEntry", "Plan", "QuantizerEntry", "load", "read_config", "save", "saved_config"]
