"""`pq-fx quantize`: float folder -> command -> folder -> `DiffusionPipeline.from_pretrained` -> picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import pq_fx
from pq_fx import cli
from pq_fx.integrations.pipelines import Sampling, read_prompts
from pq_fx.modules import quantized_linears
from pq_fx.report import Report
from pq_fx.statistics_file import load_statistics

SETTINGS = {"group_size": 16, "weight_only_format": "int4:16:bf16", "calibration_rows": 64}
SIZE = ["--steps", "2", "--height", str(pipelines.SIDE), "--width", str(pipelines.SIDE)]
SHORT = ["--call", "max_sequence_length=16"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float FLUX pipeline's folder; tests must not change it."""
    return save_float("flux", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join([*pipelines.PROMPTS, "", "photo of the sky"]) + "\n")
    return file


def save_float(family: str, folder: Path) -> Path:
    pipelines.make(family).save_pretrained(folder / family)
    return folder / family


def quantize(source: Path, out: Path, *more: object, size: list[str] | None = None) -> int:
    arguments = [
        str(source),
        "--out",
        str(out),
        "--settings",
        json.dumps(SETTINGS),
        *map(str, more),
    ]
    torch._dynamo.reset()  # each command is a process of its own
    return cli.main(["quantize", *arguments, *(SIZE + SHORT if size is None else size)])


def weights(folder: Path) -> bytes:
    return (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("family", sorted(pipelines.FAMILIES))
def test_float_folder_to_quantized_folder_to_picture(
    family: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save_float(family, tmp_path), tmp_path / "out"
    more = ["--call", "complex_human_instruction=null"] if family == "sana" else []
    assert quantize(source, out, "--prompts", prompts, "--num-prompts", 2, "--seed", 5, *more) == 0
    printed = capsys.readouterr().out
    assert "Quantized linears" in printed
    assert "Left in float" in printed
    rows = {line.split()[0] for line in printed.splitlines() if line.strip()}  # no terminal: whole
    report = json.loads((out / "transformer" / "quantization_report.json").read_text())
    assert rows >= {layer["fqn"] for layer in report["layers"]}

    pipe = DiffusionPipeline.from_pretrained(source)  # the same in memory, by pq_fx's own functions
    pipe.set_progress_bar_config(disable=True)
    quantizer = pq_fx.prepare(pipe.transformer, pq_fx.QuantConfig(**SETTINGS))
    with quantizer.calibrate():
        for number, prompt in enumerate(pipelines.PROMPTS):
            pipelines.call(pipe, prompt, seed=5 + number)
    quantizer.convert()
    want = pipelines.draw(pipelines.aligned(pipe))
    loaded = pipelines.aligned(DiffusionPipeline.from_pretrained(out))
    assert (
        len(quantized_linears(loaded.transformer)) == len(quantized_linears(pipe.transformer)) > 9
    )
    assert np.array_equal(pipelines.draw(loaded), want)
    assert np.abs(pipelines.draw(pipelines.make(family)) - want).max() > 1e-3
    assert Report.of_model(loaded.transformer).calibration_calls == 4
    assert {f.name for f in tmp_path.iterdir()} == {family, "out"}  # nothing half-written beside it


@pytest.mark.parametrize("method", ["rtn", "convrot"])
def test_methods_that_fit_nothing_to_data_need_no_prompts(
    method: str, flux: Path, tmp_path: Path
) -> None:
    assert quantize(flux, tmp_path / "out", "--method", method, "--preset", "w4a4-int4") == 0
    report = json.loads((tmp_path / "out" / "transformer" / "quantization_report.json").read_text())
    assert report["config"]["method"] == method
    assert report["calibration_calls"] == 2 * 4
    rotated = {layer["rotation"] for layer in report["layers"]}
    assert (rotated == {0}) == (method == "rtn")
    assert {layer["absorb"] for layer in report["layers"]} <= {None, "none"}  # nothing is sorted


def test_an_interrupted_run_goes_on_to_the_same_bits(
    flux: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the second of three pictures, before its last step."""
    whole = tmp_path / "whole.stats"
    assert quantize(flux, tmp_path / "a", "--prompts", prompts, "--statistics", whole) == 0
    assert load_statistics(whole).calls == 6

    steps = 0
    step = FlowMatchEulerDiscreteScheduler.step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    part = tmp_path / "part.stats"
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", interrupted)
    assert quantize(flux, tmp_path / "b", "--prompts", prompts) == 130
    assert "is lost; with --statistics FILE" in capsys.readouterr().err
    steps = 0
    command = ("--prompts", prompts, "--statistics", part)
    assert quantize(flux, tmp_path / "b", *command) == 130
    assert "the same command goes on from it" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert load_statistics(part).calls == 4
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step)
    for changed in (["--seed", "1"], ["--prompts", str(other(tmp_path))]):
        assert quantize(flux, tmp_path / "b", *command, *changed) == 2
        assert "leave --prompts out" in " ".join(capsys.readouterr().err.split())
    assert quantize(flux, tmp_path / "b", *command) == 0
    assert load_statistics(part).calls == 6
    assert part.read_bytes() == whole.read_bytes()
    assert weights(tmp_path / "b") == weights(tmp_path / "a")

    # The file serves other settings without drawing again.
    monkeypatch.setattr(Sampling, "run", None)
    assert quantize(flux, tmp_path / "c", "--statistics", whole, "--method", "rtn") == 0
    assert weights(tmp_path / "c") != weights(tmp_path / "a")


def other(folder: Path) -> Path:
    file = folder / "other.txt"
    file.write_text("a red cat\nthe sea\n")
    return file


def test_an_older_folder_is_replaced_only_when_asked(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(flux, out, "--method", "rtn") == 0
    before = weights(out)
    assert quantize(flux, out, "--method", "convrot") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert weights(out) == before
    assert quantize(flux, out, "--method", "convrot", "--overwrite") == 0
    assert weights(out) != before
    capsys.readouterr()
    assert quantize(out, tmp_path / "twice", "--method", "rtn") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is quantized already (permuquant)" in said and "loading" not in said


def test_offload_changes_nothing(flux: Path, prompts: Path, tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", ["--offload"])):
        assert quantize(flux, tmp_path / name, "--prompts", prompts, "--num-prompts", 1, *more) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_failure_while_saving_leaves_nothing(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(
        "diffusers.schedulers.FlowMatchEulerDiscreteScheduler.save_pretrained", full
    )
    monkeypatch.setattr("diffusers.AutoencoderKL.save_pretrained", full)
    assert quantize(flux, tmp_path / "out", "--method", "rtn", "--num-prompts", 1) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompts", "EMPTY"], "holds no prompt"),
        (["--method", "rtn", "--num-prompts", "99"], "there are 4 prompts"),
        ([], "give --prompts FILE"),
        (["--preset", "w5a5", "--method", "rtn"], "neither a preset"),
        (["--method", "magic"], "unknown method"),
        (["--settings", "{"], "--settings is not JSON"),
        (["--component", "unet"], "no component 'unet'; it has"),
        (["--method", "rtn", "--call", "x"], "NAME=VALUE"),
        (["--method", "rtn", "--call", "strength=1"], "does not take strength"),
        (["--method", "rtn", "--call", "output_type=np"], "cannot set output_type"),
        (["--method", "rtn", "--device", "warp"], "--device 'warp' cannot be used"),
        (
            ["--method", "rtn", "--call", "max_sequence_length=999"],
            "FluxPipeline failed on the prompt",
        ),
        (["--method", "rtn", "--statistics", "EMPTY"], "EMPTY"),
        (["--method", "rtn", "--out", "SOURCE/inside"], "overlap"),
        (["--method", "rtn", "--out", "EMPTY"], "is a file"),
    ],
)
def test_wrong_input_is_one_paragraph_and_writes_nothing(
    more: list[str],
    says: str,
    flux: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n")
    more = [m.replace("SOURCE", str(flux)) for m in more]
    code = quantize(flux, tmp_path / "out", *more, size=["--steps", "1"])
    err = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert {f.name for f in tmp_path.iterdir()} == {"EMPTY"}
    assert "inside" not in {f.name for f in flux.iterdir()}


def test_what_is_no_pipeline_is_named(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, says in (
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path, "has no model_index.json; expected a diffusers pipeline"),
        (flux / "transformer", "It holds a single model; give the pipeline's folder"),
    ):
        assert quantize(source, tmp_path / "out", "--method", "rtn") == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("  one \n\n zwei Möwen\n", encoding="utf-8")
    assert read_prompts(file) == ["one", "zwei Möwen"]


def test_noise_is_the_seed_plus_the_number() -> None:
    pipe = pipelines.make("flux")
    sampling = Sampling(2, pipelines.SIDE, pipelines.SIDE, 7, {"max_sequence_length": 16})
    got = sampling.draw(pipe, pipelines.PROMPTS[0], 3)
    want = pipelines.call(pipe, seed=10)
    assert torch.equal(got, torch.from_numpy(want).permute(0, 3, 1, 2))
