"""config.json of a checkpoint and the report beside it: read, and checked before anything else is.

The checksum in `quantization_config` covers the whole of config.json, because the model's own settings (its heads, its
patch size) decide its numbers as much as ours do.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pq_fx import strict_json
from pq_fx.errors import CheckpointError, PQError
from pq_fx.report import Report

QUANT_METHOD = "permuquant"
FORMAT_VERSION = 3
CONFIG_FILE = "config.json"
REPORT_FILE = "quantization_report.json"
CHECKSUM = "sha256"

PathLike = str | os.PathLike[str]

_WITHOUT_CHECKSUM = 2  # the version before config.json had one
# Bookkeeping of diffusers and transformers, which they may rewrite and which no number depends on.
_NOT_CHECKED = ("_diffusers_version", "_name_or_path", "transformers_version")


def read_config(folder: PathLike) -> dict[str, Any]:
    """The `quantization_config` of a saved model, its version and the checksum of the whole file checked.

    Raises:
        CheckpointError: no checkpoint, damaged, changed, or of another version.
    """
    file = Path(folder) / CONFIG_FILE
    try:
        whole = strict_json.read(file)
    except FileNotFoundError as error:
        place = Path(folder).resolve()
        old = sorted(place.parent.glob(f".{glob.escape(place.name)}.old-*"))
        hint = f". A save was cut off; the older checkpoint is whole in {old[0]}" if old else ""
        raise CheckpointError(
            f"{folder} holds no {CONFIG_FILE}: not a saved model{hint}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    config = whole.get("quantization_config") if isinstance(whole, dict) else None
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        found = config.get("quant_method") if isinstance(config, dict) else None
        raise CheckpointError(
            f"{file} says quant_method {found!r}; expected {QUANT_METHOD!r}: pq_fx.save did not "
            "write it"
        )
    check_version(config, file)
    if config.get("format_version") != _WITHOUT_CHECKSUM and config[CHECKSUM] != checksum(whole):
        raise CheckpointError(
            f"{file} does not have the checksum that it names: it was damaged or changed after saving. "
            "Copy or save it again."
        )
    return config


def checksum(whole: Mapping[str, Any]) -> str:
    """Of a whole config.json but the checksum itself: the model's own settings decide its numbers, too."""
    own = {k: v for k, v in whole["quantization_config"].items() if k != CHECKSUM}
    rest = {k: v for k, v in whole.items() if k not in _NOT_CHECKED}
    return strict_json.digest(rest | {"quantization_config": own})


def check_version(config: Mapping[str, Any], file: PathLike) -> None:
    """Raise CheckpointError unless a `quantization_config` is of a version that is read here."""
    version = config.get("format_version")
    # Both must agree, so that no single damaged byte turns the checksum off.
    if type(version) is int and (version, CHECKSUM in config) in (
        (FORMAT_VERSION, True),
        (_WITHOUT_CHECKSUM, False),
    ):
        return
    what_to_do = ""
    if version == 1:
        what_to_do = " Version 1 was never released: quantize the float model again and save it."
    elif version in (_WITHOUT_CHECKSUM, FORMAT_VERSION):
        what_to_do = " Its checksum does not belong to that version: the file was damaged."
    elif isinstance(version, int) and version > FORMAT_VERSION:
        what_to_do = " Upgrade pq_fx."
    raise CheckpointError(
        f"{file} has format_version {version!r}; this release reads {_WITHOUT_CHECKSUM} and "
        f"{FORMAT_VERSION}.{what_to_do}"
    )


def ties(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of tensors that are not stored -> the one that they are; raises CheckpointError if it is no such table."""
    tied = config.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise CheckpointError(f"tied in {CONFIG_FILE} is {tied!r}; expected a table of names")
    return tied


def report_text(report: Report) -> str:
    """The report as it is saved: with a checksum of its own, since its seconds differ where models are equal."""
    plain = report.to_dict()
    return strict_json.text(plain | {CHECKSUM: strict_json.digest(plain)})


def read_report(folder: Path) -> Report | None:
    """The report that was saved beside a model; None if there is none."""
    file = folder / REPORT_FILE
    try:
        if not file.exists():
            return None
        plain = strict_json.read(file)
        known = plain.pop(CHECKSUM, None) if isinstance(plain, dict) else None
        if known is not None and known != strict_json.digest(plain):
            raise CheckpointError(
                f"{file} does not have the checksum that it names: it was damaged or changed. Copy it again, or "
                "delete it: the model loads without it."
            )
        return Report.from_dict(plain)
    except CheckpointError:
        raise
    except (OSError, ValueError, PQError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
