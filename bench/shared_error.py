"""What of a quantized model's velocity error is shared over tokens, pictures and steps, and what PSNR makes of it.

    python bench/shared_error.py --arch flux --images 16 --out bench/results/shared_error_flux_cpu.json

Errors are measured along the float model's own path, at each of its steps: the part that is the same for all tokens of
a picture, for 4 x 4 neighbouring tokens, for all pictures at each token, for all of both (unrelated errors: 1 / 256,
1 / 16, 1 / pictures, 1 / (256 pictures)). `coherence` is ||sum of the steps' errors||^2 over the sum of their squares,
by the number of steps: 1 / steps for unrelated errors, 1 for equal ones. `open_loop_db` is the PSNR that their sum
would leave, `psnr_db` what the pictures have, and with `--scale` what they have when each prediction's error is
multiplied. The file is written after every method.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pq_fx
from pq_fx.demo import load_model, load_prompts, psnr, sample, velocity
from pq_fx.demo.model import patchify
from pq_fx.demo.sampling import noise


class Way:
    """The float model's way from noise to pictures: times, inputs and velocities of each step."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.text = load_prompts("demo").take(args.images).embeddings.to(args.device)
        self.times = torch.linspace(1, 0, args.steps + 1).tolist()
        self.inputs: list[Tensor] = []
        self.wanted: list[Tensor] = []
        self.pictures = self.draw(self.step)

    def velocity(self, model: nn.Module, x: Tensor, t: float) -> Tensor:
        """A prediction for all pictures, fp32 [n, 3, H, W]."""
        some = range(0, len(x), self.args.batch)
        parts = [slice(i, i + self.args.batch) for i in some]
        return torch.cat([velocity(model, x[p], t, self.text[p]).float() for p in parts])

    def step(self, x: Tensor, t: float) -> Tensor:
        """The float model's prediction, kept."""
        self.inputs.append(x)
        self.wanted.append(self.velocity(self.model, x, t))
        return self.wanted[-1]

    def draw(self, predict: Any) -> Tensor:
        """Pictures in 0..1, each from its noise by `predict(x, t)`."""
        x = noise(self.args.images, 0).to(self.args.device)
        for now, then in itertools.pairwise(self.times):
            x = x + (then - now) * predict(x, now)
        return (x * 0.5 + 0.5).clamp(0, 1).cpu()

    def errors(self, model: nn.Module) -> list[Tensor]:
        """What a model's predictions on this way are off by, a step each."""
        steps = zip(self.inputs, self.times, self.wanted, strict=False)
        return [self.velocity(model, x, t) - v for x, t, v in steps]

    def scaled(self, model: nn.Module, factor: float) -> Tensor:
        """Pictures of a model whose errors are `factor` times as large."""

        def predict(x: Tensor, t: float) -> Tensor:
            v = self.velocity(self.model, x, t)
            return v + factor * (self.velocity(model, x, t) - v)

        return self.draw(predict)


def shares(error: Tensor) -> dict[str, float]:
    """Parts of an error [n, 3, H, W] that are shared, by its tokens."""
    tokens = patchify(error)
    n, count, channels = tokens.shape
    side = int(count**0.5)
    grid = tokens.view(n, side // 4, 4, side // 4, 4, channels)
    size = tokens.square().mean()
    means = {
        "tokens": tokens.mean(1),
        "4 x 4 tokens": grid.mean((2, 4)),
        "pictures": tokens.mean(0),
        "tokens and pictures": tokens.mean((0, 1)),
    }
    return {name: round(float(mean.square().mean() / size), 4) for name, mean in means.items()}


def decibels(error: Tensor) -> float:
    return round(float(-10 * torch.log10(error.square().flatten(1).mean(1)).mean()), 2)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.arch).to(args.device)
    quantizer = pq_fx.prepare(model, pq_fx.QuantConfig(args.format))
    with quantizer.calibrate():
        sample(model, load_prompts("calibration").take(16).embeddings, 8, 7919, batch_size=32)
    statistics, way = quantizer.statistics(), Way(model, args)
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    result: dict[str, Any] = vars(args) | {"out": str(args.out), "device": device, "runs": []}
    result["torch"] = torch.__version__
    for method in args.methods:
        clone = copy.deepcopy(model)
        config = pq_fx.QuantConfig(args.format, method=method)
        pq_fx.prepare(clone, config, statistics=statistics).convert()
        errors = way.errors(clone)
        total = torch.stack(errors).mean(0)
        squares = torch.stack([e.square().mean() for e in errors])
        result["runs"].append(
            {
                "method": method,
                "coherence": round(float(total.square().mean() / squares.mean()), 3),
                "open_loop_db": decibels(total / 2),
                "psnr_db": {
                    str(f): round(float(psnr(way.scaled(clone, f), way.pictures).mean()), 2)
                    for f in args.scale
                },
                "steps": [
                    {
                        "t": round(t, 3),
                        "velocity_rel_mse": round(float(s / v.square().mean()), 5),
                        "shared": shares(e),
                    }
                    for t, s, v, e in zip(way.times, squares, way.wanted, errors, strict=False)
                ],
            }
        )
        print(json.dumps(result["runs"][-1]), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("flux", "zimage"), default="flux")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="pictures in one call")
    parser.add_argument("--methods", nargs="+", default=("permuquant-h", "best", "svdquant"))
    parser.add_argument("--scale", nargs="+", type=float, default=(1.0,))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
