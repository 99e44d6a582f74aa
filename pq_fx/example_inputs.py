"""Inputs for a diffusion transformer or a language model, made from its forward signature and its config.

Only for looking at a model (`pq_fx.inspect`): values are random, sizes are stated in tokens. What a parameter means
is read off its name, as diffusers and transformers use it; no class is listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx.errors import ConfigError

# Where configs state the width of the text encoder's states, in order of precedence.
_TEXT_WIDTHS = (
    "joint_attention_dim", "text_dim", "text_embed_dim", "cap_feat_dim", "caption_channels", "cross_attention_dim",
)  # fmt: skip


@dataclass(frozen=True)
class InputSizes:
    """Samples, image tokens (height x width x frames, after patching) and text tokens.

    64 x 64 tokens are a picture of 1024 x 1024 pixels for most models (8x autoencoder, patches of 2).
    """

    batch: int = 1
    height: int = 64
    width: int = 64
    frames: int = 1
    text: int = 256


def example_inputs(model: nn.Module, sizes: InputSizes | None = None) -> dict[str, Any]:
    """Keyword arguments for one call of `model`, on its device and in its dtype.

    Raises ConfigError naming the arguments that cannot be guessed.
    """
    made = _Maker(model, sizes or InputSizes())
    kwargs: dict[str, Any] = {}
    unknown: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        maker = _MAKERS.get(name)
        value = maker(made) if maker is not None and made.known else None
        if value is not None:
            kwargs[name] = value
        elif required and name in _WHERE_REQUIRED and made.known:
            kwargs[name] = _WHERE_REQUIRED[name](made)
        elif required:
            unknown.append(name)
    if unknown or not kwargs:
        wanted = ", ".join(unknown) or "any argument"
        raise ConfigError(
            f"cannot guess {wanted} of {type(model).__name__}.forward; give MODEL as module:function, a function that "
            "returns (model, arguments), or call pq_fx.inspect(model, *args, **kwargs)"
        )
    return kwargs


class _Maker:
    """Makes tensors for one model; `known` says that it has a config to read sizes from."""

    def __init__(self, model: nn.Module, sizes: InputSizes) -> None:
        self.config: Any = getattr(model, "config", None)
        self.known = self.config is not None
        self.names = set(inspect.signature(model.forward).parameters)
        self.sizes = sizes
        floats = [p for p in model.parameters() if p.is_floating_point()]
        self.dtype = floats[0].dtype if floats else torch.float32
        self.device = floats[0].device if floats else torch.device("cpu")

    def get(self, name: str) -> Any:
        """A field of the config, or None."""
        return getattr(self.config, name, None)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def full(self, *shape: int, value: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, value, dtype=dtype or self.dtype, device=self.device)

    @property
    def tokens(self) -> int:
        return self.sizes.height * self.sizes.width * self.sizes.frames

    @property
    def patch(self) -> tuple[int, int]:
        """(frames, pixels) of a patch."""
        size, frames = self.get("patch_size") or 1, self.get("patch_size_t") or 1
        if isinstance(size, (tuple, list)):
            return int(size[0]), int(size[-1])
        return int(frames), int(size)

    def image(self, batched: bool = True) -> Tensor:
        """Latents as the model takes them: tokens, an image or a video."""
        s, channels = self.sizes, self.get("in_channels")
        if {"txt_ids", "img_shapes", "num_frames"} & self.names:
            return self.randn(s.batch, self.tokens, channels)
        per_frame, patch = self.patch
        frames, height, width = s.frames * per_frame, s.height * patch, s.width * patch
        if self.get("sample_frames") is not None:  # frames before channels
            return self.randn(s.batch, frames, channels, height, width)
        video = isinstance(self.get("patch_size"), (tuple, list)) or self.get("patch_size_t")
        if video:
            return self.randn(s.batch, channels, frames, height, width)
        return self.randn(s.batch, channels, height, width)

    def text(self) -> Tensor | None:
        width = next((self.get(k) for k in _TEXT_WIDTHS if isinstance(self.get(k), int)), None)
        return None if width is None else self.randn(self.sizes.batch, self.sizes.text, width)

    def rope(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of a rotary embedding, [tokens, head_dim] each."""
        if not self.get("use_rotary_positional_embeddings"):
            return None
        shape = (self.tokens, self.get("attention_head_dim"))
        return self.full(*shape, value=1.0), self.full(*shape, value=0.0)

    def ids(self, count: int) -> Tensor | None:
        axes = self.get("axes_dims_rope")
        return None if axes is None else self.full(count, len(axes), value=0.0)

    def grid(self) -> Tensor | None:
        """Positions of the image's tokens: rows and columns in the axes 1 and 2."""
        if "txt_ids" not in self.names:  # then the model makes them itself
            return None
        ids = self.ids(self.tokens)
        if ids is not None and ids.shape[1] > 2:
            s = self.sizes
            row = torch.arange(s.height, device=self.device).repeat_interleave(s.width)
            column = torch.arange(s.width, device=self.device).repeat(s.height)
            ids[:, 1], ids[:, 2] = row.repeat(s.frames), column.repeat(s.frames)
        return ids

    def captions(self, index: int, leading: tuple[int, ...]) -> Tensor | None:
        """States of one of several text encoders."""
        widths = self.get("caption_channels")
        if not isinstance(widths, (tuple, list)):
            return None
        return self.randn(*leading, self.sizes.batch, self.sizes.text, int(widths[index]))

    def llama_layers(self) -> tuple[int, ...]:
        return (max(self.get("llama_layers") or [0]) + 1,)

    def vector(self, *names: str) -> Tensor | None:
        width = next((self.get(n) for n in names if self.get(n) is not None), None)
        return None if width is None else self.randn(self.sizes.batch, int(width))

    def token_ids(self) -> Tensor | None:
        if self.get("vocab_size") is None:
            return None
        return self.full(self.sizes.batch, self.sizes.text, value=1, dtype=torch.long)

    def listed(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.clone() for _ in range(self.sizes.batch)]


_MAKERS: dict[str, Callable[[_Maker], Any]] = {
    "hidden_states": lambda m: m.image() if m.get("in_channels") is not None else None,
    "encoder_hidden_states": _Maker.text,
    "pooled_projections": lambda m: m.vector("pooled_projection_dim"),
    "pooled_embeds": lambda m: m.vector("text_emb_dim"),
    "timestep": lambda m: m.full(m.sizes.batch, value=0.5, dtype=torch.float32),
    "timesteps": lambda m: m.full(m.sizes.batch, value=0.5, dtype=torch.float32),
    "guidance": lambda m: m.full(m.sizes.batch, value=3.5) if m.get("guidance_embeds") else None,
    "img_ids": _Maker.grid,
    "txt_ids": lambda m: m.ids(m.sizes.text),
    "img_shapes": lambda m: [[(m.sizes.frames, m.sizes.height, m.sizes.width)]] * m.sizes.batch,
    "num_frames": lambda m: m.sizes.frames,
    "height": lambda m: m.sizes.height,
    "width": lambda m: m.sizes.width,
    "class_labels": lambda m: m.full(m.sizes.batch, value=1, dtype=torch.long),
    "added_cond_kwargs": lambda m: {"resolution": None, "aspect_ratio": None},
    "image_rotary_emb": _Maker.rope,
    "encoder_hidden_states_t5": lambda m: m.captions(0, ()),
    "encoder_hidden_states_llama3": lambda m: m.captions(1, m.llama_layers()),
    "x": lambda m: (
        m.listed(m.randn(m.get("in_channels"), m.sizes.frames, m.sizes.height * 2, m.sizes.width * 2))
        if m.get("all_patch_size") is not None
        else None
    ),
    "t": lambda m: m.full(m.sizes.batch, value=0.5, dtype=torch.float32),
    "cap_feats": lambda m: m.listed(m.randn(m.sizes.text, m.get("cap_feat_dim"))),
    "input_ids": _Maker.token_ids,
}  # fmt: skip
_WHERE_REQUIRED: dict[str, Callable[[_Maker], Any]] = {
    "encoder_attention_mask": lambda m: m.full(
        m.sizes.batch, m.sizes.text, value=1, dtype=torch.bool
    ),
}
