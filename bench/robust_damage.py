"""Seeded damage to checkpoints and statistics files as disks, networks and hurried people do it.

Each mutation is a function of a folder and a random generator.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], None]


def files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file())


def cut_off(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files(folder))
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def bit_flip(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files(folder))
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def header_flip(folder: Path, rng: random.Random) -> None:
    """A bit of the description: a safetensors header, or the JSON."""
    file = rng.choice(files(folder))
    raw = bytearray(file.read_bytes())
    length = 8 + struct.unpack("<Q", raw[:8])[0] if file.suffix == ".safetensors" else len(raw)
    raw[rng.randrange(length)] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def overwrite(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files(folder))
    raw = bytearray(file.read_bytes())
    at, count = rng.randrange(len(raw)), rng.randint(2, 64)
    raw[at : at + count] = rng.randbytes(len(raw[at : at + count]))
    file.write_bytes(raw)


def zero_page(folder: Path, rng: random.Random) -> None:
    """512 zero bytes, as a sector that was never written."""
    file = rng.choice(files(folder))
    raw = bytearray(file.read_bytes())
    at = 512 * rng.randrange((len(raw) + 511) // 512)
    raw[at : at + 512] = bytes(len(raw[at : at + 512]))
    file.write_bytes(raw)


def append(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files(folder))
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def exchange(folder: Path, rng: random.Random) -> None:
    """Two stretches of a file in each other's place: same size, same bytes, another order."""
    file = rng.choice(files(folder))
    raw = bytearray(file.read_bytes())
    size = min(64, len(raw) // 4)
    a, b = rng.randrange(len(raw) // 2 - size), rng.randrange(len(raw) // 2, len(raw) - size)
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
    file.write_bytes(raw)


def missing(folder: Path, rng: random.Random) -> None:
    rng.choice(files(folder)).unlink()


def emptied(folder: Path, rng: random.Random) -> None:
    rng.choice(files(folder)).write_bytes(b"")


def link(folder: Path, rng: random.Random) -> None:
    """A link in place of a file, to a system file, nowhere, a folder, or another file of the folder."""
    file = rng.choice(files(folder))
    goal = rng.choice(["/etc/hostname", "/nowhere", "/", "/dev/zero", *map(str, files(folder))])
    file.unlink()
    file.symlink_to(goal)


def huge_header(folder: Path, rng: random.Random) -> None:
    file = rng.choice([f for f in files(folder) if f.suffix == ".safetensors"])
    raw = file.read_bytes()
    length = rng.choice([2**63 - 1, 2**64 - 1, 2**40, len(raw), len(raw) - 8, 0, 1])
    file.write_bytes(struct.pack("<Q", length) + raw[8:])


RAW: tuple[Mutation, ...] = (
    cut_off, bit_flip, header_flip, overwrite, zero_page, append, exchange, missing, emptied, link, huge_header,
)  # fmt: skip


def mutate(folder: Path, rng: random.Random, kinds: tuple[Mutation, ...]) -> str:
    """Do one of `kinds`; returns its name. A mutation that changed no byte is done again."""
    before = _content(folder)
    while True:
        kind = rng.choice(kinds)
        kind(folder, rng)
        if _content(folder) != before:
            return kind.__name__


def _content(folder: Path) -> dict[str, Any]:
    entries = sorted(folder.iterdir())
    return {e.name: os.readlink(e) if e.is_symlink() else e.read_bytes() for e in entries}
