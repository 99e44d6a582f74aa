"""Real model classes, no per-model code: every region's channels shuffled at random, nothing may change (fp64).

Tiny random configurations of diffusers' and transformers' own classes. For each graph that Dynamo makes of a model,
regions are found, random permutations are folded through all of them at once, and the model's output must stay the
float model's. Classes that do not trace as one graph (Lumina2, HiDream) are done graph by graph.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import diffusers as D
import numpy as np
import pytest
import torch
import transformers as T
from torch import nn

from pq_fx.errors import GraphError
from pq_fx.passes import find_regions, fold_tensors, parameter_inputs, retrace, verify_folds

randn = torch.randn


def sana():
    m = D.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    )
    return m, dict(
        hidden_states=randn(2, 4, 6, 8),
        encoder_hidden_states=randn(2, 5, 12),
        timestep=torch.tensor([3.0, 5.0]),
    )


def pixart():
    m = D.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return m, dict(
        hidden_states=randn(2, 4, 8, 8),
        encoder_hidden_states=randn(2, 5, 16),
        timestep=torch.tensor([3, 5]),
        added_cond_kwargs={"aspect_ratio": None, "resolution": None},
    )


def sd3():
    m = D.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return m, dict(
        hidden_states=randn(2, 4, 8, 8),
        encoder_hidden_states=randn(2, 5, 16),
        pooled_projections=randn(2, 24),
        timestep=torch.tensor([3.0, 5.0]),
    )


def qwen():
    m = D.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return m, dict(
        hidden_states=randn(2, 16, 16),
        encoder_hidden_states=randn(2, 7, 16),
        encoder_hidden_states_mask=torch.ones(2, 7, dtype=torch.long),
        timestep=torch.tensor([0.3, 0.5]),
        img_shapes=[[(1, 4, 4)]] * 2,
    )


def wan():
    m = D.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return m, dict(
        hidden_states=randn(2, 4, 2, 8, 8),
        encoder_hidden_states=randn(2, 7, 16),
        timestep=torch.tensor([3, 5]),
    )


def ltx():
    m = D.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
        qk_norm="rms_norm_across_heads",
    )
    return m, dict(
        hidden_states=randn(2, 2 * 4 * 4, 8),
        encoder_hidden_states=randn(2, 6, 16),
        timestep=torch.tensor([3, 5]),
        encoder_attention_mask=torch.ones(2, 6).bool(),
        num_frames=2,
        height=4,
        width=4,
    )


def dit():
    m = D.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=16,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return m, dict(
        hidden_states=randn(2, 4, 8, 8),
        timestep=torch.tensor([3, 5]),
        class_labels=torch.tensor([1, 2]),
    )


def aura():
    m = D.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return m, dict(
        hidden_states=randn(2, 4, 16, 16),
        encoder_hidden_states=randn(2, 5, 16),
        timestep=torch.tensor([0.3, 0.5]),
    )


def flux2():
    m = D.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return m, dict(
        hidden_states=randn(2, 16, 8),
        encoder_hidden_states=randn(2, 6, 16),
        timestep=torch.tensor([0.3, 0.5]),
        guidance=torch.tensor([1.0, 2.0]),
        img_ids=torch.randint(0, 4, (16, 4)).float(),
        txt_ids=torch.zeros(6, 4),
    )


def chroma():
    m = D.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return m, dict(
        hidden_states=randn(2, 16, 4),
        encoder_hidden_states=randn(2, 6, 16),
        timestep=torch.tensor([0.3, 0.5]),
        img_ids=randn(16, 3),
        txt_ids=torch.zeros(6, 3),
        attention_mask=None,
    )


def cogvideo():
    m = D.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    return m, dict(
        hidden_states=randn(2, 1, 4, 8, 8),
        encoder_hidden_states=randn(2, 8, 16),
        timestep=torch.tensor([3, 5]),
    )


def hunyuan():
    m = D.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return m, dict(
        hidden_states=randn(2, 4, 1, 8, 8),
        encoder_hidden_states=randn(2, 6, 16),
        pooled_projections=randn(2, 8),
        encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool),
        timestep=torch.tensor([3, 5]),
        guidance=torch.tensor([1.0, 2.0]),
    )


def lumina():
    m = D.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    return m, dict(
        hidden_states=randn(2, 4, 16, 16),
        encoder_hidden_states=randn(2, 6, 32),
        timestep=torch.tensor([0.3, 0.5]),
        encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool),
    )


def hidream():
    m = D.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    return m, dict(
        hidden_states=randn(2, 4, 16, 16),
        encoder_hidden_states_t5=randn(2, 8, 32),
        encoder_hidden_states_llama3=randn(2, 2, 8, 16),
        pooled_embeds=randn(2, 64),
        timesteps=torch.tensor([3, 5]),
    )


def bert():
    m = T.BertModel(
        T.BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=48,
            vocab_size=50,
        ),
        add_pooling_layer=True,
    )
    return m, dict(input_ids=torch.randint(0, 50, (2, 7)))


def llama():
    m = T.LlamaForCausalLM(
        T.LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=50,
            use_cache=False,
        )
    )
    return m, dict(input_ids=torch.randint(0, 50, (2, 7)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def mlp():
    return MLP(), dict(x=randn(5, 8))


def output(result: object) -> torch.Tensor:
    while isinstance(result, (tuple, list)):
        result = result[0]
    for name in ("sample", "logits", "last_hidden_state"):
        if hasattr(result, name):
            return output(getattr(result, name))
    assert isinstance(result, torch.Tensor)
    return result


def as_double(kwargs: dict) -> dict:
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
    }


# class: graphs, regions, regions that fold, linears by treatment (quantize, weight_only, leave, impossible)
EXPECTED = {
    "mlp": (1, 3, 2, 3, 0, 0, 0),
    "bert": (1, 9, 4, 12, 0, 1, 0),
    "llama": (1, 9, 2, 14, 0, 1, 0),
    "sana": (1, 15, 5, 17, 1, 4, 0),
    "pixart": (1, 19, 9, 20, 1, 5, 0),
    "sd3": (1, 28, 12, 37, 7, 6, 0),
    "qwen": (1, 20, 8, 25, 5, 4, 0),
    "wan": (1, 19, 9, 20, 1, 5, 0),
    "ltx": (1, 20, 9, 20, 1, 6, 0),
    "dit": (1, 13, 7, 12, 3, 3, 2),
    "aura": (1, 21, 9, 28, 5, 5, 0),
    "flux2": (1, 26, 11, 28, 4, 7, 0),
    "chroma": (1, 18, 7, 25, 0, 4, 0),
    "hunyuan": (1, 28, 13, 23, 5, 12, 0),
    "lumina": (4, 25, 5, 29, 0, 8, 0),
    "hidream": (21, 28, 9, 34, 0, 6, 0),
}
# SANA's linear attention computes in fp32 whatever the model's dtype, so its sums differ by fp32 rounding.
BOUND = {"sana": 1e-6}


@pytest.mark.parametrize("name", EXPECTED)
def test_random_folds_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, kwargs = globals()[name]()
    model, kwargs = model.double().eval(), as_double(kwargs)
    for p in model.parameters():
        if not p.any():  # zero-initialized gates would hide an error
            p.data.normal_(0, 0.1)
    seen = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        traced = retrace(gm)
        params = parameter_inputs(traced)
        seen.append((traced, params, find_regions(traced, params)))
        return traced.forward

    with torch.no_grad():
        want = output(model(**kwargs))
        assert torch.equal(output(torch.compile(model, backend=backend)(**kwargs)), want)
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    folded = copy.deepcopy(model)
    tensors = dict(folded.named_parameters()) | dict(folded.named_buffers())
    rng = np.random.default_rng(0)
    treatments: Counter = Counter()
    folds = 0
    for gm, params, found in seen:
        perms = {}
        for region in found.regions:
            if region.foldable:
                perms[region.name] = perm = np.arange(region.blocks.size)
                for block in np.unique(region.blocks[region.blocks >= 0]):
                    where = np.flatnonzero(region.blocks == block)
                    perm[where] = rng.permutation(where)
        verify_folds(gm, params, found.regions, perms)
        folds += len(perms)
        treatments.update(linear.treatment for linear in found.linears.values())
        for region in found.regions:
            if region.name in perms:
                own = {a.param: tensors[names[id(params[a.param])]] for a in region.axes}
                for (param, axis), index in fold_tensors(region, perms[region.name], own).items():
                    own[param].data = own[param].data.index_select(axis, index)
    with torch.no_grad():
        got = output(folded(**kwargs))
    assert ((got - want).norm() / want.norm()).item() < BOUND.get(name, 1e-12)
    regions = sum(len(found.regions) for _, _, found in seen)
    order = ("quantize", "weight_only", "leave", "impossible")
    assert (len(seen), regions, folds, *(treatments[t] for t in order)) == EXPECTED[name]


def test_a_write_out_of_sight_is_named() -> None:
    """CogVideoX fills its position embedding through `.data`: refused with the reason, not baked in."""
    torch.manual_seed(0)
    model, kwargs = cogvideo()

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        return retrace(gm).forward

    with torch.no_grad(), pytest.raises(Exception, match="out of the tracer's sight") as error:
        torch.compile(model.eval(), backend=backend)(**kwargs)
    assert isinstance(error.value.__cause__ or error.value.inner_exception, GraphError)
