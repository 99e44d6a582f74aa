"""Drawing pictures with the demo models: Euler steps of flow matching.

Noise depends on the seed and the picture's number only, not on batch size, device or model, so
two models that draw with one seed differ by their weights alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pq_fx.demo.model import IMAGE_SIZE, velocity
from pq_fx.demo.prompts import embed
from pq_fx.errors import ConfigError

DEFAULT_STEPS = 16
DEFAULT_GUIDANCE = 1.0


def noise(count: int, seed: int, start: int = 0, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Standard normal noise fp32 [count, 3, size, size] of pictures start, start + 1, ..."""
    pictures = []
    for index in range(start, start + count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        pictures.append(torch.randn(3, size, size, generator=generator))
    return torch.stack(pictures)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[str] | torch.Tensor,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    *,
    guidance: float = DEFAULT_GUIDANCE,
    batch_size: int = 16,
    size: int = IMAGE_SIZE,
    start: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Draw one picture a prompt: fp32 [n, 3, size, size] in 0..1, on the CPU.

    Args:
        model: a demo model, float or quantized, compiled or not, on any device.
        prompts: texts, or embeddings [n, 16, 384] (:func:`pq_fx.demo.load_prompts`).
        steps: Euler steps from t = 1 (noise) to t = 0, evenly spaced.
        seed: of the noise.
        guidance: classifier-free guidance scale; 1 is none and halves the work.
        batch_size: pictures in one call of the model; it does not change the noise.
        size: pixels of a side, a multiple of 4; the models were trained at 64.
        start: number of the first picture, to draw one series in parts.
        progress: called as ``progress(done, total)`` after each step, in model steps.
    """
    if steps < 1 or batch_size < 1:
        raise ConfigError(f"steps and batch_size must be at least 1, got {steps}, {batch_size}")
    text = prompts if isinstance(prompts, torch.Tensor) else embed(prompts)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), text.device)
    times = torch.linspace(1, 0, steps + 1).tolist()
    batches = range(0, len(text), batch_size)
    done, pictures = 0, []
    for first in batches:
        part = text[first : first + batch_size].to(device)
        x = noise(len(part), seed, start + first, size).to(device)
        for now, then in itertools.pairwise(times):
            x = x + (then - now) * _guided(model, x, now, part, guidance)
            done += 1
            if progress is not None:
                progress(done, steps * len(batches))
        pictures.append(x.float().cpu())
    return (torch.cat(pictures) * 0.5 + 0.5).clamp(0, 1)


def _guided(
    model: nn.Module, x: torch.Tensor, t: float, text: torch.Tensor, guidance: float
) -> torch.Tensor:
    if guidance == 1:
        return velocity(model, x, t, text)
    both = velocity(model, torch.cat([x, x]), t, torch.cat([text, torch.zeros_like(text)]))
    with_text, without = both.chunk(2)
    return without + guidance * (with_text - without)
