"""Blocks alike: what plays one role in several blocks gets one structure, so that the blocks share their compiled code.

`compile_repeated_blocks` compiles a block's code once for each structure that its quantizers have: with an order or
without, rotated or not, clipped or not. Choosing freely in each of FLUX's 57 blocks makes dozens of structures, and
beyond 8 Dynamo gives up. So the blocks vote on the rotation, and where any of them has an order, a clip ratio or a
smoothing, the others get one that does nothing: their results do not change by a bit.

    role                                  block 0            block 1           both afterwards
    single_transformer_blocks.*.proj_out  perm, rotation 64  rotation 64       perm (of block 1: 0, 1, 2, ...), 64
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pq_fx.modules import ActivationQuantizer, QuantLinear
from pq_fx.passes.choose import RegionChoice
from pq_fx.passes.regions import Point, Region

Role = tuple[str, ...]
_Kind = tuple[Role, int, tuple[str, str | None]]


def role(names: Iterable[str]) -> Role:
    """What these linears are in their block: their names with the blocks' numbers left out."""
    return tuple(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)


def dissenting(
    views: Iterable[Region],
    choices: Mapping[str, RegionChoice],
    formats: Mapping[str, tuple[str, str | None]],
) -> dict[str, dict[str, int]]:
    """Regions with a point whose rotation is not its role's, with the rotation that each point should have.

    The rotation that most blocks chose wins; of equals the larger. Region name -> point name -> rotation. `formats`
    are of weights and activations, by point name: only points that are quantized alike vote together, and one in
    16 bits has nothing to rotate.
    """
    votes: dict[_Kind, Counter[int]] = {}
    held: list[tuple[Region, Point]] = [
        (v, p) for v in views for p in v.points if not p.one_row and formats[p.name][1] is not None
    ]
    for view, point in held:
        ballot = votes.setdefault(_kind(point, formats), Counter())
        ballot[choices[view.name].points[point.name].rotation] += 1
    found: dict[str, dict[str, int]] = {}
    for view, point in held:
        ballot = votes[_kind(point, formats)]
        found.setdefault(view.name, {})[point.name] = max(ballot, key=lambda r: (ballot[r], r))
    return {
        name: wanted
        for name, wanted in found.items()
        if any(choices[name].points[p].rotation != r for p, r in wanted.items())
    }


def _kind(point: Point, formats: Mapping[str, tuple[str, str | None]]) -> _Kind:
    return role(point.linears), point.channels, formats[point.name]


def fill_absent(modules: Mapping[str, QuantLinear]) -> None:
    """Give every quantizer the tensors that another of its role has, with values that change nothing."""
    readers: dict[ActivationQuantizer, list[str]] = {}
    for name, module in modules.items():
        if module.input_quantizer is not None:
            readers.setdefault(module.input_quantizer, []).append(name)
    roles: dict[tuple[Role, int], list[ActivationQuantizer]] = {}
    for quantizer, names in readers.items():
        roles.setdefault((role(f"{n}." for n in names), quantizer.channels), []).append(quantizer)
    for members in roles.values():
        for name in ("perm", "clip", "smooth"):
            given = next((v for m in members if (v := getattr(m, name)) is not None), None)
            for quantizer in members:
                if given is not None and getattr(quantizer, name) is None:
                    value = torch.ones_like(given)
                    if name == "perm":
                        value = torch.arange(
                            quantizer.channels, dtype=given.dtype, device=given.device
                        )
                    setattr(quantizer, name, nn.Parameter(value, requires_grad=False))
