"""The two embedded models: configuration, loading, and one call signature for both.

``flux`` is diffusers' ``FluxTransformer2DModel`` (double and single stream, LayerNorm, GELU) and
``zimage`` is diffusers' ``ZImageTransformer2DModel`` (single stream, RMSNorm, SwiGLU). Both were
trained by ``bench/train_demo.py`` to draw 64x64 RGB emoji from text with flow matching: with
``x_t = (1 - t) * x0 + t * noise``, pictures ``x0`` in -1..1 and t in 0..1, they predict the
velocity ``noise - x0``. Text is 16 tokens of 384 channels (all-MiniLM-L6-v2; zeros after the
last token and for "no text").

The pictures that they learned from are OpenMoji's, CC BY-SA 4.0: see ATTRIBUTION.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pq_fx.errors import CheckpointError, ConfigError

IMAGE_SIZE = 64
PATCH = 4
TEXT_TOKENS = 16
TEXT_CHANNELS = 384

CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {
        "patch_size": 1,
        "in_channels": 3 * PATCH * PATCH,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 8,
        "joint_attention_dim": TEXT_CHANNELS,
        "pooled_projection_dim": TEXT_CHANNELS,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 12, 12),
    },
    # 384 wide because the class takes int(dim / 3 * 8) hidden channels: 1024, which groups divide.
    "zimage": {
        "all_patch_size": (PATCH,),
        "all_f_patch_size": (1,),
        "in_channels": 3,
        "dim": 384,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 6,
        "n_kv_heads": 6,
        "cap_feat_dim": TEXT_CHANNELS,
        "axes_dims": [16, 24, 24],
        "axes_lens": [64, 32, 32],
    },
}


def create_model(arch: str) -> nn.Module:
    """The untrained model of ``arch`` ("flux" or "zimage"), fp32, in training mode."""
    if arch not in CONFIGS:
        raise ConfigError(f"unknown demo model {arch!r}; use one of {sorted(CONFIGS)}")
    if arch == "flux":
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(**CONFIGS[arch])
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(**CONFIGS[arch])
    # The class builds this table at its first call, in a way that a graph cannot hold; do it now.
    rope = model.rope_embedder
    rope.freqs_cis = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    return model


def asset_path(name: str) -> Path:
    """Where the asset file ``name`` lies: in the package, or in a checkout's bench/assets."""
    package = Path(__file__).resolve().parent
    for folder in (package, package.parents[1] / "bench" / "assets"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"the demo asset {name!r} is neither in {package} nor in a checkout's bench/assets. The "
        "wheel carries the 'flux' model only; for 'zimage' work in a git checkout, or train it: "
        "python bench/train_demo.py --arch zimage --out bench/assets"
    )


def training_record(arch: str = "flux") -> dict[str, Any]:
    """How the embedded model was trained: config, versions, device, loss curve."""
    record: dict[str, Any] = json.loads(asset_path(f"{arch}.json").read_text(encoding="utf-8"))
    return record


def load_model(arch: str = "flux", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The trained model of ``arch`` in ``dtype`` on the CPU, in eval mode; needs no network.

    Raises:
        ConfigError: ``arch`` is not "flux" or "zimage".
        CheckpointError: the weights are missing or do not fit the architecture.
    """
    from safetensors.torch import load_file

    model = create_model(arch)
    path = asset_path(f"{arch}.safetensors")
    try:
        model.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the {arch} model: {error}") from error
    model.eval().requires_grad_(False)
    # Not ModelMixin.to, which warns about modules that its from_pretrained would keep in fp32.
    return nn.Module.to(model, dtype)


def arch_of(model: nn.Module) -> str:
    """ "flux" or "zimage", also behind ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    for arch, prefix in (("flux", "Flux"), ("zimage", "ZImage")):
        if type(inner).__name__.startswith(prefix):
            return arch
    raise ConfigError(
        f"{type(inner).__name__} is not one of the demo's models; expected a "
        "FluxTransformer2DModel or a ZImageTransformer2DModel"
    )


def patchify(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> tokens [B, H/4 * W/4, 48], channels in (row, column, color) order."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // PATCH) * (w // PATCH), PATCH * PATCH * c)


def unpatchify(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of :func:`patchify` for a picture of ``height`` x ``width`` pixels."""
    b, _, channels = tokens.shape
    c = channels // (PATCH * PATCH)
    x = tokens.reshape(b, height // PATCH, width // PATCH, PATCH, PATCH, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


def pool(embeddings: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are not padding: [B, 16, 384] -> [B, 384], zeros for no text."""
    used = (embeddings != 0).any(-1, keepdim=True).to(embeddings.dtype)
    return (embeddings * used).sum(1) / used.sum(1).clamp(min=1)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """FLUX's position of each patch: [H/4 * W/4, 3] fp32 of (0, row, column)."""
    rows = torch.arange(height // PATCH, device=device, dtype=torch.float32)
    columns = torch.arange(width // PATCH, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    return torch.nn.functional.pad(grid, (1, 0))


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that activations should have: that of the first floating parameter or buffer.

    A quantized model keeps biases and norms in the float dtype, so this holds for it too.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return tensor.dtype
    return torch.float32


def forward_kwargs(
    model: nn.Module, x_t: torch.Tensor, t: torch.Tensor | float, embeddings: torch.Tensor
) -> dict[str, Any]:
    """The keyword arguments of one plain ``model(**kwargs)`` call.

    Args:
        model: a demo model, float or quantized, compiled or not.
        x_t: noisy pictures [B, 3, H, W], H and W multiples of 4 (trained at 64).
        t: time in 0..1, a number or [B].
        embeddings: text [B, 16, 384].
    """
    dtype, device, batch = model_dtype(model), x_t.device, x_t.shape[0]
    time = torch.as_tensor(t, dtype=torch.float32, device=device).expand(batch).contiguous()
    text = embeddings.to(device=device, dtype=dtype)
    if arch_of(model) == "flux":
        return {
            "hidden_states": patchify(x_t).to(dtype),
            "encoder_hidden_states": text,
            "pooled_projections": pool(embeddings.to(device).float()).to(dtype),
            "timestep": time.to(dtype),
            "img_ids": image_ids(x_t.shape[-2], x_t.shape[-1], device),
            "txt_ids": torch.zeros(embeddings.shape[1], 3, device=device),
            "return_dict": False,
        }
    return {
        "x": list(x_t.to(dtype).unsqueeze(2).unbind(0)),  # pictures of one frame
        "t": time,
        "cap_feats": list(text.unbind(0)),
        "patch_size": PATCH,
        "f_patch_size": 1,
        "return_dict": False,
    }


def velocity(
    model: nn.Module, x_t: torch.Tensor, t: torch.Tensor | float, embeddings: torch.Tensor
) -> torch.Tensor:
    """The model's raw prediction of ``noise - x0`` at ``(x_t, t)``: [B, 3, H, W] fp32.

    Arguments as in :func:`forward_kwargs`. No guidance, no clamping: the quantity whose relative
    error is reported as ``velocity_rel_mse``.
    """
    output = model(**forward_kwargs(model, x_t, t, embeddings))[0]
    if isinstance(output, (list, tuple)):
        return torch.stack(list(output)).squeeze(2).float()
    return unpatchify(output, x_t.shape[-2], x_t.shape[-1]).float()
