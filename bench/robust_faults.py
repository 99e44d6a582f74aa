"""Full and read-only disks, missing tools and devices; with the kills of robust_kills.py."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from robust_kills import fork, kill_calibrate, kill_save, wait
from robust_model import CONFIG, calibrated, fingerprint, float_model, inputs

import pq_fx
from pq_fx.errors import CalibrationError, CheckpointError, UnsupportedDeviceError
from pq_fx.kernels.devices import execution
from pq_fx.kernels.formats import Format
from pq_fx.statistics_file import load_statistics

Found = list[dict[str, Any]]

# Disks -------------------------------------------------------------------------------------------


def full_disk(base: Path) -> Found:
    """A small tmpfs, or else a limit on the size of files: older files whole, a named error, nothing left over."""
    old, quantizer = float_model(), calibrated(float_model())
    pq_fx.prepare(old, CONFIG, statistics=quantizer.statistics()).convert()
    base.mkdir()
    mounted = not _command("mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(base))
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
        how = "tmpfs of 400 kB" if mounted else "RLIMIT_FSIZE"
        found.append(
            {"fault": f"disk full ({how})", "wrong": int(wrong), "lost": int(after != before)}
        )
    finally:
        if mounted:
            _command("umount", str(base))
    return found


def read_only(base: Path) -> Found:
    """A folder that cannot be written: loading works, saving is refused by name."""
    model = float_model()
    quantizer = calibrated(model)
    base.mkdir()
    root = os.getuid() == 0  # whom permissions do not stop
    mounted = root and not _command("mount", "-t", "tmpfs", "tmpfs", str(base))
    how = "mount" if mounted else "simulated" if root else "permissions"
    try:
        quantizer.save_statistics(base / "s")
        quantizer.convert()
        pq_fx.save(model, base / "m")
        want = fingerprint(model)
        if mounted:
            _command("mount", "-o", "remount,ro", str(base))
        elif not root:
            base.chmod(0o555)

        def body() -> None:
            if fingerprint(pq_fx.load(base / "m", float_model(1))) != want:
                raise AssertionError("loaded other numbers")
            load_statistics(base / "s")
            if how == "simulated":
                mock.patch.object(
                    Path, "mkdir", side_effect=PermissionError("Permission denied")
                ).start()
            says = "cannot be written: .*(Permission denied|Read-only)"
            _named(CheckpointError, says, lambda: pq_fx.save(model, base / "m"))
            _named(CalibrationError, says, lambda: quantizer.save_statistics(base / "s"))

        return [
            {"fault": f"folder read-only ({how})", "wrong": int(wait(fork(body)) != 0), "lost": 0}
        ]
    finally:
        if mounted:
            _command("umount", str(base))
        base.chmod(0o755)


def _command(*words: str) -> int:
    return subprocess.run(words, capture_output=True, check=False).returncode


def _named(kind: type[Exception], says: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except kind as error:
        if not re.search(says, str(error)):
            raise AssertionError(f"{error} does not say {says}") from error
        return
    raise AssertionError(f"no {kind.__name__}")


# Missing tools and devices -----------------------------------------------------------------------


def missing(base: Path) -> Found:
    """No g++, no GPU, no Triton, a chip without fp8 or without any path: what works works, the rest says what to do."""
    base.mkdir()
    found = [
        {"fault": name, "wrong": int(wait(fork(partial(work, base))) != 0), "lost": 0}
        for name, work in (("no g++", _no_compiler), ("no GPU", _no_gpu), ("old chips", _old_chips))
    ]
    done = subprocess.run(
        [sys.executable, "-c", _NO_TRITON, str(Path(__file__).parent), str(base / "t")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(done.stderr[-2000:])
    return [*found, {"fault": "no Triton", "wrong": int(done.returncode != 0), "lost": 0}]


def _no_compiler(base: Path) -> None:
    os.environ["PATH"] = "/nonexistent"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(base / "cache")
    torch._inductor.config.cpp.cxx = (None, "g++")  # was read from CXX when torch was imported
    _road(base / "g")
    model = float_model()
    calibrated(model).convert()
    compiled = torch.compile(model, backend="permuquant")
    with torch.no_grad():
        says = "no C.. compiler|and this machine has none: install g"
        _named(Exception, says, lambda: compiled(**inputs(7)))


def _no_gpu(base: Path) -> None:
    if torch.cuda.is_available():
        raise AssertionError("this machine has a GPU")
    _road(base / "n")
    fmt = Format.parse("int4:64:bf16")
    _named(
        UnsupportedDeviceError,
        "finds no CUDA device; use 'cpu'",
        lambda: execution("cuda", fmt, fmt),
    )


def _old_chips(base: Path) -> None:
    fmt = Format.parse("int4:64:bf16")
    if execution("cuda", fmt, fmt, capability=(8, 0)).carrier == "e4m3":
        raise AssertionError("fp8 on a chip without it")
    for chip in ((7, 5), (6, 1), (13, 0)):
        _named(
            UnsupportedDeviceError,
            "supported: cpu",
            lambda chip=chip: execution("cuda", fmt, fmt, capability=chip),
        )


def _road(folder: Path) -> None:
    """Calibrate, convert, run, save and load, without compiling."""
    torch.compiler.reset()
    model = float_model()
    calibrated(model).convert()
    pq_fx.save(model, folder)
    if fingerprint(pq_fx.load(folder, float_model(1))) != fingerprint(model):
        raise AssertionError("other numbers")


_NO_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import robust_faults
robust_faults._road(Path(sys.argv[2]))
"""


def run_faults(kills: int, seed: int, work: Path) -> dict[str, Any]:
    """Every fault; `kills` processes are killed in each of calibrate, convert and save, and save alone."""
    torch.set_num_threads(1)  # other threads do not survive a fork
    rng = random.Random(seed)
    parts: dict[str, Any] = {}
    for name in ("calibrate", "convert and save", "save"):
        base = work / name
        base.mkdir(parents=True)
        if name == "calibrate":
            parts[name] = kill_calibrate(kills, rng, base)
        else:
            parts[name] = kill_save(kills, rng, base, convert=name != "save")
        print(f"killed in {name}:", parts[name], flush=True)
    faults = [*full_disk(work / "full"), *read_only(work / "locked"), *missing(work / "missing")]
    print(faults, flush=True)
    every = [*parts.values(), *faults]
    return {
        "tried": sum(p["tried"] for p in parts.values()) + len(faults),
        "wrong": sum(p["wrong"] for p in every),
        "lost": sum(p["lost"] for p in every),
        "kills": parts,
        "faults": faults,
        "seed": seed,
    }
