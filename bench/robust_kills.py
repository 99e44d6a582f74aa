"""Processes killed by SIGKILL at random moments of calibration, conversion and saving.

Children are forked from a process that has imported everything, so a kill hits the work and not the imports.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from robust_model import CONFIG, calibrated, fingerprint, float_model, inputs

import pq_fx
from pq_fx.errors import PQError
from pq_fx.statistics_file import load_statistics

CALLS = 8


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child with its own Dynamo; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        code = 0
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(work: Callable[[], None], seconds: float, after: Path | None) -> bool:
    """Kill a child with SIGKILL so long after it began, or after it made the file `after`; False if it was done."""
    child = fork(work)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the child failed by itself: {status}")
            return False
        if after is not None and after.exists():
            end, after = time.monotonic() + seconds, None
        elif after is not None:
            end = time.monotonic() + seconds
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    wait(child)
    return True


class Kills:
    """Kills `count` children; every other one in its later part, which begins when it makes the file `told`."""

    def __init__(
        self,
        work: Callable[[], None],
        reset: Callable[[], None],
        told: Path,
        count: int,
        rng: random.Random,
    ) -> None:
        self.work, self.reset, self.told, self.count, self.rng = work, reset, told, count, rng
        self.tally: dict[str, Any] = {"tried": 0, "killed": 0, "wrong": 0, "lost": 0, "found": {}}
        start = time.monotonic()
        child = fork(work)
        while not told.exists():
            time.sleep(0.0005)
        first = time.monotonic()
        if wait(child):
            raise RuntimeError("the child failed without a kill")
        self.whole, self.later = time.monotonic() - start, time.monotonic() - first

    def again(self) -> bool:
        """Kill one more; False when there were enough (or none lets itself be killed)."""
        tally = self.tally
        if tally["killed"] == self.count or tally["tried"] == 4 * self.count:
            return False
        self.told.unlink(missing_ok=True)
        self.reset()
        late = tally["tried"] % 2 == 0
        seconds = self.rng.uniform(0, self.later if late else self.whole)
        tally["killed"] += kill_at(self.work, seconds, self.told if late else None)
        tally["tried"] += 1
        return True

    def count_as(self, what: str) -> None:
        """Note what was found after a kill."""
        self.tally["found"][what] = self.tally["found"].get(what, 0) + 1


# Kills -------------------------------------------------------------------------------------------


def kill_calibrate(count: int, rng: random.Random, base: Path) -> dict[str, Any]:
    """The statistics file holds every call whose save was done, bit by bit, and calibration goes on from it."""
    known = {}
    for calls in range(1, CALLS + 1):
        calibrated(float_model(), calls=calls).save_statistics(base / "part")
        known[(base / "part").read_bytes()] = calls

    def work() -> None:
        torch.compiler.reset()
        model = float_model()
        quantizer = pq_fx.prepare(model, CONFIG)
        with (
            torch.no_grad(),
            quantizer.calibrate(progress=False, autosave=base / "s", autosave_seconds=0),
        ):
            for i in range(CALLS):
                model(**inputs(i))
                (base / "told").write_text(str(i + 1))

    def reset() -> None:
        (base / "s").unlink(missing_ok=True)

    kills = Kills(work, reset, base / "told", count, rng)
    tally = kills.tally
    while kills.again():
        told = int((base / "told").read_text() or 0) if (base / "told").exists() else 0
        held = known.get((base / "s").read_bytes()) if (base / "s").exists() else 0
        tally["wrong"] += held is None
        tally["lost"] += held is not None and held < told
        kills.count_as(f"{held} calls")
        if tally["tried"] % 5 == 0 and held:
            resumed = pq_fx.prepare(float_model(), CONFIG, statistics=base / "s")
            with torch.no_grad(), resumed.calibrate(progress=False, skip=held):
                for i in range(CALLS):
                    resumed.model(**inputs(i))
            resumed.save_statistics(base / "resumed")
            tally["wrong"] += known.get((base / "resumed").read_bytes()) != CALLS
    return tally


def kill_save(count: int, rng: random.Random, base: Path, *, convert: bool) -> dict[str, Any]:
    """Saving over an older model, with converting before it or alone: the old or the new folder, whole."""
    quantizer = calibrated(float_model())
    quantizer.save_statistics(base / "s")
    new = float_model()
    pq_fx.prepare(new, CONFIG, statistics=base / "s").convert()
    old = float_model()
    pq_fx.prepare(
        old, pq_fx.QuantConfig("int4", group_size=32, method="rtn"), statistics=base / "s"
    ).convert()
    known = {"old": fingerprint(old), "new": fingerprint(new)}
    statistics = load_statistics(base / "s")

    def work() -> None:
        model = new
        if convert:
            model = float_model()
            pq_fx.prepare(model, CONFIG, statistics=statistics).convert()
        (base / "told").touch()
        pq_fx.save(model, base / "m")

    def reset() -> None:
        pq_fx.save(old, base / "m")
        for left in base.glob(".m.*"):
            shutil.rmtree(left)

    pq_fx.save(old, base / "m")
    kills = Kills(work, reset, base / "told", count, rng)
    while kills.again():
        folder, place = base / "m", "m"
        if not folder.exists():  # between the two renames
            (folder,) = base.glob(".m.old-*")
            place = ".m.old"
        try:
            loaded = fingerprint(pq_fx.load(folder, float_model(1)))
        except PQError:
            kills.tally["lost"] += 1
            continue
        which = next((name for name, wanted in known.items() if wanted == loaded), None)
        kills.tally["wrong"] += which is None
        kills.count_as(f"{which} in {place}")
    return kills.tally
