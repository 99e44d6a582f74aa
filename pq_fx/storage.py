"""Writing a folder so that a crash never leaves a half-written one under its final name."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pq_fx.errors import CheckpointError, PQError

log = logging.getLogger("pq_fx")


@contextmanager
def writing(
    target: str | os.PathLike[str], named: type[PQError], size: Callable[[], int]
) -> Iterator[None]:
    """Say by name what keeps `target` from being written (full, read-only), with the bytes it takes.

    To be put around `atomic_folder` or `atomic_file`, which leave what was there before.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise named(
            f"{target} cannot be written: {error}. It takes about {size()} bytes; "
            f"{_free(Path(target))} are free there. What was there before is unchanged. "
            "Free space, or save somewhere else"
        ) from error


def _free(path: Path) -> int:
    there = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    return shutil.disk_usage(there).free


def _tell_of_leftovers(final: Path) -> None:
    for left in sorted(final.parent.glob(f".{glob.escape(final.name)}.*-*")):
        log.warning(
            "%s was left by a save that was cut off; delete it if no other save is running", left
        )


@contextmanager
def atomic_folder(target: str | os.PathLike[str], check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `target`, on an error it is removed.

    The new folder lies beside `target`, every file in it is synced to disk, and it gets its final
    name by one rename. A folder that `target` names already is complete until that rename, and is
    deleted after it. Between the two renames that replacing takes, the name is briefly absent; what
    a crash there leaves is the whole old folder under ``.NAME.old-*`` beside the new one.

    Args:
        target: the folder to write; its parents are made.
        check: called with an existing `target` before anything is written; raises to refuse it.
    """
    final = Path(target).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        if not final.is_dir():
            raise CheckpointError(f"{final} is a file; expected a folder or a name that is free")
        check(final)
    _tell_of_leftovers(final)
    tag = uuid.uuid4().hex[:12]
    fresh = final.with_name(f".{final.name}.new-{tag}")
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.rglob("*"):
            _sync(file)
        _sync(fresh)
        _swap(fresh, final, final.with_name(f".{final.name}.old-{tag}"))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _swap(fresh: Path, final: Path, aside: Path) -> None:
    if not final.exists():
        fresh.rename(final)
        _sync(final.parent)
        return
    final.rename(aside)
    try:
        fresh.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name beside `target` to write to; on success it becomes `target`, on an error it is removed."""
    final = Path(target).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    _tell_of_leftovers(final)
    fresh = final.with_name(f".{final.name}.new-{uuid.uuid4().hex[:12]}")
    try:
        yield fresh
        _sync(fresh)
        fresh.replace(final)
        _sync(final.parent)
    finally:
        fresh.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
