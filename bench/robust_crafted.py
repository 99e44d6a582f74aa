"""Seeded malice: mutations that change what a file means and repair every checksum.

What is left to refuse them are the checks of content.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from robust_damage import Mutation, files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pq_fx import checkpoint_config, statistics_file, storage

# Crafted: a checkpoint's settings ----------------------------------------------------------------

JUNK: tuple[Any, ...] = (
    None, [], {}, "", "x", -1, -64, 1e308, True, 10**30, [1], {"a": 1}, "../../etc/passwd", "\x00", "é",
    [[[[[]]]]], {"quant_method": "permuquant"},
)  # fmt: skip


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / checkpoint_config.CONFIG_FILE
    whole = json.loads(file.read_text())
    change(whole["quantization_config"])
    whole["quantization_config"][checkpoint_config.CHECKSUM] = checkpoint_config.checksum(whole)
    file.write_text(json.dumps(whole))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _replace(root: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        root = root[key]
    root[path[-1]] = new


def junk_setting(folder: Path, rng: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        _replace(config, rng.choice(list(_places(config))), rng.choice(JUNK))

    _edit(folder, change)


def lost_setting(folder: Path, rng: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        *path, last = rng.choice(list(_places(config)))
        for key in path:
            config = config[key]
        del config[last]

    _edit(folder, change)


def version(folder: Path, rng: random.Random) -> None:
    _edit(
        folder, lambda c: c.update(format_version=rng.choice([0, 1, 2, 4, 99, -3, "3", 3.5, None]))
    )


def shard_path(folder: Path, rng: random.Random) -> None:
    """Weights somewhere else: beside the folder lies a file that would load."""
    name = next(f for f in files(folder) if f.suffix == ".safetensors").name
    shutil.copy(folder / name, folder.parent / name)
    trick = rng.choice(
        [f"../{name}", f"/{name}", f"./../{name}", str(folder.parent / name), f"x/../../{name}",
         f"..\\{name}", f"{name}\n", f"{name}\x00", "/dev/zero", "~/" + name, f"file://{name}", ""]
    )  # fmt: skip

    def change(config: dict[str, Any]) -> None:
        config["weights"][trick] = config["weights"].pop(name)

    _edit(folder, change)
    for index in folder.glob("*.index.json"):
        text = json.loads(index.read_text())
        text["weight_map"] = {k: trick if v == name else v for k, v in text["weight_map"].items()}
        index.write_text(json.dumps(text))


def bomb(folder: Path, rng: random.Random) -> None:
    """JSON that costs: depth, digits, width, a key twice, numbers that are none."""
    file = folder / checkpoint_config.CONFIG_FILE
    text = file.read_text()
    file.write_text(
        rng.choice(
            ["[" * 200_000, '{"a":' * 100_000, text[:-2] + ', "a": ' + "9" * 10_000 + "}",
             text[:-2] + ', "a": [' + "0," * 500_000 + "0]}", text[:-2] + ', "quantization_config": {}}',
             text[:-2] + ', "a": NaN}', text[:-2] + ', "a": 1e999}', "\ufeff" + text, text.replace(",", ",,", 1)]
        )
    )  # fmt: skip


# Crafted: a checkpoint's tensors -----------------------------------------------------------------


def _retensor(
    folder: Path, rng: random.Random, ending: str, change: Callable[[dict[str, Any], str], None]
) -> None:
    """Change a tensor whose name ends like this, in the file that holds it, and repair the checksums."""
    held = {
        name: file
        for file in files(folder)
        if file.suffix == ".safetensors"
        for name in load_file(file)
        if name.endswith(ending) and "norm" not in name
    }
    name = rng.choice(sorted(held))
    tensors = load_file(held[name])
    change(tensors, name)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, held[name], metadata={"format": "pt"}
    )
    record(folder, held[name])


def record(folder: Path, file: Path) -> None:
    row = {"bytes": file.stat().st_size, "sha256": storage.sha256(file)}
    _edit(folder, lambda config: config["weights"].update({file.name: row}))


def permutation(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str) -> None:
        perm = tensors[name]
        perm[rng.randrange(len(perm))] = rng.choice([-1, len(perm), 2**30, int(perm[0]) + 1])
        perm[-1] = perm[0]

    _retensor(folder, rng, ".perm", change)


def scale(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str) -> None:
        value = tensors[name].view(-1)
        # int4f's scales (robust_model.py) may be negative: with every checksum repaired that is another model.
        negative = 0.0 if name.startswith("single_") else -1.0
        value[rng.randrange(len(value))] = rng.choice([float("nan"), float("inf"), 0.0, negative])

    _retensor(folder, rng, "_scale", change)


def shape(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str) -> None:
        value = tensors[name]
        sizes = [tuple(value.shape[::-1]), (1, *value.shape), (value.numel(),), (value.numel(), 1)]
        other = [s for s in sizes if s != tuple(value.shape)]
        tensors[name] = value.reshape(rng.choice(other))

    _retensor(folder, rng, ".weight", change)


def dtype(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str) -> None:
        wrong = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        tensors[name] = tensors[name].view(wrong[tensors[name].element_size()])

    _retensor(folder, rng, rng.choice([".weight", "_scale", ".bias"]), change)


def tensor_names(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str) -> None:
        value = tensors.pop(name)
        if rng.random() < 0.7:
            new = [name + "x", name.upper(), "../" + name, "__class__", "\x00"]
            tensors[rng.choice(new)] = value

    _retensor(folder, rng, "", change)


CRAFTED: tuple[Mutation, ...] = (
    junk_setting, junk_setting, lost_setting, version, shard_path, bomb, permutation, scale, shape, dtype, tensor_names,
)  # fmt: skip

# Crafted: statistics -----------------------------------------------------------------------------


def statistics_content(folder: Path, rng: random.Random) -> None:
    """Junk in the description, or a tensor of another type, shape or value, with the checksum repaired."""
    (file,) = files(folder)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()[statistics_file.HEADER])
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    way = rng.randrange(6)
    if way == 0:
        _replace(header, rng.choice(list(_places(header))), rng.choice(JUNK))
    elif way == 1:
        del tensors[name]
    elif way == 2:
        tensors[name] = value.reshape(1, *value.shape)
    elif way == 3:
        tensors[name] = value.to(torch.float16 if value.is_floating_point() else torch.int32)
    elif way == 4:
        tensors[name] = value[: len(value) // 2].contiguous()
    elif value.numel():
        value.view(-1)[rng.randrange(value.numel())] = -(2**20)
    if isinstance(header, dict):
        header[statistics_file.CHECKSUM] = statistics_file.checksum(header, tensors)
    save_file(tensors, file, metadata={statistics_file.HEADER: json.dumps(header)})
