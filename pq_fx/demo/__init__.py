"""The embedded demo: small trained diffusion transformers that draw emoji from text.

Weights, prompts and text embeddings lie in the package, so everything here works offline.
Training pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0; see ATTRIBUTION.md.

    from pq_fx import demo
    model = demo.load_model()
    images = demo.sample(model, demo.load_prompts("demo").take(16).embeddings, steps=16, seed=0)
"""

from __future__ import annotations

from pq_fx.demo.model import (
    arch_of,
    create_model,
    forward_kwargs,
    load_model,
    training_record,
    velocity,
)
from pq_fx.demo.plots import grid, layer_errors
from pq_fx.demo.prompts import MissingTextEncoderError, Prompts, embed, encode, load_prompts
from pq_fx.demo.sampling import noise, sample
from pq_fx.picture_distance import psnr

__all__ = [
    "MissingTextEncoderError",
    "Prompts",
    "arch_of",
    "create_model",
    "embed",
    "encode",
    "forward_kwargs",
    "grid",
    "layer_errors",
    "load_model",
    "load_prompts",
    "noise",
    "psnr",
    "sample",
    "training_record",
    "velocity",
]
