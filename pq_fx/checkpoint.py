"""Quantized models on disk: `save` and `load`. docs/checkpoint.md describes the files.

`load` checks everything that a file can get wrong before it touches the model: a model is either
loaded whole or left as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx import applied, integrations, seen, strict_json
from pq_fx.checkpoint_config import (
    CHECKSUM,
    CONFIG_FILE,
    FORMAT_VERSION,
    QUANT_METHOD,
    REPORT_FILE,
    PathLike,
    checksum,
    read_config,
    read_report,
    report_text,
    ties,
)
from pq_fx.checkpoint_files import (
    MAX_SHARD_SIZE,
    check_weights,
    is_weights_name,
    read_tensors,
    stem,
    write_weights,
)
from pq_fx.checkpoint_model import (
    assign,
    build_linears,
    check_nothing_missing,
    float_names,
    float_shapes,
    linear_aliases,
    model_dtype,
    place,
    places_for,
    put_linears,
    state_of,
    stored_tensors,
    tied_names,
)
from pq_fx.checkpoint_plan import Plan
from pq_fx.config import QuantConfig
from pq_fx.errors import CheckpointError
from pq_fx.modules import quantized_linears
from pq_fx.pointwise import linearized
from pq_fx.report import Report
from pq_fx.storage import atomic_folder, writing


def save(
    model: nn.Module,
    path: PathLike,
    report: Report | None = None,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a converted model into the folder `path`: config.json, weights, and the report.

    Equal models give equal bytes. A folder that is there already is replaced as a whole, and only
    if it holds nothing but a checkpoint. diffusers' and transformers' `from_pretrained` read it.

    Args:
        model: a model that `Quantizer.convert` or `load` gave, compiled or not.
        path: the folder to write.
        report: of the conversion; by default the one that the conversion left on the model.
        max_shard_size: bytes, or a text such as "10GB"; larger weights are split into shards.

    Raises:
        CheckpointError: the model has no quantized linear or holds tensors without data, or `path`
            holds something else, or it cannot be written (what was there before is unchanged then).
    """
    model = getattr(model, "_orig_mod", model)
    linears = quantized_linears(model)
    if not linears:
        raise CheckpointError(
            f"{type(model).__name__} has no quantized linear; convert it first: "
            "quantizer = pq_fx.prepare(model, config); ...; quantizer.convert()"
        )
    if adapters := [name for name in linears if name.endswith(".base_layer")]:
        raise CheckpointError(
            f"{adapters[0].removesuffix('.base_layer')} carries a LoRA adapter, which a checkpoint does "
            "not hold; take it off first (pipe.unload_lora_weights()) and load it again afterwards"
        )
    report = Report.of_model(model) if report is None else report
    tensors = stored_tensors(model) | applied.to_tensors(applied.of_model(model))
    size = partial(sum, (t.nbytes for t in tensors.values()))
    with writing(path, CheckpointError, size), atomic_folder(path, _only_a_checkpoint) as folder:
        if report is not None:
            (folder / REPORT_FILE).write_text(report_text(report), encoding="utf-8")
        quantization = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "config": None if report is None else report.config.to_dict(),
            "dtype": str(model_dtype(model, tensors)).removeprefix("torch."),
            "tied": tied_names(model),
            "seen": seen.to_config(model),
            "weights": write_weights(tensors, folder, stem(model), max_shard_size),
            **Plan.of_model(linears).to_dict(),
        }
        config = model_config(model) | {"quantization_config": quantization}
        quantization[CHECKSUM] = checksum(config)
        (folder / CONFIG_FILE).write_text(strict_json.text(config), encoding="utf-8")


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
    ties(config)
    report = read_report(folder)
    plan.check_report(report)
    saw = seen.from_config(inner, config)
    with linearized(inner, plan.pointwise_names()):
        plan.check_model(inner)
        tensors = dict(read_tensors(check_weights(folder, config.get("weights"))))
        record = applied.from_tensors(tensors)
        applied.check(record, float_shapes(inner, plan))
        fill(inner, plan, {n: v for n, v in tensors.items() if not applied.is_record(n)}, device)
        applied.note(inner, record)
    seen.attach(inner, *saw)
    inner.eval()
    if report is not None:
        report.attach(inner)
    integrations.adopt(inner)
    return model


def fill(
    inner: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    device: torch.device | str | None = None,
) -> None:
    """Put a plan's quantized linears, and the other tensors, into a float model whose convolutions are linearized.

    Raises CheckpointError, the model being unchanged, where tensors and model do not fit the plan.
    """
    plan.check_model(inner)
    aliases = linear_aliases(inner, plan)
    stored = float_names(inner, aliases)
    state = state_of(inner)
    floats = {name: state[name] for name in stored.values()}
    plan.check_tensors(tensors, floats)
    check_nothing_missing(inner, aliases, stored)
    places = places_for(inner, plan)
    weights = {fqn: inner.get_submodule(fqn).weight for fqn in plan.layers}

    def placed_tensor(name: str, fqn: str) -> Tensor:
        return place(tensors[name], weights[fqn], device)

    linears = build_linears(plan, placed_tensor)
    placed = {name: place(tensors[name], like, device) for name, like in floats.items()}

    assign(inner, stored, placed)  # from here on nothing computes, so nothing can fail
    put_linears(inner, places, linears)


def saved_config(folder: PathLike) -> QuantConfig | None:
    """The settings that a saved model was quantized with; None if they were not recorded."""
    config = read_config(folder).get("config")
    return None if config is None else QuantConfig.from_dict(config)


# The folder -------------------------------------------------------------------------------------


def model_config(model: nn.Module) -> dict[str, Any]:
    """A diffusers or transformers model's own configuration, for its class to read back."""
    of_model, config = getattr(model, "to_json_string", None), getattr(model, "config", None)
    of_config = getattr(config, "to_json_string", None)  # transformers' way
    to_json = of_model if config is not None and callable(of_model) else of_config
    plain = json.loads(to_json()) if callable(to_json) else {}
    if to_json is not None and to_json is of_config:
        plain["architectures"] = [type(model).__name__]
        plain["dtype"] = str(getattr(model, "dtype", "")).removeprefix("torch.")
    else:
        plain.setdefault("_class_name", type(model).__name__)
    for local in ("_name_or_path", "quantization_config"):  # a machine's path; ours follows
        plain.pop(local, None)
    return plain


def _only_a_checkpoint(folder: Path) -> None:
    """Raise unless replacing this folder loses nothing but an older checkpoint."""
    foreign = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in (CONFIG_FILE, REPORT_FILE) and not is_weights_name(entry.name)
    )
    if foreign:
        raise CheckpointError(
            f"{folder} holds other files ({', '.join(foreign[:5])}), which saving would delete; "
            "save into a new or empty folder, or move them away"
        )
    if any(folder.iterdir()):
        read_config(folder)
