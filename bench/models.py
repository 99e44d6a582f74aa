"""The model classes that tests and benches go through: a tiny random configuration and the published one of each.

    model, kwargs = MODELS["flux"].tiny()          CPU, random weights, runs in a moment
    model, kwargs = MODELS["flux"].published()     meta device, full depth and width, bf16, shapes only

Published configs are written as what differs from the class's defaults. `layers` of `published` shortens the model
(real width, few blocks), for tests. Sizes are those of a 1024 x 1024 picture or one frame of that many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as D
import torch
import transformers as T
from model_parts import (
    MLP,
    Inputs,
    full_captions,
    image_text,
    long,
    randn,
    real,
    static_hidream,
)
from torch import nn

from pq_fx.example_inputs import InputSizes, example_inputs


@dataclass(frozen=True)
class Model:
    """One class. `depth` names the config fields that count its blocks; `static` replaces what cannot run on meta."""

    cls: type[nn.Module]
    tiny_config: dict[str, Any]
    tiny_inputs: Callable[[], Inputs]
    config: dict[str, Any] = field(default_factory=dict)
    sizes: InputSizes = field(default_factory=InputSizes)
    depth: tuple[str, ...] = ("num_layers",)
    static: Callable[[nn.Module], None] | None = None

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A model with this configuration on the default device, in eval mode."""
        config_class = getattr(self.cls, "config_class", None)
        model = self.cls(config_class(**config)) if config_class else self.cls(**config)
        return model.eval()

    def tiny(self, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The tiny model in fp32 and the arguments of one call; zero-initialized gates get random values."""
        torch.manual_seed(seed)
        model = self.build(self.tiny_config)
        for p in model.parameters():
            if not p.any():
                p.data.normal_(0, 0.1)
        return model, self.tiny_inputs()

    def published(self, layers: int | None = None) -> tuple[nn.Module, Inputs]:
        """The published model on the meta device in bf16; `layers` limits each kind of block."""
        config = dict(self.config)
        with torch.device("meta"):
            if layers is not None:
                whole = self.build(config).config
                config |= {k: min(layers, getattr(whole, k)) for k in self.depth}
                if "llama_layers" in config:  # one text state a block
                    config["llama_layers"] = config["llama_layers"][: len(self.depth) * layers]
            model = self.build(config)
        nn.Module.to(model, torch.bfloat16)  # diffusers' own `to` warns about modules kept in fp32
        if self.static is not None:
            self.static(model)
        return model, example_inputs(model, self.sizes)


PATCH_CLASS = dict(
    num_layers=2, attention_head_dim=8, num_attention_heads=4, in_channels=4, out_channels=8, attention_bias=True,
    activation_fn="gelu-approximate", norm_elementwise_affine=False, sample_size=8, patch_size=2,
)  # fmt: skip
BOTH = ("num_layers", "num_single_layers")
TEXT_512 = InputSizes(text=512)

MODELS: dict[str, Model] = {
    "mlp": Model(MLP, {}, lambda: dict(x=randn(5, 8))),
    "flux": Model(
        D.FluxTransformer2DModel,
        dict(
            in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=20, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ),
        lambda: dict(
            hidden_states=randn(2, 15, 12), encoder_hidden_states=randn(2, 7, 20), pooled_projections=randn(2, 24),
            timestep=real(0.3, 0.5), guidance=real(1, 2), img_ids=torch.randint(0, 5, (15, 3)).float(),
            txt_ids=torch.zeros(7, 3),
        ),
        dict(guidance_embeds=True), TEXT_512, BOTH,
    ),
    "flux2": Model(
        D.Flux2Transformer2DModel,
        dict(
            patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda: dict(
            hidden_states=randn(2, 16, 8), encoder_hidden_states=randn(2, 6, 16), timestep=real(0.3, 0.5),
            guidance=real(1, 2), img_ids=torch.randint(0, 4, (16, 4)).float(), txt_ids=torch.zeros(6, 4),
        ),
        {}, TEXT_512, BOTH,
    ),
    "sana": Model(
        D.SanaTransformer2DModel,
        dict(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
            sample_size=8,
        ),
        lambda: image_text(4, 8, (5, 12), real(3, 5)) | dict(hidden_states=randn(2, 4, 6, 8)),
        dict(qk_norm="rms_norm_across_heads"), InputSizes(height=32, width=32, text=300),
    ),
    "zimage": Model(
        D.ZImageTransformer2DModel,
        dict(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
        ),
        lambda: dict(
            x=[randn(4, 1, 8, 12), randn(4, 1, 8, 12)], t=real(0.3, 0.5), cap_feats=[randn(7, 16), randn(7, 16)]
        ),
        {}, InputSizes(text=128), ("n_layers", "n_refiner_layers"),
    ),
    "sd3": Model(
        D.SD3Transformer2DModel,
        dict(
            sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=16, pooled_projection_dim=24, out_channels=4,
            pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        lambda: image_text(4, 8, (5, 16), real(3, 5)) | dict(pooled_projections=randn(2, 24)),
        dict(  # SD3.5-medium
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        ),
        InputSizes(text=333),
    ),
    "pixart": Model(
        D.PixArtTransformer2DModel,
        PATCH_CLASS | dict(
            caption_channels=16, cross_attention_dim=32, num_embeds_ada_norm=8, norm_type="ada_norm_single",
            norm_eps=1e-6, use_additional_conditions=False,
        ),
        lambda: image_text(4, 8, (5, 16), long(3, 5))
        | dict(added_cond_kwargs={"aspect_ratio": None, "resolution": None}),
        dict(caption_channels=4096, use_additional_conditions=False), InputSizes(text=300),
    ),
    "qwen": Model(
        D.QwenImageTransformer2DModel,
        dict(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        lambda: dict(
            hidden_states=randn(2, 16, 16), encoder_hidden_states=randn(2, 7, 16), timestep=real(0.3, 0.5),
            encoder_hidden_states_mask=torch.ones(2, 7, dtype=torch.long), img_shapes=[[(1, 4, 4)]] * 2,
        ),
    ),
    "wan": Model(
        D.WanTransformer3DModel,
        dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        lambda: image_text(4, 8, (7, 16), long(3, 5)) | dict(hidden_states=randn(2, 4, 2, 8, 8)),
        {}, TEXT_512,  # Wan 2.1, 14B
    ),
    "hunyuan": Model(
        D.HunyuanVideoTransformer3DModel,
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        ),
        lambda: image_text(4, 8, (6, 16), long(3, 5)) | dict(
            hidden_states=randn(2, 4, 1, 8, 8), pooled_projections=randn(2, 8), guidance=real(1, 2),
            encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool),
        ),
        {}, InputSizes(), BOTH,
    ),
    "ltx": Model(
        D.LTXVideoTransformer3DModel,
        dict(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=2, caption_channels=16, qk_norm="rms_norm_across_heads",
        ),
        lambda: dict(
            hidden_states=randn(2, 2 * 4 * 4, 8), encoder_hidden_states=randn(2, 6, 16), timestep=long(3, 5),
            encoder_attention_mask=torch.ones(2, 6).bool(), num_frames=2, height=4, width=4,
        ),
        {}, InputSizes(text=128),
    ),
    "cogvideo": Model(
        D.CogVideoXTransformer3DModel,
        dict(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=8,
        ),
        lambda: image_text(4, 8, (8, 16), long(3, 5)) | dict(hidden_states=randn(2, 1, 4, 8, 8)),
        dict(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True),
        InputSizes(text=226),
    ),
    "dit": Model(
        D.DiTTransformer2DModel,
        PATCH_CLASS | dict(num_embeds_ada_norm=16, norm_type="ada_norm_zero"),
        lambda: dict(hidden_states=randn(2, 4, 8, 8), timestep=long(3, 5), class_labels=long(1, 2)),
        dict(out_channels=8, sample_size=64), InputSizes(height=32, width=32),  # DiT-XL/2 at 512 pixels
    ),
    "aura": Model(
        D.AuraFlowTransformer2DModel,
        dict(
            sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=16,
            out_channels=4, pos_embed_max_size=64,
        ),
        lambda: image_text(4, 16, (5, 16), real(0.3, 0.5)),
        dict(pos_embed_max_size=9216), InputSizes(), ("num_mmdit_layers", "num_single_dit_layers"),
    ),
    "chroma": Model(
        D.ChromaTransformer2DModel,
        dict(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
            approximator_hidden_dim=32, approximator_layers=1,
        ),
        lambda: dict(
            hidden_states=randn(2, 16, 4), encoder_hidden_states=randn(2, 6, 16), timestep=real(0.3, 0.5),
            img_ids=randn(16, 3), txt_ids=torch.zeros(6, 3), attention_mask=None,
        ),
        {}, TEXT_512, BOTH,
    ),
    "lumina": Model(
        D.Lumina2Transformer2DModel,
        dict(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5,
            scaling_factor=1.0, axes_dim_rope=(8, 4, 4), axes_lens=(128, 128, 128), cap_feat_dim=32,
        ),
        lambda: image_text(4, 16, (6, 32), real(0.3, 0.5))
        | dict(encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool)),
        dict(cap_feat_dim=2304), InputSizes(), static=full_captions,
    ),
    "hidream": Model(
        D.HiDreamImageTransformer2DModel,
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
            force_inference_output=True,
        ),
        lambda: dict(
            hidden_states=randn(2, 4, 16, 16), encoder_hidden_states_t5=randn(2, 8, 32),
            encoder_hidden_states_llama3=randn(2, 2, 8, 16), pooled_embeds=randn(2, 64), timesteps=long(3, 5),
        ),
        dict(
            patch_size=2, in_channels=16, caption_channels=[4096, 4096], axes_dims_rope=(64, 32, 32),
            llama_layers=(*range(32), *[31] * 16), force_inference_output=True,
        ),
        InputSizes(text=128), BOTH, static_hidream,
    ),
    "bert": Model(
        T.BertModel,
        dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, vocab_size=50
        ),
        lambda: dict(input_ids=torch.randint(0, 50, (2, 7))),
        {}, TEXT_512, ("num_hidden_layers",),
    ),
    "llama": Model(
        T.LlamaForCausalLM,
        dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            vocab_size=50, use_cache=False,
        ),
        lambda: dict(input_ids=torch.randint(0, 50, (2, 7))),
        dict(  # Llama 3, 8B
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=14336, vocab_size=128256, use_cache=False,
        ),
        TEXT_512, ("num_hidden_layers",),
    ),
}  # fmt: skip
