"""Presets: named sets of QuantConfig's fields, and what a bare name stands for."""

from __future__ import annotations

from typing import Any

from pq_fx.errors import ConfigError
from pq_fx.kernels.formats import FORMAT_NAMES

SAME = "same"
PRESETS: dict[str, dict[str, Any]] = {
    "w4a4-int4": {"format": "int4", "activation_format": SAME},
    "w4a4-nvfp4": {"format": "nvfp4", "activation_format": SAME},
    "w4a4-mxfp4": {"format": "mxfp4", "activation_format": SAME},
    "w3a3-int3": {"format": "int3", "activation_format": SAME},
    "w4a8-int4": {"format": "int4", "activation_format": "fp8"},
    "w4a16-int4": {"format": "int4", "activation_format": None},
}
PRESETS["w4a4"] = PRESETS["w4a4-int4"]
PRESETS["w4a8"] = PRESETS["w4a8-int4"]


def changes_of_name(name: str) -> dict[str, Any]:
    """Fields that a preset name, a format name or a format key stands for."""
    if name in PRESETS:
        return dict(PRESETS[name])
    if name in FORMAT_NAMES or ":" in name:
        return {"format": name}
    raise ConfigError(
        f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a format "
        f"({', '.join(FORMAT_NAMES)})"
    )
