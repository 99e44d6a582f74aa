"""The whole road on every model class, tiny, on a CPU: prepare, calibrate, convert, call, save, load, compile.

    python bench/check_models.py --out bench/results/check_models.json            every class, eager
    python bench/check_models.py flux wan --compile                               some, compiled too

The converted model's error against the float model is compared with that of plain rounding: the same linears with
fake-quantized weights and inputs in their own order, done here on a copy of the float model, without graph passes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from models import MODELS

import pq_fx
from pq_fx.kernels.formats import Format
from pq_fx.kernels.reference import fake_quantize
from pq_fx.pointwise import linearize, linearized

SETTINGS = {
    "format": "int4",
    "group_size": 16,
    "weight_only_format": "int4:16:bf16",
    "calibration_rows": 64,
}
# A permutation or rotation is kept where it pays on each linear's own output; through a whole random network the sum
# of errors may still come out somewhat above plain rounding's.
MORE_THAN_ROUNDING = 1.5
COMPILED_ERROR = (
    5e-3  # codes on a rounding boundary may move a step where Inductor sums in another order
)


def output(result: Any) -> Tensor:
    """The first tensor of a model's result."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def plainly_rounded(model: nn.Module, report: pq_fx.Report) -> nn.Module:
    """A copy of the float model whose quantized linears round their weights and inputs, nothing else."""
    rounded = copy.deepcopy(model)
    linearize(rounded)
    for layer in report.quantized:
        linear = rounded.get_submodule(layer.fqn)
        fmt = Format.parse(layer.format)
        linear.weight.data = fake_quantize(linear.weight.data, fmt)
        if layer.activation_format is not None:
            own = Format.parse(layer.activation_format)
            linear.register_forward_pre_hook(lambda _, x, own=own: (fake_quantize(x[0], own),))
    return rounded


def check(name: str, compiled: bool = False) -> dict[str, Any]:
    """Go the whole road with one class; raises AssertionError where a result is wrong."""
    torch.compiler.reset()
    start = time.perf_counter()
    model, inputs = MODELS[name].tiny()
    second = MODELS[name].tiny_inputs()
    with torch.no_grad():
        want = output(model(**inputs))
        before = copy.deepcopy(model)
        with linearized(model):  # as calibration has it: a 1x1 convolution may sum in another order
            plain = output(model(**inputs))
        quantizer = pq_fx.prepare(model, SETTINGS)
        with quantizer.calibrate():
            assert torch.equal(output(model(**inputs)), plain), "observing changed the result"
            model(**second)
        report = quantizer.convert()
        got = output(model(**inputs))
        rounding = relative(output(plainly_rounded(before, report)(**inputs)), want)
        row: dict[str, Any] = {
            "class": type(model).__name__,
            "quantized": len(report.quantized),
            "left": len(report.skipped),
            "regions": report.regions,
            "reordered_or_rotated": report.accepted_regions,
            "graphs": quantizer.statistics().graphs,
            "error": round(relative(got, want), 5),
            "error_of_plain_rounding": round(rounding, 5),
        }
        assert torch.isfinite(got).all()
        assert 0 < row["error"] <= MORE_THAN_ROUNDING * rounding, row
        with tempfile.TemporaryDirectory() as folder:
            pq_fx.save(model, Path(folder) / "q")
            loaded, _ = MODELS[name].tiny(seed=1)
            pq_fx.load(Path(folder) / "q", loaded)
            row["loaded_equal"] = torch.equal(output(loaded(**inputs)), got)
        assert row["loaded_equal"], row
        if compiled:
            torch.compiler.reset()
            again = output(torch.compile(model, backend="permuquant")(**inputs))
            row["compiled_error"] = relative(again, got)
            assert row["compiled_error"] < COMPILED_ERROR, row
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CLASS", help=", ".join(MODELS))
    parser.add_argument("--compile", action="store_true", help="compile with permuquant, too")
    parser.add_argument("--out", type=Path, help="JSON; rows of other classes in it are kept")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    failed = 0
    for name in args.names or MODELS:
        try:
            rows[name] = check(name, args.compile)
        except Exception as error:
            failed += 1
            rows[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(rows[name]), flush=True)
        if args.out:
            known = json.loads(args.out.read_text())["classes"] if args.out.exists() else {}
            known |= rows
            versions = {n: version(n) for n in ("torch", "diffusers", "transformers")}
            versions |= {"device": "cpu", "settings": SETTINGS}
            classes = {n: known[n] for n in MODELS if n in known}
            args.out.write_text(json.dumps({**versions, "classes": classes}, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
