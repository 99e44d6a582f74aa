"""Sampling with the demo models: seeds, batches, layout, and that the weights are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pq_fx import demo
from pq_fx.demo import model as demo_model
from pq_fx.errors import ConfigError

ARCHS = ["flux", "zimage"]


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return demo.load_model(request.param)


def test_patchify_is_a_bijection_in_the_stated_order():
    images = torch.randn(2, 3, 8, 12)
    tokens = demo_model.patchify(images)
    assert tokens.shape == (2, 6, 48)
    # Token 4 = row 1, column 1; channel (row 2, column 3, color 1).
    assert torch.equal(tokens[:, 4, (2 * 4 + 3) * 3 + 1], images[:, 1, 4 + 2, 4 + 3])
    assert torch.equal(demo_model.unpatchify(tokens, 8, 12), images)


def test_noise_depends_on_seed_and_number_only():
    assert torch.equal(demo.noise(3, seed=5)[2], demo.noise(1, seed=5, start=2)[0])
    assert not torch.equal(demo.noise(1, seed=5), demo.noise(1, seed=6))
    assert not torch.equal(demo.noise(1, 5, start=0), demo.noise(1, 5, start=1))


def test_sample_is_deterministic_for_a_seed(model: torch.nn.Module):
    text = demo.load_prompts("demo").take(3).embeddings
    calls: list[tuple[int, int]] = []
    first = demo.sample(model, text, 2, seed=1, progress=lambda d, n: calls.append((d, n)))
    assert first.shape == (3, 3, 64, 64)
    assert first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1
    assert calls == [(1, 2), (2, 2)]
    assert torch.equal(first, demo.sample(model, text, 2, seed=1))
    other = demo.sample(model, text, 2, seed=2)
    assert demo.psnr(first, other).max() < 40
    # Batches change rounding at most, never the noise.
    apart = demo.sample(model, text, 2, seed=1, batch_size=2)
    assert demo.psnr(first, apart).min() > 60


def test_velocity_is_what_sample_integrates(model: torch.nn.Module):
    text = demo.load_prompts("demo").take(2).embeddings
    x = demo.noise(2, seed=3)
    with torch.no_grad():
        v = demo.velocity(model, x, 1.0, text)
    assert v.shape == x.shape
    expected = ((x - v) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(demo.sample(model, text, 1, seed=3), expected)
    # Text matters, so does time.
    with torch.no_grad():
        assert not torch.allclose(v, demo.velocity(model, x, 1.0, text.flip(0)), atol=1e-2)
        assert not torch.allclose(v, demo.velocity(model, x, 0.5, text), atol=1e-2)


def test_models_are_trained(model: torch.nn.Module):
    """At small t most of the noise can be told: far below an untrained model's error of 1."""
    text = demo.load_prompts("demo").take(2).embeddings
    x0 = demo.sample(model, text, 8, seed=0) * 2 - 1
    noise = demo.noise(2, seed=9)
    with torch.no_grad():
        predicted = demo.velocity(model, 0.7 * x0 + 0.3 * noise, 0.3, text)
    wanted = noise - x0
    assert ((predicted - wanted).square().mean() / wanted.square().mean()) < 0.1


def test_forward_kwargs_refuses_other_models():
    with pytest.raises(ConfigError, match="Linear"):
        demo.forward_kwargs(torch.nn.Linear(2, 2), torch.zeros(1, 3, 8, 8), 0.5, torch.zeros(1))


def test_psnr_against_its_definition():
    a, b = torch.rand(3, 3, 5, 7), torch.rand(3, 3, 5, 7)
    for value, x, y in zip(demo.psnr(a, b), a, b, strict=True):
        mse = ((x.double() - y.double()) ** 2).mean().item()
        assert value.item() == pytest.approx(-10 * torch.tensor(mse).log10().item(), rel=1e-5)
    assert demo.psnr(a, a).isinf().all()
    with pytest.raises(ConfigError, match="shape"):
        demo.psnr(a, b[:1])


def test_plots_write_files_and_check_counts(tmp_path: Path):
    images = torch.rand(3, 3, 16, 16)
    labels = ["a", "a long prompt of many words that wraps", "c"]
    demo.grid(tmp_path / "g.png", [("float", images), ("int4\nRTN", images)], labels, title="t")
    demo.layer_errors(tmp_path / "l.png", ["x", "y"], [0.1, 0.2], [0.05, 0.2])
    assert all((tmp_path / n).stat().st_size > 5_000 for n in ("g.png", "l.png"))
    with pytest.raises(ConfigError, match="3 images"):
        demo.grid(tmp_path / "g.png", [("float", images[:2])], labels)
    with pytest.raises(ConfigError, match="names"):
        demo.layer_errors(tmp_path / "l.png", ["x"], [0.1, 0.2], [0.1, 0.2])
