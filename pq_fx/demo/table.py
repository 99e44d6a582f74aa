"""What ``pq-fx demo`` runs, one row each, and the table of them that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

FORMATS = ("int4", "int3")
GROUP_SIZE = 64
METHODS = {"rtn": "RTN", "permuquant": "PermuQuant", "permuquant-h": "PermuQuant-H"}


@dataclass(frozen=True)
class Run:
    """One row of the demo's table, and of `runs` in report.json.

    Attributes:
        format, group_size, method: how the model was quantized, weights and activations.
        psnr_db: mean over the pictures of their PSNR against the float model's, from equal noise.
        velocity_rel_mse: ``|v_q - v|^2 / |v|^2`` of single predictions at equal inputs.
        mean_layer_error: mean over linears of the relative squared error of their outputs.
        regions, accepted_regions: regions found, and those reordered or rotated.
        weight_bytes, float_weight_bytes: size of the model's tensors, quantized and before.
        seconds: choosing, packing and drawing, without calibration.
    """

    format: str
    group_size: int
    method: str
    psnr_db: float
    velocity_rel_mse: float
    mean_layer_error: float
    regions: int
    accepted_regions: int
    weight_bytes: int
    float_weight_bytes: int
    seconds: float


def table(runs: Sequence[Run], images: int) -> Table:
    """The runs as rich prints them; layer errors are compared with the first run of their format."""
    size = f"{runs[0].float_weight_bytes / 1e6:.1f} MB"
    made = Table(
        title=f"Against the float model ({size}), {images} pictures from equal noise",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    made.add_column("format", no_wrap=True)
    made.add_column("method", no_wrap=True)
    for name in ("PSNR", "velocity", "layer error", "regions", "size", "s"):
        made.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        base = next(r for r in runs if r.format == run.format)
        change = run.mean_layer_error / base.mean_layer_error - 1 if base.mean_layer_error else 0.0
        made.add_row(
            f"{run.format} g{run.group_size}",
            METHODS[run.method],
            f"{run.psnr_db:.2f} dB",
            f"{run.velocity_rel_mse:.4f}",
            f"{run.mean_layer_error:.4f}" + (f" {100 * change:+.0f} %" if run != base else ""),
            f"{run.accepted_regions}/{run.regions}",
            f"{run.weight_bytes / 1e6:.1f} MB",
            f"{run.seconds:.0f}",
            end_section=run.method == list(METHODS)[-1],
        )
    return made


def explanation(runs: Sequence[Run]) -> str:
    """The gains over rounding to nearest in one line a format, and what the columns mean."""
    lines = ["PSNR against rounding to nearest (RTN):"]
    for name in FORMATS:
        rtn, *others = (run for run in runs if run.format == name)
        gains = (f"{METHODS[r.method]} {r.psnr_db - rtn.psnr_db:+.2f} dB" for r in others)
        lines.append(f"  {name} g{GROUP_SIZE}: {', '.join(gains)}")
    lines += [
        "The channels of a group share one scale, which the largest of them sets. Sorting puts "
        "channels of like size into one group; a rotation inside the group then spreads what is "
        "left. Neither changes what the model computes before rounding.",
        "velocity: relative squared error of one prediction. layer error: mean over the linears.",
    ]
    return "\n".join(lines)
