"""What is not saved, what is not replaced, and what a crash while saving leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    WEIGHTS,
    Toy,
    contents,
    quantized_toy,
)

from pq_fx import checkpoint
from pq_fx.checkpoint import load, save
from pq_fx.errors import CheckpointError


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="no quantized linear; convert it first"):
        save(Toy(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_meta_model_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="meta device"):
        save(quantized_toy().to("meta"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_the_whole_folder(saved):
    _, folder = saved
    other = quantized_toy(seed=3)
    save(other, folder)
    assert sorted(contents(folder)) == ["config.json", WEIGHTS]  # the report is gone
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    x = torch.randn(2, 24)
    assert torch.equal(load(folder, Toy())(x), other(x))


def test_a_folder_with_other_files_is_not_replaced(saved):
    _, folder = saved
    (folder / "thesis.tex").write_text("dear")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        save(quantized_toy(seed=3), folder)
    assert (folder / "thesis.tex").read_text() == "dear"
    load(folder, Toy())


def test_a_foreign_model_is_not_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"_class_name": "Mine"}')
    with pytest.raises(CheckpointError, match="pq_fx.save did not write it"):
        save(quantized_toy(), tmp_path / "m")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save(quantized_toy(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(quantized_toy(), tmp_path / "empty")


@pytest.mark.parametrize("call", ["write_weights", "model_config"])
def test_an_error_while_saving_leaves_the_old_folder(saved, monkeypatch, call):
    _, folder = saved
    before = contents(folder)

    def broken(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, call, broken)
    with pytest.raises(CheckpointError, match="cannot be written: disk full.* bytes; .* are free"):
        save(quantized_toy(seed=3), folder)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_an_error_in_the_swap_puts_the_old_folder_back(saved, monkeypatch):
    _, folder = saved
    before = contents(folder)
    rename = Path.rename

    def broken(self, target):
        if ".new-" in self.name:
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(CheckpointError, match="no rename today"):
        save(quantized_toy(seed=3), folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


# Saves into base/<step>/m from one forked child a step, which dies at its step-th file operation.
KILLER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from checkpoints import quantized_toy
from pq_fx.checkpoint import save

torch.set_num_threads(1)  # other threads do not survive a fork
base, armed, step, stop = sys.argv[2], False, 0, 0
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

def hook(event, args):
    global step
    names = [str(a) for a in args]
    if armed and event in FILE_EVENTS and any(n.endswith("/m") or "/.m." in n for n in names):
        step += 1
        if step == stop:
            os._exit(9)

sys.addaudithook(hook)
model = quantized_toy(seed=3)
for stop in map(int, sys.argv[3:]):
    child = os.fork()
    if not child:
        armed = True
        save(model, f"{base}/{stop}/m")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_kill_at_any_step_leaves_a_whole_folder(tmp_path):
    """Wherever saving over an old folder dies, one whole folder is left: the old or the new one."""
    old, new = quantized_toy(), quantized_toy(seed=3)
    steps = [*range(1, 16), 99]
    for step in steps:
        save(old, tmp_path / str(step) / "m")
    arguments = [str(Path(__file__).parents[1]), str(tmp_path), *map(str, steps)]
    subprocess.run([sys.executable, "-c", KILLER, *arguments], check=True, timeout=300)
    x = torch.randn(2, 24)
    known = {"old": old(x), "new": new(x)}
    outcomes = []
    for step in steps:
        base = tmp_path / str(step)
        folder = base / "m"
        if not folder.exists():  # between the two renames
            (folder,) = (entry for entry in base.iterdir() if ".old-" in entry.name)
        y = load(folder, Toy())(x)
        outcomes.append(next(name for name, wanted in known.items() if torch.equal(y, wanted)))
    assert outcomes == sorted(outcomes, reverse=True)  # old until some step, new from then on
    assert {outcomes[0], outcomes[-1]} == {"old", "new"}
