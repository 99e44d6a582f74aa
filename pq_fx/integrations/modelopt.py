"""NVIDIA ModelOpt's unified checkpoint: nvfp4 models written in its layout, and read back. docs/interchange.md.

    ours                                    ModelOpt's
    NAME.weight            uint8 [N, K/2]   NAME.weight           the same bytes: even channel in the low nibble
    NAME.weight_scale      e4m3 [N, K/16]   NAME.weight_scale     the same
    NAME.weight_global_scale    fp32 []     NAME.weight_scale_2   the same; both multiply the group scales
    QUANTIZER.global_scale      fp32 []     NAME.input_scale      the same, once for each linear that reads the tensor

ModelOpt's own package is not needed. Rotations, gathers, clipping and low-rank branches have no place in this layout;
folded permutations need none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx import checkpoint, integrations, strict_json
from pq_fx.checkpoint_files import (
    MAX_SHARD_SIZE,
    is_weights_name,
    read_tensors,
    stem,
    write_weights,
)
from pq_fx.checkpoint_model import stored_tensors
from pq_fx.checkpoint_plan import LayerEntry, Plan, QuantizerEntry
from pq_fx.errors import CheckpointError, InterchangeError
from pq_fx.modules import QuantLinear, quantized_linears
from pq_fx.pointwise import PointwiseConv
from pq_fx.storage import atomic_folder

CONFIG_FILE = "hf_quant_config.json"
FORMAT = "nvfp4:16:e4m3"
_HOW = (
    'quantize with pq_fx.QuantConfig("nvfp4", method="permuquant", gather_margin=1.0, weight_only_format="nvfp4"), '
    "which folds permutations and does nothing at run time that ModelOpt cannot say"
)
_NAMES = {"weight_global_scale": "weight_scale_2"}


def export_modelopt(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model whose quantized linears are all nvfp4 in ModelOpt's layout, with its two configuration files.

    The folder is written as a whole or not at all.

    Raises:
        InterchangeError: a linear holds what the layout cannot; the first are named, with the reason.
        CheckpointError: the model is not quantized, or the folder holds something else than such an export.
    """
    model = getattr(model, "_orig_mod", model)
    linears = quantized_linears(model)
    if not linears:
        raise CheckpointError(f"{type(model).__name__} has no quantized linear; convert it first")
    convolutions = {f"{n}.linear" for n, m in model.named_modules() if isinstance(m, PointwiseConv)}
    wrong = [
        f"{name} ({why})"
        for name, linear in linears.items()
        if (why := "is a 1x1 convolution" if name in convolutions else _misfit(linear))
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InterchangeError(
            f"ModelOpt's layout cannot hold {', '.join(wrong[:3])}{more}; {_HOW}"
        )
    tensors = _renamed(stored_tensors(model), linears)
    quantization = _quantization(model, linears)
    with atomic_folder(folder, _only_an_export) as fresh:
        write_weights(tensors, fresh, stem(model), MAX_SHARD_SIZE)
        config = checkpoint.model_config(model)
        config["quantization_config"] = {"quant_method": "modelopt", **_groups(quantization)}
        whole = {"producer": {"name": "pq_fx"}, "quantization": quantization}
        for name, plain in (("config.json", config), (CONFIG_FILE, whole)):
            (fresh / name).write_text(strict_json.text(plain), encoding="utf-8")


def load_modelopt(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Turn a float model into the one that an nvfp4 checkpoint in ModelOpt's layout holds, in place; returns it.

    Linears of one parent with one input scale share their quantizer, as those that read one tensor do here.

    Raises:
        CheckpointError: the folder is damaged, holds another format than nvfp4, or belongs to another model, which is
            unchanged then.
    """
    inner = getattr(model, "_orig_mod", model)
    path = Path(folder)
    try:
        whole = strict_json.read(path / CONFIG_FILE)
        algorithm = whole["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has no {CONFIG_FILE} that can be read ({error}): not a ModelOpt checkpoint"
        ) from error
    if algorithm not in ("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"):
        raise CheckpointError(f"{path} is {algorithm!r}; expected NVFP4 or W4A16_NVFP4")
    files = sorted(f for f in path.glob("*.safetensors") if is_weights_name(f.name))
    plan, tensors = _ours(dict(read_tensors(files)), inner)
    checkpoint.fill(inner, plan, tensors, device)
    inner.eval()
    integrations.adopt(inner)
    return model


def _misfit(linear: QuantLinear) -> str:
    """Why a linear does not fit the layout, or nothing."""
    quantizer = linear.input_quantizer
    if linear.weight_format != FORMAT:
        return f"its weight is {linear.weight_format}"
    if linear.low_rank_up is not None:
        return "a low-rank branch"
    if quantizer is None:
        return ""
    if quantizer.format != FORMAT:
        return f"its input is {quantizer.format}"
    found = (
        ("a rotated input", quantizer.rotation),
        ("a gathered input", quantizer.perm is not None),
        ("a clipped input", quantizer.clip is not None),
        ("a smoothed input", quantizer.smooth is not None),
    )
    return next((what for what, there in found if there), "")


def _renamed(
    tensors: Mapping[str, Tensor], linears: Mapping[str, QuantLinear]
) -> dict[str, Tensor]:
    quantizers = {f"{fqn}.input_quantizer" for fqn in linears}
    result = {}
    for name, value in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if parent not in quantizers:
            result[f"{parent}.{_NAMES[leaf]}" if leaf in _NAMES else name] = value
    for fqn, linear in linears.items():
        if linear.input_quantizer is not None:
            scale = linear.input_quantizer.global_scale
            assert scale is not None  # nvfp4 has one
            result[f"{fqn}.input_scale"] = scale.detach().cpu().clone()
    return result


def _quantization(model: nn.Module, linears: Mapping[str, QuantLinear]) -> dict[str, Any]:
    """What hf_quant_config.json says under "quantization"; several kinds of layers are listed one by one."""
    layers = {
        fqn: {
            "quant_algo": "W4A16_NVFP4" if linear.input_quantizer is None else "NVFP4",
            "group_size": 16,
        }
        for fqn, linear in linears.items()
    }
    left = sorted(n for n, m in model.named_modules() if type(m) is nn.Linear)
    common: dict[str, Any] = {"kv_cache_quant_algo": None, "exclude_modules": left}
    kinds = {str(entry["quant_algo"]) for entry in layers.values()}
    if len(kinds) == 1:
        return {"quant_algo": kinds.pop(), "group_size": 16, **common}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, **common}


def _groups(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The same as config.json says it."""
    number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    both = {"input_activations": dict(number), "weights": dict(number)}
    kinds = {"NVFP4": both, "W4A16_NVFP4": {"weights": dict(number)}}
    algorithm = quantization["quant_algo"]
    if algorithm != "MIXED_PRECISION":
        groups = {"group_0": kinds[algorithm] | {"targets": ["Linear"]}}
    else:
        groups = {}
        for kind, numbers in kinds.items():
            named = quantization["quantized_layers"].items()
            targets = sorted(name for name, entry in named if entry["quant_algo"] == kind)
            groups[f"group_{len(groups)}"] = numbers | {"targets": targets}
    return {
        "config_groups": groups,
        "ignore": quantization["exclude_modules"],
        "quant_algo": algorithm,
        "producer": {"name": "pq_fx"},
    }


def _ours(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of a ModelOpt checkpoint, and its tensors under our names."""
    names = [n.removesuffix(".weight_scale_2") for n in tensors if n.endswith(".weight_scale_2")]
    if not names:
        raise CheckpointError(
            "no tensor is called *.weight_scale_2: not nvfp4 in ModelOpt's layout"
        )
    modules = dict(model.named_modules())
    layers: dict[str, LayerEntry] = {}
    quantizers: dict[str, QuantizerEntry] = {}
    shared: dict[tuple[str, int, float], str] = {}
    result = dict(tensors)
    for fqn in [n for n in modules if n in set(names)] + [n for n in names if n not in modules]:
        weight, scale = tensors.get(f"{fqn}.weight"), result.pop(f"{fqn}.input_scale", None)
        if weight is None or weight.dtype != torch.uint8 or weight.ndim != 2:
            raise CheckpointError(f"{fqn}.weight is not uint8 [out, in / 2]")
        result[f"{fqn}.weight_global_scale"] = result.pop(f"{fqn}.weight_scale_2")
        channels, quantizer = 2 * weight.shape[1], None
        if scale is not None:
            key = (fqn.rpartition(".")[0], channels, float(scale))
            quantizer = shared.setdefault(key, f"{fqn}.input_quantizer")
            quantizers[quantizer] = QuantizerEntry(channels, FORMAT, 0, False, True)
            result[f"{quantizer}.global_scale"] = scale.reshape(())
        has_bias = f"{fqn}.bias" in tensors
        layers[fqn] = LayerEntry(channels, weight.shape[0], FORMAT, has_bias, quantizer)
    return Plan(layers, quantizers), result


def _only_an_export(folder: Path) -> None:
    """Raise unless replacing this folder loses nothing but an older export."""
    known = ("config.json", CONFIG_FILE)
    foreign = [
        f.name for f in folder.iterdir() if f.name not in known and not is_weights_name(f.name)
    ]
    if foreign or (any(folder.iterdir()) and not (folder / CONFIG_FILE).exists()):
        raise CheckpointError(
            f"{folder} holds something else than an export ({', '.join(sorted(foreign)[:5])}); give another folder"
        )
