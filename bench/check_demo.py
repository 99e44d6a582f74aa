"""The demo's quantized model on a GPU, through its Triton kernels, against the reference on the CPU.

    python bench/check_demo.py --out bench/results/demo_h100.json

Converts the embedded model from one calibration on both devices: packed weights must be equal byte for
byte. Then the velocity of the compiled GPU model must have the error against the float model that the
plain-PyTorch reference has on the CPU, in the same carrier, to within ERROR_RATIO.

The two velocities themselves part: one code in 100,000 that flips on a rounding edge (a norm's sums differ
in the last bit between devices) moves its layer's output by a step, which flips more codes in the next
layer, until after a few layers the two are independent draws of the same quantization noise. How far they
part is recorded (`compiled_vs_reference`, in units of the quantization error), not bounded. Each operation
on equal inputs is bounded by check_kernels.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pq_fx
from pq_fx import modules
from pq_fx.demo import load_model, load_prompts, sample, velocity
from pq_fx.demo.sampling import noise
from pq_fx.modules import quantized_linears

# |gpu - float|^2 / |reference - float|^2 over 4 pictures: equal numerics give 1 up to which codes flip.
ERROR_RATIO = (0.95, 1.05)
FORMATS = ("int4", "int3", "nvfp4", "mxfp4")


@torch.no_grad()
def check(fmt: str, float_model: torch.nn.Module, statistics: Any, device: str) -> dict[str, Any]:
    """Convert for both devices, compare bytes and outputs."""
    config = pq_fx.QuantConfig(fmt)
    on_cpu = copy.deepcopy(float_model)
    report = pq_fx.prepare(on_cpu, config, statistics=statistics).convert()
    on_gpu = copy.deepcopy(on_cpu).to(device)
    again = copy.deepcopy(float_model).to(device)
    pq_fx.prepare(again, config, statistics=statistics).convert()
    same, differ = 0, []
    ours, theirs = quantized_linears(on_cpu), quantized_linears(again)
    for fqn, linear in ours.items():
        if torch.equal(linear.weight, theirs[fqn].weight.cpu()):
            same += 1
        else:
            differ.append(fqn)
    prompts = load_prompts("demo").take(4)
    x, t = noise(4, 11), 0.6
    wanted = velocity(float_model, x, t, prompts.embeddings).double()
    key = next(m.input_quantizer.format for m in theirs.values() if m.input_quantizer)
    carrier = modules.devices.carrier(torch.device(device), key)
    original = modules.devices.carrier
    modules.devices.carrier = lambda *_: carrier  # the reference, in the GPU's carrier
    try:
        reference = velocity(on_cpu, x, t, prompts.embeddings).double()
    finally:
        modules.devices.carrier = original
    start = time.perf_counter()
    compiled = torch.compile(on_gpu, backend="permuquant", fullgraph=True)
    got = velocity(compiled, x.to(device), t, prompts.embeddings.to(device)).double().cpu()
    seconds = time.perf_counter() - start
    eager = velocity(on_gpu, x.to(device), t, prompts.embeddings.to(device)).double().cpu()
    if not torch.isfinite(got).all():
        sys.exit(f"{fmt}: the GPU's output is not finite")
    cost = (reference - wanted).norm()
    return {
        "format": fmt,
        "carrier": carrier,
        "linears_packed_alike": same,
        "linears_packed_otherwise": differ,
        "quantization_rel_mse": (
            (reference - wanted).square().sum() / wanted.square().sum()
        ).item(),
        "gpu_rel_mse": ((got - wanted).square().sum() / wanted.square().sum()).item(),
        "compiled_vs_reference": ((got - reference).norm() / cost).item(),
        "eager_vs_reference": ((eager - reference).norm() / cost).item(),
        "error_ratio": ((got - wanted).square().sum() / cost.square()).item(),
        "mean_layer_error": report.mean_layer_error,
        "compile_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    args = parser.parse_args()
    model = load_model("flux")
    quantizer = pq_fx.prepare(model, "w4a4-int4")
    with quantizer.calibrate():
        sample(model, load_prompts("calibration").take(8).embeddings, 4, 1)
    checks = []
    for fmt in args.formats:
        checks.append(check(fmt, model, quantizer.statistics(), args.device))
        print(json.dumps(checks[-1]))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result = {"device": name, "torch": torch.__version__, "checks": checks}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    low, high = ERROR_RATIO
    bad = [
        c["format"]
        for c in checks
        if not low <= c["error_ratio"] <= high or c["linears_packed_otherwise"]
    ]
    if bad:
        sys.exit(f"out of bounds: {', '.join(bad)}")


if __name__ == "__main__":
    main()
