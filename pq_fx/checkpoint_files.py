"""The weight files of a checkpoint: safetensors, in shards with an index when they are large.

File names are those that diffusers and transformers look for, so their `from_pretrained` finds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pq_fx.errors import CheckpointError
from pq_fx.storage import sha256

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
MAX_SHARD_SIZE = "10GB"
_NAME = re.compile(
    rf"({DIFFUSERS_STEM}|{TRANSFORMERS_STEM})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?"
)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def stem(model: nn.Module) -> str:
    """How the weight files of a model are named: as transformers does for its own, else as diffusers does."""
    of_transformers = any(c.__module__.startswith("transformers.") for c in type(model).__mro__)
    return TRANSFORMERS_STEM if of_transformers else DIFFUSERS_STEM


def is_weights_name(name: str) -> bool:
    """Whether a file of this name is a weight file or an index of such."""
    return _NAME.fullmatch(name) is not None


def write_weights(
    tensors: Mapping[str, Tensor], folder: Path, stem: str, max_shard_size: int | str
) -> dict[str, dict[str, Any]]:
    """Write `tensors` into one file or several of at most `max_shard_size` bytes, with an index.

    A tensor that is larger gets a file of its own. Equal tensors in equal order give equal bytes.

    Returns:
        What config.json records: file name -> {"bytes", "sha256"}.
    """
    shards = _shards(tensors, _size(max_shard_size))
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    recorded = {}
    for name, shard in zip(names, shards, strict=True):
        # One metadata key: safetensors writes several in an order that changes from run to run.
        save_file(shard, folder / name, metadata={"format": "pt"})
        recorded[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    return recorded


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards


def _size(value: int | str) -> int:
    """Bytes of 10_000 or "10GB", as diffusers writes it."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"(\d+)([KMGT]B)", value.upper()) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise CheckpointError(
            f'max_shard_size is {value!r}; expected bytes or a text such as "10GB" or "500MB"'
        )
    return int(match[1]) * _UNITS[match[2]]


def check_weights(folder: Path, recorded: Any) -> list[Path]:
    """The weight files that config.json records, each of the recorded size and checksum.

    Raises:
        CheckpointError: config.json records no files, or a file is missing, cut off or changed.
    """
    good = isinstance(recorded, dict) and recorded and all(is_weights_name(n) for n in recorded)
    if not good or not all(isinstance(row, dict) for row in recorded.values()):
        raise CheckpointError(f"{folder / 'config.json'} does not describe its weight files")
    for name, row in recorded.items():
        file = folder / name
        try:
            size = file.stat().st_size
            if not file.is_file():
                raise OSError("it is not a regular file")
            if size != row.get("bytes"):
                raise CheckpointError(
                    f"{file} has {size} bytes; config.json expects {row.get('bytes')}: the file was "
                    "cut off or changed. Copy or save it again."
                )
            if sha256(file) != row.get("sha256"):
                raise CheckpointError(
                    f"{file} does not have the checksum that config.json expects: it was damaged "
                    "or changed. Copy or save it again."
                )
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return [folder / name for name in recorded]


def read_tensors(
    files: list[Path], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Each wanted tensor of the files; safetensors maps them, so memory is taken when they are read."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in filter(wanted, opened.keys()):
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
