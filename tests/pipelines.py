"""Whole tiny pipelines of diffusers' own classes with random weights: no downloads, a second a picture on one core.

`make(family)` builds one, `draw(pipe)` runs it on fixed noise, `call(pipe)` is what a calibration runs. Every width is
a multiple of 16, so formats with groups of 16 fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as D
import torch
import transformers as T
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import pq_fx

PROMPTS = ("a red cat", "two blue houses by the sea")
SIDE = 32
STEPS = 2
CONFIG = pq_fx.QuantConfig(
    "int4", group_size=16, weight_only_format="int4:16:bf16", calibration_rows=64
)
_WORDS = [
    "a",
    "red",
    "cat",
    "two",
    "blue",
    "houses",
    "by",
    "the",
    "sea",
    "photo",
    "of",
    "sky",
    "system",
    "user",
    "assistant",
]


def tokenizer(max_length: int = 64) -> Any:
    """A word-level tokenizer with the special tokens and the chat template that the pipelines use."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = {word: i for i, word in enumerate([*special, *_WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    made = T.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return made


def _kl(latent_channels: int = 4) -> D.AutoencoderKL:
    return D.AutoencoderKL(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def flux() -> D.FluxPipeline:
    """FLUX.1: CLIP and T5, joint and single blocks."""
    clip = T.CLIPTextConfig(
        bos_token_id=2, eos_token_id=3, pad_token_id=0, vocab_size=40, hidden_size=32,
        intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, projection_dim=32,
    )  # fmt: skip
    t5 = T.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0
    )
    transformer = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return D.FluxPipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(),
        vae=_kl(),
        text_encoder=T.CLIPTextModel(clip),
        tokenizer=tokenizer(),
        text_encoder_2=T.T5EncoderModel(t5),
        tokenizer_2=tokenizer(),
        transformer=transformer,
    )


def sana() -> D.SanaPipeline:
    """SANA: linear attention, cross attention to Gemma 2, 1x1 convolutions; no `_repeated_blocks`."""
    gemma = T.Gemma2Config(
        head_dim=16, hidden_size=32, intermediate_size=48, max_position_embeddings=512,
        num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2, vocab_size=40,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    vae = D.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = D.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=SIDE,
    )
    return D.SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=T.Gemma2Model(gemma),
        vae=vae,
        transformer=transformer,
        scheduler=D.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def z_image() -> D.ZImagePipeline:
    """Z-Image: one stream of image and text, complex rotary embeddings, a Qwen 3 encoder."""
    qwen = T.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=512, head_dim=16,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    transformer = D.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        qk_norm=True,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):  # the class leaves them uninitialized
            torch.nn.init.normal_(parameter, std=0.02)
    return D.ZImagePipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(),
        vae=_kl(16),
        text_encoder=T.Qwen3Model(qwen),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def qwen_image() -> D.QwenImagePipeline:
    """Qwen-Image: double-stream blocks, Qwen 2.5 VL as the text encoder, a causal 3D VAE."""
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
        "rope_theta": 1000000.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = T.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    vae = D.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = D.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return D.QwenImagePipeline(
        scheduler=D.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=T.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "sana": sana,
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def make(family: str, seed: int = 0) -> Any:
    """A tiny pipeline of one family, in float32 on the CPU, quiet."""
    torch.manual_seed(seed)
    pipe = FAMILIES[family]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompt: str = PROMPTS[0], seed: int = 0, **changes: Any) -> Any:
    """Run the pipeline once as a user does; returns its images, a float array [batch, SIDE, SIDE, 3]."""
    settings: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "height": SIDE,
        "width": SIDE,
        "max_sequence_length": 16,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(pipe, D.SanaPipeline):
        settings |= {"complex_human_instruction": None, "use_resolution_binning": False}
    if isinstance(pipe, D.QwenImagePipeline):
        settings |= {"true_cfg_scale": 1.0}
    return pipe(prompt, **(settings | changes)).images


def draw(pipe: Any, **changes: Any) -> Any:
    """The first prompt's picture on fixed noise, [SIDE, SIDE, 3]."""
    return call(pipe, **changes)[0]


def quantized(family: str, config: pq_fx.QuantConfig = CONFIG) -> Any:
    """A tiny pipeline whose transformer was calibrated by one picture and converted."""
    pipe = make(family)
    quantizer = pq_fx.prepare(pipe.transformer, config)
    with quantizer.calibrate():
        call(pipe)
    quantizer.convert()
    return pipe


def flux_inputs(dtype: torch.dtype = torch.float32, text: int = 7) -> dict[str, torch.Tensor]:
    """Arguments of one call of the FLUX transformer: 4 x 4 latent tokens, `text` text tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.arange(16)
    made = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([0 * tokens, tokens // 4, tokens % 4], 1).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    return {name: value.to(dtype) for name, value in made.items()}


def aligned(pipe: Any) -> Any:
    """The pipeline with every tensor in memory of its own, for comparing bits.

    Tensors read from a mapped file start at any multiple of 8 bytes, where BLAS sums in another order: equal weights
    then differ in the last bit of their products.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part._apply(torch.clone)
    pipe.set_progress_bar_config(disable=True)
    return pipe
