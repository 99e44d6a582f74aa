"""`pq-fx quantize` and `compare` on a CUDA device: the saved folder draws what the same steps in memory draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.importorskip("diffusers")
import pipelines  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402

import pq_fx  # noqa: E402
from pq_fx import cli  # noqa: E402

SETTINGS = {"group_size": 16, "weight_only_format": "int4:16:bf16", "calibration_rows": 64}
WHERE = ["--device", "cuda", "--steps", "2", "--height", str(pipelines.SIDE), "--width"]
WHERE += [str(pipelines.SIDE), "--call", "max_sequence_length=16"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "flux"
    pipelines.make("flux").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(pipelines.PROMPTS) + "\n")
    return file


def quantize(source: Path, out: Path, *more: object) -> None:
    torch._dynamo.reset()  # each command is a process of its own
    settings = ["--settings", json.dumps(SETTINGS)]
    assert (
        cli.main(["quantize", str(source), "--out", str(out), *settings, *WHERE, *map(str, more)])
        == 0
    )


def load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(folder: Path) -> bytes:
    return (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_folder_to_folder_to_picture(source: Path, prompts: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "--prompts", prompts, "--seed", 5)
    pipe = load(source)
    quantizer = pq_fx.prepare(pipe.transformer, pq_fx.QuantConfig(**SETTINGS))
    with quantizer.calibrate():
        for number, prompt in enumerate(pipelines.PROMPTS):
            pipelines.call(pipe, prompt, seed=5 + number)
    quantizer.convert()
    want = pipelines.draw(pipe)
    assert abs(pipelines.draw(load(tmp_path / "out")) - want).max() == 0
    assert abs(pipelines.draw(load(source)) - want).max() > 1e-3


def test_offload_and_a_second_run_give_the_same_bytes(
    source: Path, prompts: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "a", "--prompts", prompts)
    quantize(source, tmp_path / "b", "--prompts", prompts)
    quantize(source, tmp_path / "c", "--prompts", prompts, "--offload")
    quantize(source, tmp_path / "d", "--prompts", prompts, "--seed", 1)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    assert weights(tmp_path / "a") != weights(tmp_path / "d")


def test_compare(source: Path, prompts: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", "--prompts", prompts)
    pictures = tmp_path / "pictures"
    command = ["compare", str(source), str(tmp_path / "out"), "--out", str(pictures)]
    assert cli.main([*command, "--prompts", str(prompts), *WHERE]) == 0
    found = json.loads((pictures / "compare.json").read_text())
    assert "cuda" in json.dumps(found)
    same = ["compare", str(source), str(source), "--out", str(tmp_path / "same"), "--json"]
    assert cli.main([*same, "--prompts", str(prompts), *WHERE]) == 0
