"""`pq-fx compare`: pictures of two pipeline folders from equal noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from PIL import Image

from pq_fx import cli
from pq_fx.picture_distance import psnr, structural_distance

SIDE = str(pipelines.SIDE)
SIZE = ["--steps", "2", "--height", SIDE, "--width", SIDE, "--call", "max_sequence_length=16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float FLUX pipeline and the same quantized; tests must not change them."""
    folder = tmp_path_factory.mktemp("pipes")
    pipelines.make("flux").save_pretrained(folder / "float")
    pipelines.quantized("flux").save_pretrained(folder / "w4a4")
    return folder / "float", folder / "w4a4"


def compare(a: Path, b: Path, out: Path, *more: str) -> int:
    return cli.main(["compare", str(a), str(b), "--out", str(out), *SIZE, *more])


def test_pictures_and_distances(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(pipelines.PROMPTS))
    out = tmp_path / "out"
    assert compare(*folders, out, "--prompts", str(prompts), "--seed", "4", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "compare.json").read_text())
    assert printed["a"], printed["b"] == ("float", "w4a4")
    assert printed["settings"]["steps"] == 2
    drawn = [
        [pipelines.call(pipe, prompt, seed=4 + i)[0] for i, prompt in enumerate(pipelines.PROMPTS)]
        for pipe in (pipelines.make("flux"), pipelines.quantized("flux"))
    ]
    for i, pair in enumerate(printed["pairs"]):
        a, b = (torch.from_numpy(x[i]).permute(2, 0, 1)[None] for x in drawn)
        assert pair["seed"] == 4 + i
        assert pair["prompt"] == pipelines.PROMPTS[i]
        assert pair["psnr_db"] == pytest.approx(float(psnr(a, b)), abs=0.05)
        assert pair["structural_distance"] == pytest.approx(
            float(structural_distance(a, b)), rel=0.05
        )
        for name, want in (("a", drawn[0][i]), ("b", drawn[1][i])):
            stored = np.asarray(Image.open(out / pair[name])) / 255
            assert np.abs(stored - want).max() < 0.01
    both = Image.open(out / "side_by_side.png")
    assert both.size == (2 * pipelines.SIDE, 2 * pipelines.SIDE)
    mean = sum(pair["psnr_db"] for pair in printed["pairs"]) / 2
    assert printed["mean_psnr_db"] == pytest.approx(mean)

    page = tmp_path / "report.html"
    assert cli.main(["report", str(folders[1]), "--out", str(page), "--images", str(out)]) == 0
    assert page.read_text().count("<img") == 4


def test_a_pipeline_against_itself(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare(folders[1], folders[1], out, "--prompt", "a red cat") == 0
    table = capsys.readouterr().out
    assert "inf" in table
    assert "a red cat" in table
    assert json.loads((out / "compare.json").read_text())["pairs"][0]["psnr_db"] == "inf"
    assert compare(*folders, out, "--prompt", "a red cat") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert compare(*folders, out, "--prompt", "a red cat", "--overwrite") == 0
    assert json.loads((out / "compare.json").read_text())["pairs"][0]["psnr_db"] != "inf"


def test_wrong_input_is_one_paragraph(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for one, two, more, says in (
        (a, tmp_path, (), "has no model_index.json"),
        (tmp_path / "nowhere", b, (), "is not a folder"),
        (a, b, ("--prompts", "nowhere"), "cannot be read"),
        (a, b, ("--num-prompts", "9"), "there are 4 prompts"),
        (a, b, ("--out", str(a)), "overlap"),
        (a, b, ("--out", str(tmp_path / "other"), "--overwrite"), "would delete something else"),
        (a, b, ("--call", "strength=1"), "does not take strength"),
    ):
        assert compare(one, two, tmp_path / "out", *more) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert says in err
        assert "Traceback" not in err
    assert [f.name for f in tmp_path.iterdir()] == ["other"]
