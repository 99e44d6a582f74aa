"""docs/groups.png: what sorting and rotating do to the groups of one real layer.

    python bench/draw_groups.py --out docs/groups.png

The layer is a linear of the demo's FLUX model, its input rows are what four pictures' steps send through it. Every
panel's number is measured on those rows: ``|W x - W' Q(x')|^2 / |W x|^2`` with both operands in int4.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pq_fx.demo.model import load_model
from pq_fx.demo.prompts import load_prompts
from pq_fx.demo.sampling import sample
from pq_fx.kernels import fake_quantize, get_format, permute_rotate

GROUP = 32  # of 256 channels: eight groups can be told apart by eye
INK, BARS, SCALE = "#222222", "#9fb8c8", "#c1440e"


def layer_input(layer: str, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Sampled rows fp32 [rows, K] that reach a linear of the demo model, and its weight fp32 [N, K]."""
    model = load_model("flux")
    linear = model.get_submodule(layer)
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    sample(model, load_prompts("demo").take(4).embeddings, steps=6)
    hook.remove()
    x = torch.cat(seen)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]
    return x[chosen], linear.weight.detach()


def joint_order(x: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """The paper's sort key (section 4.1): channels by descending ``mu2_a^alpha * mu2_w^(1 - alpha)``."""
    key = x.square().mean(0).log() * alpha + weight.square().mean(0).log() * (1 - alpha)
    return key.argsort(descending=True)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/groups.png"))
    parser.add_argument("--layer", default="transformer_blocks.1.attn.to_q")
    options = parser.parse_args()
    x, weight = layer_input(options.layer)
    fmt = get_format("int4", GROUP)
    order = joint_order(x, weight)
    wanted = x @ weight.T
    figure = Figure(figsize=(9, 8), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 1, sharex=True, sharey=True)
    cases = (
        ("as the model has them", None, 0),
        ("sorted", order, 0),
        ("rotated inside each group", None, GROUP),
        ("sorted, then rotated inside each group", order, GROUP),
    )
    for axes, (title, perm, rotation) in zip(panels, cases, strict=True):
        moved, weights = (permute_rotate(t, perm, rotation) for t in (x, weight))
        got = fake_quantize(moved, fmt) @ fake_quantize(weights, fmt).T
        error = float((got - wanted).square().sum() / wanted.square().sum())
        rms = moved.square().mean(0).sqrt()
        step = moved.unflatten(-1, (-1, GROUP)).abs().amax(-1).mean(0) / fmt.max_value
        axes.bar(range(len(rms)), rms, width=1.0, color=BARS, label="rms of a channel")
        for group, value in enumerate(step):
            left = group * GROUP - 0.5
            label = "one int4 step of the group" if group == 0 else None
            axes.hlines(float(value), left, left + GROUP, color=SCALE, linewidth=1.6, label=label)
            axes.axvline(left, color="#dddddd", linewidth=0.6, zorder=0)
        axes.set_yscale("log")
        axes.set_title(f"{title}: output error {error:.4f}", fontsize=10, color=INK, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(-0.5, len(rms) - 0.5)
    panels[0].legend(framealpha=1, edgecolor="none", fontsize=8, loc="upper right", ncols=2)
    panels[-1].set_xlabel(f"input channels of {options.layer}, groups of {GROUP}", fontsize=9)
    figure.tight_layout()
    figure.savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
