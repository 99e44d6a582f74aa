"""Reads damaged checkpoints and statistics the three ways there are, and says what came of it."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import robust_crafted as crafted
import robust_damage as damage
import torch
from diffusers import FluxTransformer2DModel
from robust_model import CONFIG, calibrated, fingerprint, float_model
from torch import nn

import pq_fx
from pq_fx.errors import PQError, UnseenError
from pq_fx.modules import quantized_linears

SECONDS = 30  # a load takes 0.05 s; whatever takes longer hangs

Outcome = tuple[str, str]  # what happened, and the message

# What loading may not do -------------------------------------------------------------------------

_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")
_events: list[str] = []
_allowed: list[Path] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event in _FORBIDDEN:
        _events.append(f"{event} {args[0]!r}")
    elif event == "open" and str(args[0]).endswith((".safetensors", "passwd", "hostname")):
        name = str(args[0])
        if ".." in name or not Path(name).absolute().is_relative_to(_allowed[0]):
            _events.append(f"open {name!r}")


sys.addaudithook(_hook)


class Hang(Exception):
    """A load took too long."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Inside, no other folder may be opened, nothing executed, and `SECONDS` may pass."""

    def late(*_: Any) -> None:
        raise Hang

    _events.clear()
    _allowed.append(folder)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        _allowed.clear()


# Three readers -----------------------------------------------------------------------------------


def by_load(folder: Path, wanted: dict[str, Any]) -> Outcome:
    model = float_model(1)
    before = fingerprint(model)
    outcome, found = _attempt(folder, lambda: pq_fx.load(folder, model))
    if found is None:
        return ("half changed", outcome[1]) if fingerprint(model) != before else outcome
    return _compare(found, wanted)


def by_diffusers(folder: Path, wanted: dict[str, Any]) -> Outcome:
    outcome, found = _attempt(folder, lambda: FluxTransformer2DModel.from_pretrained(folder))
    if found is None and outcome[0] == "unnamed":
        # Files that diffusers reads before it asks us: its own errors, as for a float model.
        return "refused by diffusers", outcome[1]
    return outcome if found is None else _compare(found, wanted)


def by_statistics(folder: Path, wanted: dict[str, Any]) -> Outcome:
    """Through to the converted model: moments alone do not tell what a plan does."""
    model = float_model()
    before = fingerprint(model)

    def convert() -> nn.Module:
        pq_fx.prepare(model, CONFIG, statistics=folder / "statistics.safetensors").convert()
        return model

    outcome, found = _attempt(folder, convert)
    if found is None:
        return ("half changed", outcome[1]) if fingerprint(model) != before else outcome
    return _compare(found, wanted)


def _attempt(folder: Path, load: Callable[[], nn.Module]) -> tuple[Outcome, nn.Module | None]:
    found = None
    try:
        with watched(folder):
            found = load()
        outcome = "loaded", ""
    except PQError as error:
        outcome = "refused by name", f"{type(error).__name__}: {error}"
    except Hang:
        outcome = "hang", ""
    except Exception as error:
        outcome = "unnamed", f"{type(error).__name__}: {error}"
    if _events:
        return ("escaped", "; ".join(_events)), None
    return outcome, found


def _compare(model: nn.Module, wanted: dict[str, Any]) -> Outcome:
    try:
        found = fingerprint(model)
        return ("exact", "") if found == wanted else ("other numbers", _difference(found, wanted))
    except (
        UnseenError
    ) as error:  # the record of calibration's inputs was changed, with its checksum
        return "refused by name when called", str(error)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs: tensors by name, modules, and by how much the numbers."""
    state, expected = found["state"], wanted["state"]
    tensors = sorted(n for n in {*state, *expected} if state.get(n) != expected.get(n))
    modules = [m for m in found["modules"] if m not in wanted["modules"]]
    got, want = (
        torch.frombuffer(bytearray(f["out"]), dtype=torch.float32) for f in (found, wanted)
    )
    size = f"{got.numel()} numbers for {want.numel()}"
    if got.numel() == want.numel():
        size = f"{int((got != want).sum())} of {want.numel()} numbers, largest {float((got - want).abs().max()):.3g}"
    return f"tensors {tensors[:8]}, modules {modules[:4]}, {size}"


READERS = {"pq_fx.load": by_load, "from_pretrained": by_diffusers, "statistics": by_statistics}
GOOD = ("refused by name", "refused by name when called", "refused by diffusers", "exact")


def run_mutations(count: int, seed: int, work: Path) -> dict[str, Any]:
    """`count` seeded mutations: 3 of 10 of statistics, the others of checkpoints, each read both ways."""
    originals = _originals(work)
    tried: Counter[str] = Counter()
    outcomes: dict[str, Counter[str]] = {}
    wrong: list[dict[str, Any]] = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        of_statistics = number % 10 < 3
        name = "statistics" if of_statistics else rng.choice(["one file", "shards", "shards"])
        source, wanted = originals[name]
        folder = work / "tried" / "m"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(source, folder)
        malice = number % 2 == 1
        if of_statistics:
            kinds = (crafted.statistics_content,) if malice else damage.RAW
        else:
            kinds = crafted.CRAFTED if malice else damage.RAW
        kind = damage.mutate(folder, rng, kinds)
        tried[kind] += 1
        for reader in ("statistics",) if of_statistics else ("pq_fx.load", "from_pretrained"):
            outcome, message = READERS[reader](folder, wanted)
            if outcome == "other numbers" and malice and kind in ("statistics_content",):
                outcome = "consistent: another calibration"  # the checksum was repaired with it
            outcomes.setdefault(f"{reader}: {kind}", Counter())[outcome] += 1
            if outcome not in (*GOOD, "consistent: another calibration"):
                wrong.append(
                    {
                        "number": number,
                        "kind": kind,
                        "reader": reader,
                        "outcome": outcome,
                        "message": message[:300],
                    }
                )
                print(wrong[-1], flush=True)
        if number % 100 == 99:
            print(f"{number + 1} tried, {len(wrong)} wrong", flush=True)
    return {
        "tried": count, "reads": sum(sum(c.values()) for c in outcomes.values()), "wrong": len(wrong), "lost": 0,
        "seed": seed, "outcomes": dict(sum(outcomes.values(), Counter())), "by_kind": outcomes, "found": wrong,
    }  # fmt: skip


def _originals(work: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    model = float_model()
    quantizer = calibrated(model)
    (work / "statistics").mkdir(parents=True)
    quantizer.save_statistics(work / "statistics" / "statistics.safetensors")
    quantizer.convert()
    assert quantized_linears(model)
    pq_fx.save(model, work / "one" / "m")
    pq_fx.save(model, work / "shards" / "m", max_shard_size="40KB")
    wanted = fingerprint(model)
    folders = {
        "one file": work / "one" / "m",
        "shards": work / "shards" / "m",
        "statistics": work / "statistics",
    }
    return {name: (folder, wanted) for name, folder in folders.items()}
