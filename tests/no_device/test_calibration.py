"""Calibration for people: interrupted and resumed, saved and read, added up over runs and processes, and shown."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchrun
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_calls import CONFIG, block, calls, gathered

import pq_fx
from pq_fx.errors import CalibrationError, GraphError
from pq_fx.passes import observe
from pq_fx.progress import CalibrationProgress, duration
from pq_fx.statistics_file import load_statistics


def saved(quantizer: pq_fx.Quantizer, path: Path) -> bytes:
    quantizer.save_statistics(path)
    return path.read_bytes()


def run(quantizer: pq_fx.Quantizer, inputs: list[torch.Tensor], **how) -> None:
    with torch.no_grad(), quantizer.calibrate(progress=False, **how):
        for x in inputs:
            quantizer.model(x)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch):
    """`interrupt(name, n)`: the n-th use of this method of the journal is where Ctrl-C arrives."""

    def at(name: str, count: int) -> None:
        original, uses = getattr(observe.Journal, name), 0

        def method(self, *args):
            nonlocal uses
            uses += 1
            original(self, *args)
            if uses == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(observe.Journal, name, method)

    return at


# Five points, of which "leave" ones are observed too: embed, norm (read by up and gate), down, out = 4 updates a call.
@pytest.mark.parametrize(
    ("where", "use", "whole"),
    [("keep", 3, 0), ("keep", 4 + 2, 1), ("keep_slots", 2 * 4 + 3, 2), ("keep", 3 * 4 + 1, 3)],
)
def test_resumed_equals_uninterrupted_to_the_bit(
    where: str, use: int, whole: int, tmp_path: Path, interrupt, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, model = calls(5), block()
    wanted = gathered(block(), inputs)
    bits = saved(wanted, tmp_path / "wanted")

    interrupt(where, use)
    first = pq_fx.prepare(model, CONFIG)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.INFO, "pq_fx"):
        run(first, inputs, autosave=tmp_path / "auto")
    assert first.calls == whole
    assert (f"interrupted after {whole} calls" in caplog.text) == (whole > 0)
    if whole == 0:
        with pytest.raises(CalibrationError, match="no statistics to save"):
            first.save_statistics(tmp_path / "nothing")
        assert not (tmp_path / "auto").exists()
        run(first, inputs)  # in the same process nothing is left of the broken call either
        assert saved(first, tmp_path / "again") == bits
        return
    part = gathered(block(), inputs[:whole])
    assert (tmp_path / "auto").read_bytes() == saved(part, tmp_path / "part")

    for name, rest, skip in (("rest", inputs[whole:], 0), ("all", inputs, whole)):
        resumed = pq_fx.prepare(block(), CONFIG, statistics=tmp_path / "auto")
        assert resumed.calls == whole
        run(resumed, rest, skip=skip)
        assert saved(resumed, tmp_path / name) == bits
    resumed.convert()
    wanted.convert()
    one, two = resumed.model.state_dict(), wanted.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_call_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    inputs, model = calls(3), block()
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        model(inputs[0])
        with pytest.raises(Exception, match="reduction dim|mat1|shape"):
            model(torch.randn(2, 5, 9))
        model(inputs[1])
    bits = saved(quantizer, tmp_path / "a")
    torch._dynamo.reset()  # it remembers the other shape, and names its placeholders by it
    assert bits == saved(gathered(block(), inputs[:2]), tmp_path / "b")
    assert bits != saved(gathered(block(), inputs[1:]), tmp_path / "c")


def test_a_file_alone_converts_to_the_same_bits(tmp_path: Path) -> None:
    quantizer = gathered(block(), calls(2), method="permuquant")
    quantizer.statistics().note["prompts"] = 2
    saved(quantizer, tmp_path / "s")
    settings = CONFIG | {"method": "permuquant"}
    resumed = pq_fx.prepare(block(), settings, statistics=tmp_path / "s")
    assert resumed.statistics().note == {"prompts": 2}
    one, two = quantizer.convert(), resumed.convert()
    assert one.layers == two.layers
    assert "fold" in {row.absorb for row in one.layers}
    state = quantizer.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in resumed.model.state_dict().items())


def test_autosave_by_time_and_at_the_end(tmp_path: Path) -> None:
    model, path = block(), tmp_path / "auto"
    quantizer, seen = pq_fx.prepare(model, CONFIG), []
    with torch.no_grad(), quantizer.calibrate(progress=False, autosave=path, autosave_seconds=0):
        for x in calls(2):
            model(x)
            seen.append(load_statistics(path).calls)
    assert seen == [1, 2]
    path.unlink()
    run(quantizer, calls(1, first=2), autosave=path)
    assert load_statistics(path).calls == 3
    assert [p.name for p in tmp_path.iterdir()] == ["auto"]


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    quantizer = gathered(block(), calls(1))
    saved(quantizer, tmp_path / "s")
    with pytest.raises(CalibrationError, match="another model.*Block.*names or shapes"):
        pq_fx.prepare(block(width=48), CONFIG, statistics=tmp_path / "s")
    with pytest.raises(CalibrationError, match="other weights of Block"):
        pq_fx.prepare(block(seed=1), CONFIG, statistics=quantizer.statistics())
    changed = block()
    changed.down.weight[0, 0] += 1e-6
    with pytest.raises(CalibrationError, match="other weights"):
        pq_fx.prepare(changed, CONFIG, statistics=tmp_path / "s")
    with torch.device("meta"):
        empty = type(changed)()
    pq_fx.prepare(empty, CONFIG, statistics=tmp_path / "s")  # offloaded: no values to compare
    other = pq_fx.prepare(block(), CONFIG | {"calibration_rows": 25}, statistics=tmp_path / "s")
    with pytest.raises(CalibrationError, match="24 rows.*calibration_rows=25"):
        run(other, calls(1))
    other.convert()  # without further calls the number does not matter


def test_files_that_are_damaged_or_foreign_are_refused(tmp_path: Path) -> None:
    saved(gathered(block(), calls(1)), tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    assert b'\\"version\\": 3' in whole
    lacking = load_file(tmp_path / "s")
    del lacking["down.weight/keys"], lacking["@plan/0"]
    for name, content, says in (
        ("cut", whole[:-9], "damaged"),
        ("old", whole.replace(b'\\"version\\": 3', b'\\"version\\": 7'), "version 7.*reads 3"),
        (
            "bare",
            whole.replace(b'\\"version\\": 3', b'\\"version\\": 1'),
            "version 1 .checksum: yes",
        ),
        ("json", whole.replace(b'\\"version\\": 3', b'\\"version\\"; 2'), "damaged"),
        ("row", whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:], "checksum is not the one"),
        ("text", b"{}", "damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=says):
            load_statistics(tmp_path / name)
    save_file(lacking, tmp_path / "foreign")
    with pytest.raises(CalibrationError, match="no statistics of pq_fx"):
        load_statistics(tmp_path / "foreign")
    from safetensors import safe_open

    with safe_open(tmp_path / "s", "pt") as opened:
        save_file(lacking, tmp_path / "lacking", metadata=opened.metadata())
    with pytest.raises(CalibrationError, match="damaged"):
        load_statistics(tmp_path / "lacking")
    with pytest.raises(CalibrationError, match="no file"):
        load_statistics(tmp_path / "nowhere")


def test_a_region_that_does_not_fold_is_not_saved(tmp_path: Path) -> None:
    quantizer = gathered(block(), calls(1))
    plan = quantizer.statistics().plan
    name, region = next((n, r) for n, r in plan.regions.items() if r.axes)
    plan.regions[name] = replace(region, axes=region.axes[1:])
    with pytest.raises(GraphError, match="not closed"):
        quantizer.save_statistics(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_runs_add_up(tmp_path: Path) -> None:
    a, b, c = (gathered(block(), calls(2, first=2 * s), seed=s).statistics() for s in range(3))
    both = a.merge(b)
    assert both.calls == 4 and both.seeds == {0, 1}
    one, two = both.merge(c), a.merge(b.merge(c))
    for name, moments in one.moments.items():
        assert torch.equal(moments.sample(), two.moments[name].sample())
        whole = gathered(block(), calls(6)).statistics().moments[name]
        assert torch.equal(moments.count, whole.count) and torch.equal(moments.amax, whole.amax)
        torch.testing.assert_close(moments.sum_squares, whole.sum_squares, rtol=1e-12, atol=0)
    with pytest.raises(CalibrationError, match="seed 1"):
        both.merge(b)
    with pytest.raises(CalibrationError, match="other weights"):
        a.merge(gathered(block(seed=3), calls(1), seed=9).statistics())
    merged = pq_fx.prepare(block(), CONFIG, statistics=one)
    assert merged.convert().calibration_calls == 6


def test_two_processes_equal_one_that_has_both_data(tmp_path: Path) -> None:
    torchrun.calibrate(tmp_path)
    # Rank 1 has a seed of its own; here one process has both data and both seeds.
    one = gathered(block(), calls(3)).statistics()
    two = gathered(block(), calls(2, first=3), seed=1 << 32).statistics()
    quantizer = pq_fx.prepare(block(), CONFIG, statistics=one.merge(two))
    bits = saved(quantizer, tmp_path / "one")
    assert (tmp_path / "0.safetensors").read_bytes() == bits
    assert (tmp_path / "1.safetensors").read_bytes() == bits
    # And with one seed, all sums are those of one run.
    whole = gathered(block(), calls(5)).statistics()
    for name, moments in quantizer.statistics().moments.items():
        assert torch.equal(moments.count, whole.moments[name].count)
        assert torch.equal(moments.amax, whole.moments[name].amax)
    errors = (tmp_path / "0.txt").read_text()
    assert errors == (tmp_path / "1.txt").read_text()
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        "both statistics were gathered with seed 0",
        "the statistics to be added up belong to another model",
        "cannot add up the statistics of rank 1",
    ]
    with pytest.raises(CalibrationError, match="torchrun"):
        quantizer.all_reduce()


def test_a_line_a_call_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    model = block()
    quantizer = pq_fx.prepare(model, CONFIG)
    with caplog.at_level(logging.INFO, "pq_fx"), torch.no_grad(), quantizer.calibrate(total=3):
        for x in calls(2):
            model(x)
        quantizer.expect(7)
        model(calls(1)[0])
    lines = [r.message for r in caplog.records if r.message.startswith("calibration call")]
    assert len(lines) == 3
    assert lines[0].startswith("calibration call 1 of 3: ") and "left" not in lines[0]
    assert "call 2 of 3" in lines[1] and lines[1].endswith(" left")
    assert "call 3 of 7" in lines[2]


def test_a_terminal_shows_a_summary_and_no_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    found = gathered(block(), calls(2)).statistics()
    with caplog.at_level(logging.INFO, "pq_fx"), CalibrationProgress(found, 4, console) as shown:
        shown.called()
        shown.called()
    text = console.file.getvalue()
    assert "2/4" in text and "4 linears" not in text
    assert f"{len(found.plan.linears)} linears in" in text and "up to 52 rows each" in text
    assert "calibration call" not in caplog.text
    quiet = Console(file=io.StringIO(), width=150)
    with CalibrationProgress(found, 4, quiet, show=False) as shown:
        shown.called()
    assert quiet.file.getvalue() == "" and "calibration call" not in caplog.text


def test_nan_is_named_when_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    model = block()
    quantizer = pq_fx.prepare(model, CONFIG)
    with torch.no_grad(), quantizer.calibrate(progress=False):
        model(calls(1)[0])
        assert "NaN" not in caplog.text
        model(torch.full((2, 13, 8), torch.nan))
        assert "call 2: NaN or infinity at" in caplog.text and "bf16" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0.44, "0.4 s"), (41.2, "41 s"), (200, "3 min 20 s"), (7502, "2 h 5 min")],
)
def test_durations_read_well(seconds: float, says: str) -> None:
    assert duration(seconds) == says
