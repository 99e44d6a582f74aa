"""Kills, full and read-only disks, missing tools; bench/robustness.py does fifty kills of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import robust_faults
from small_calls import CONFIG, block, calls, gathered

import pq_fx
from pq_fx.errors import CalibrationError, CheckpointError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks children to kill them")


@pytest.mark.timeout(500)
def test_nothing_wrong_and_nothing_lost(tmp_path: Path) -> None:
    """In a process of its own: other threads of this one do not survive a fork."""
    bench = Path(robust_faults.__file__).parent / "robustness.py"
    command = [sys.executable, str(bench), "faults", "--kills", "3", "--out", str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads((tmp_path / "f").read_text())["faults"]
    assert (result["wrong"], result["lost"]) == (0, 0)
    assert len(result["faults"]) == 6 and result["tried"] >= 15


def test_a_full_disk_costs_no_calibration(tmp_path: Path, monkeypatch, caplog) -> None:
    def full(*_args, **_kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pq_fx.statistics_file.save_file", full)
    quantizer = pq_fx.prepare(block(), CONFIG)
    says = r"cannot be written: .*No space left.*takes about \d+ bytes; \d+ are free"
    with (
        pytest.raises(CalibrationError, match=says),
        quantizer.calibrate(progress=False, autosave=tmp_path / "s", autosave_seconds=0),
    ):
        for x in calls(2):
            quantizer.model(x)
    assert "calibration goes on without its file" in caplog.text
    assert quantizer.calls == 2 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    quantizer.save_statistics(tmp_path / "s")
    gathered(block(), calls(2)).save_statistics(tmp_path / "t")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "t").read_bytes()


def test_what_a_cut_off_save_left_is_told(tmp_path: Path, caplog) -> None:
    quantizer = gathered(block(), calls(1))
    quantizer.convert()
    pq_fx.save(quantizer.model, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old-123")
    with pytest.raises(
        CheckpointError, match=r"cut off; the older checkpoint is whole in .*\.m\.old-"
    ):
        pq_fx.load(tmp_path / "m", block())
    pq_fx.save(quantizer.model, tmp_path / "m")
    assert "m.old-123 was left by a save that was cut off" in caplog.text
