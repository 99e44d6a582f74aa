"""Faults: processes killed at random moments, full and read-only disks, missing tools and devices.

Children are forked from a process that has imported everything, so a kill hits the work and not the imports.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from robust_model import CONFIG, calibrated, fingerprint, float_model, inputs

import pq_fx
from pq_fx.errors import CalibrationError, CheckpointError, PQError
from pq_fx.statistics_file import load_statistics

CALLS = 4
Found = list[dict[str, Any]]


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


def kill_at(work: Callable[[], None], seconds: float) -> bool:
    """Kill a child with SIGKILL after this time; False where it was done before."""
    child = fork(work)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the child failed by itself: {status}")
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    wait(child)
    return True


def duration(work: Callable[[], None]) -> float:
    start = time.monotonic()
    if wait(fork(work)):
        raise RuntimeError("the child failed without a kill")
    return time.monotonic() - start


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

    whole, tally = (
        duration(work),
        {"tried": 0, "killed": 0, "wrong": 0, "lost": 0, "calls kept": []},
    )
    for number in range(count):
        for name in ("s", "told"):
            (base / name).unlink(missing_ok=True)
        tally["killed"] += kill_at(work, rng.uniform(0, whole))
        tally["tried"] += 1
        told = int((base / "told").read_text() or 0) if (base / "told").exists() else 0
        held = known.get((base / "s").read_bytes()) if (base / "s").exists() else 0
        tally["wrong"] += held is None
        tally["lost"] += held is not None and held < told
        tally["calls kept"].append(held)
        if number % 10 == 0 and held:
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
        pq_fx.save(model, base / "m")

    pq_fx.save(old, base / "m")
    whole, tally = duration(work), {"tried": 0, "killed": 0, "wrong": 0, "lost": 0, "found": {}}
    for _ in range(count):
        pq_fx.save(old, base / "m")
        for left in base.glob(".m.*"):
            subprocess.run(["rm", "-r", str(left)], check=True)
        tally["killed"] += kill_at(work, rng.uniform(0, whole))
        tally["tried"] += 1
        folder, place = base / "m", "m"
        if not folder.exists():  # between the two renames
            (folder,) = base.glob(".m.old-*")
            place = ".m.old"
        try:
            loaded = fingerprint(pq_fx.load(folder, float_model(1)))
        except PQError:
            tally["lost"] += 1
            continue
        which = next((name for name, wanted in known.items() if wanted == loaded), None)
        tally["wrong"] += which is None
        tally["found"][f"{which} in {place}"] = tally["found"].get(f"{which} in {place}", 0) + 1
    return tally


# Disks -------------------------------------------------------------------------------------------


def full_disk(base: Path) -> Found:
    """A small tmpfs, or else a limit on the size of files: older files whole, a named error, nothing left over."""
    old, quantizer = float_model(), calibrated(float_model())
    pq_fx.prepare(old, CONFIG, statistics=quantizer.statistics()).convert()
    base.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=180k", "tmpfs", str(base)],
        capture_output=True,
        check=False,
    ).returncode
    found: Found = []
    try:
        pq_fx.save(old, base / "m")
        calibrated(float_model(), calls=1).save_statistics(base / "s")
        before = {f: f.read_bytes() for f in base.rglob("*") if f.is_file()}

        def body() -> None:
            if not mounted:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            _named(CheckpointError, "cannot be written.*bytes", lambda: pq_fx.save(old, base / "m"))
            _named(
                CalibrationError, "cannot be written", lambda: quantizer.save_statistics(base / "s")
            )
            model = float_model()
            other = pq_fx.prepare(model, CONFIG)

            def watch() -> None:
                with (
                    torch.no_grad(),
                    other.calibrate(progress=False, autosave=base / "s", autosave_seconds=0),
                ):
                    for i in range(2):
                        model(**inputs(i))

            _named(CalibrationError, "cannot be written", watch)
            if other.calls != 2 or not other.convert().quantized:
                raise AssertionError("a full disk cost the calibration")

        wrong = wait(fork(body)) != 0
        after = {f: f.read_bytes() for f in base.rglob("*") if f.is_file()}
        how = "tmpfs of 180 kB" if mounted else "RLIMIT_FSIZE"
        found.append(
            {"fault": f"disk full ({how})", "wrong": int(wrong), "lost": int(after != before)}
        )
    finally:
        if mounted:
            subprocess.run(["umount", str(base)], check=True)
    return found


def read_only(base: Path) -> Found:
    """A folder of another user: loading works, saving is refused by name."""
    model = float_model()
    quantizer = calibrated(model)
    base.mkdir()
    quantizer.save_statistics(base / "s")
    quantizer.convert()
    pq_fx.save(model, base / "m")
    for folder in (base, base / "m"):
        folder.chmod(0o555)
    want = fingerprint(model)

    def body() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        if fingerprint(pq_fx.load(base / "m", float_model(1))) != want:
            raise AssertionError("loaded other numbers")
        load_statistics(base / "s")
        _named(CheckpointError, "Permission denied", lambda: pq_fx.save(model, base / "m"))
        _named(CalibrationError, "Permission denied", lambda: quantizer.save_statistics(base / "s"))

    base.parent.chmod(0o755)
    return [{"fault": "folder read-only", "wrong": int(wait(fork(body)) != 0), "lost": 0}]


def _named(kind: type[Exception], says: str, work: Callable[[], Any]) -> None:
    import re

    try:
        work()
    except kind as error:
        if not re.search(says, str(error)):
            raise AssertionError(f"{error} does not say {says}") from error
        return
    raise AssertionError(f"no {kind.__name__}")
