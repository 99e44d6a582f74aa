"""Random permutations through every region, without quantizing, give the float model: the symmetry is real."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pq_fx
from pq_fx.errors import GraphError
from pq_fx.passes.fold import fold_tensors
from pq_fx.passes.regions import Region, RegionMap, find_regions
from pq_fx.passes.retrace import parameter_inputs, retrace
from pq_fx.passes.verify import verify_folds

Flux = Callable[..., tuple[nn.Module, dict]]


def regions_of(
    model: nn.Module, inputs: dict
) -> tuple[torch.fx.GraphModule, dict, RegionMap, dict[str, str]]:
    seen: list = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable:
        traced = retrace(gm)
        params = parameter_inputs(traced)
        seen.append((traced, params, find_regions(traced, params)))
        return traced.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    (gm, params, found) = seen[0]
    names = {id(p): n for n, p in model.named_parameters()}
    return gm, params, found, {k: names[id(v)] for k, v in params.items() if id(v) in names}


def random_perm(region: Region, rng: np.random.Generator) -> np.ndarray:
    perm = np.arange(region.blocks.size)
    for block in np.unique(region.blocks[region.blocks >= 0]):
        where = np.flatnonzero(region.blocks == block)
        perm[where] = rng.permutation(where)
    return perm


def apply(model: nn.Module, region: Region, perm: np.ndarray, names: dict[str, str]) -> None:
    params = dict(model.named_parameters())
    tensors = {a.param: params[names[a.param]] for a in region.axes}
    for (param, axis), index in fold_tensors(region, perm, tensors).items():
        tensors[param].data = tensors[param].data.index_select(axis, index)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_flux_random_folds_change_nothing(
    tiny_flux: Flux, dtype: torch.dtype, bound: float
) -> None:
    model, inputs = tiny_flux(dtype)
    gm, params, found, names = regions_of(model, inputs)
    foldable = [r for r in found.regions if r.foldable]
    # 3 embedders; AdaLN's shared input; 2 joint attentions; 4 MLPs of the double blocks; 2 single blocks; the stream
    assert len(foldable) == 3 + 1 + 2 + 4 + 2 + 1
    rng = np.random.default_rng(1)
    perms = {r.name: random_perm(r, rng) for r in foldable}
    moved = [r for r in foldable if (perms[r.name] != np.arange(r.blocks.size)).mean() > 0.8]
    assert len(moved) == len(foldable)
    verify_folds(gm, params, found.regions, perms)
    folded = copy.deepcopy(model)
    for region in foldable:
        apply(folded, region, perms[region.name], names)
    with torch.no_grad():
        want, got = model(**inputs).sample, folded(**inputs).sample
    assert ((got - want).norm() / want.norm()).item() < bound
    assert not torch.equal(
        folded.transformer_blocks[0].attn.to_v.weight, model.transformer_blocks[0].attn.to_v.weight
    )


def test_flux_streams_of_joint_attention_share_one_permutation(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(torch.float64)
    _, _, found, names = regions_of(model, inputs)
    region = next(
        r for r in found.regions if names[r.name] == "transformer_blocks.0.attn.to_out.0.weight"
    )
    held = {(names[a.param], a.axis) for a in region.axes}
    block = "transformer_blocks.0.attn."
    assert {
        (f"{block}to_v.weight", 0),
        (f"{block}add_v_proj.weight", 0),
        (f"{block}to_out.0.weight", 1),
    } <= held
    assert {
        (f"{block}to_add_out.weight", 1),
        (f"{block}to_v.bias", 0),
        (f"{block}add_v_proj.bias", 0),
    } <= held
    assert [names[p.name] for p in region.points] == [
        f"{block}to_out.0.weight",
        f"{block}to_add_out.weight",
    ]
    # exchangeable within a head only: 3 heads of 16 channels
    assert np.array_equal(region.blocks, np.repeat(np.unique(region.blocks), 16))

    # Negative control: the image stream's V alone, permuted with its own consumer, is another network...
    perm = random_perm(region, np.random.default_rng(2))
    wrong = copy.deepcopy(model)
    params = dict(wrong.named_parameters())
    image = [a for a in region.axes if "add" not in names[a.param]]
    for axis in image:
        p = params[names[axis.param]]
        index = torch.from_numpy(perm)
        p.data = p.data.index_select(axis.axis, index)
    with torch.no_grad():
        want, got = model(**inputs).sample, wrong(**inputs).sample
    assert ((got - want).norm() / want.norm()).item() > 1e-3


def test_the_residual_stream_is_one_region(tiny_flux: Flux) -> None:
    """Both streams share it, because the single blocks join them; one writer left out is another network."""
    model, inputs = tiny_flux(torch.float64)
    gm, params, found, names = regions_of(model, inputs)
    (region,) = [r for r in found.regions if r.stream]
    assert region.fold_name == "stream" and np.unique(region.blocks).size == 1
    held = {(names[a.param], a.axis) for a in region.axes}
    writers = {("x_embedder.weight", 0), ("context_embedder.weight", 0)}
    for kind, count in (("transformer_blocks", 2), ("single_transformer_blocks", 2)):
        for i in range(count):
            out = ("attn.to_out.0", "attn.to_add_out") if kind[0] == "t" else ("proj_out",)
            writers |= {(f"{kind}.{i}.{name}.weight", 0) for name in out}
    readers = {("transformer_blocks.1.attn.add_q_proj.weight", 1), ("proj_out.weight", 1)}
    modulation = {("transformer_blocks.0.norm1.linear.weight", 0), ("norm_out.linear.weight", 0)}
    assert writers | readers | modulation <= held
    perm = random_perm(region, np.random.default_rng(4))
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    apply(whole, region, perm, names)
    left_out = "single_transformer_blocks.0.proj_out.weight"
    axes = tuple(a for a in region.axes if names[a.param] != left_out)
    apply(broken, replace(region, axes=axes), perm, names)
    with torch.no_grad():
        want = model(**inputs).sample
        got, wrong = whole(**inputs).sample, broken(**inputs).sample
    assert ((got - want).norm() / want.norm()).item() < 1e-12
    assert ((wrong - want).norm() / want.norm()).item() > 1e-3
    verify_folds(gm, params, [region], {region.name: perm})
    with pytest.raises(GraphError, match="not closed at"):
        verify_folds(gm, params, [replace(region, axes=axes)], {region.name: perm})


def test_verify_catches_independent_streams(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(torch.float32)
    gm, params, found, names = regions_of(model, inputs)
    region = next(
        r for r in found.regions if names[r.name] == "transformer_blocks.1.attn.to_out.0.weight"
    )
    perm = random_perm(region, np.random.default_rng(3))
    image_only = tuple(a for a in region.axes if "add" not in names[a.param])
    broken = Region(region.name, region.points, region.blocks, region.columns, image_only)
    verify_folds(gm, params, [region], {region.name: perm})
    with pytest.raises(GraphError, match="not closed at"):
        verify_folds(gm, params, [broken], {region.name: perm})


def test_permutation_out_of_a_head_is_refused(tiny_flux: Flux) -> None:
    model, inputs = tiny_flux(torch.float32)
    _, params, found, names = regions_of(model, inputs)
    region = next(
        r for r in found.regions if names[r.name] == "transformer_blocks.0.attn.to_out.0.weight"
    )
    perm = np.roll(np.arange(region.blocks.size), 1)
    with pytest.raises(GraphError, match="out of its block"):
        fold_tensors(region, perm, params)
    with pytest.raises(GraphError, match="expected a permutation"):
        fold_tensors(region, np.zeros_like(perm), params)


class Table(nn.Module):
    """A residual stream that meets a position table."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.register_buffer("table", torch.randn(1, 6, 32), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x) + self.table
        for block in self.blocks:
            h = h + block(nn.functional.layer_norm(h, (32,)))
        return self.out(nn.functional.layer_norm(h, (32,)))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_table_that_is_not_saved_stays_and_keeps_the_stream(persistent: bool) -> None:
    torch.manual_seed(5)
    model = Table(persistent).eval()
    quantizer = pq_fx.prepare(model, {"format": "int4", "group_size": 16})
    with torch.no_grad(), quantizer.calibrate():
        model(torch.randn(2, 6, 8))
    regions = quantizer.statistics().plan.regions.values()
    assert any(r.foldable for r in regions) == persistent
    if not persistent:
        assert all("add" in " ".join(r.reasons) for r in regions if r.name.startswith("blocks"))
