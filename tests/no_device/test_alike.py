"""Blocks alike: one structure for each role, results unchanged by what is filled in, rotations by vote."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pq_fx
from pq_fx.alike import role
from pq_fx.modules import quantized_linears

Flux = Callable[..., tuple[nn.Module, dict]]
SETTINGS = {
    "format": "int4", "group_size": 16, "weight_only_format": "int4:16:bf16", "calibration_rows": 64,
}  # fmt: skip


def structures(model: nn.Module) -> dict[tuple, set[tuple]]:
    """For each role, what its input quantizers consist of."""
    found: dict[tuple, set[tuple]] = {}
    for name, linear in quantized_linears(model).items():
        q = linear.input_quantizer
        own = None
        if q is not None:
            own = (
                q.rotation,
                q.format,
                *(getattr(q, n) is None for n in ("perm", "clip", "smooth")),
            )
        found.setdefault(role([f"{name}."]), set()).add(own)
    return found


def quantized(model: nn.Module, inputs: dict, **changes: object) -> nn.Module:
    model = copy.deepcopy(model)
    quantizer = pq_fx.prepare(model, {**SETTINGS, **changes})
    with torch.no_grad(), quantizer.calibrate():
        model(**inputs)
    quantizer.convert()
    return model


@pytest.fixture
def uneven(tiny_flux: Flux) -> tuple[nn.Module, dict]:
    """Four blocks of each kind whose channels are unlike in every other block, so that choices differ."""
    model, inputs = tiny_flux(layers=4, singles=4)
    with torch.no_grad():
        for i, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
            for m in block.modules():
                if isinstance(m, nn.Linear) and i % 2:
                    m.weight[:, :: 3 + i] *= 6
    return model, inputs


def test_roles_leave_out_block_numbers_only() -> None:
    names = ["blocks.0.ff.net.2.weight", "blocks.11.ff.net.2.weight", "blocks.1.ff.net2.weight"]
    assert role(names[:1]) == role(names[1:2]) != role(names[2:])


@pytest.mark.parametrize("method", ["permuquant", "permuquant-h", "best"])
def test_blocks_get_one_structure(uneven: tuple[nn.Module, dict], method: str) -> None:
    model, inputs = uneven
    free = structures(quantized(model, inputs, method=method, alike_blocks=False))
    alike = structures(quantized(model, inputs, method=method))
    assert max(len(s) for s in free.values()) > 1, "the case shows nothing: choices are equal"
    assert all(len(s) == 1 for s in alike.values())


def test_what_is_filled_in_changes_no_bit(uneven: tuple[nn.Module, dict]) -> None:
    model, inputs = uneven
    with torch.no_grad():
        free, alike = (
            quantized(model, inputs, method="permuquant", alike_blocks=a)(**inputs).sample
            for a in (False, True)
        )
    assert torch.equal(free, alike)
