"""Train one of the embedded demo models: ``python bench/train_demo.py --arch flux --out DIR``.

Flow matching on 3,953 OpenMoji pictures (bench/demo_data.py): x_t = (1 - t) x0 + t noise, the
model predicts noise - x0, t = sigmoid(normal). bf16 autocast, fused AdamW, warm-up and cosine
decay over ``--minutes`` (or ``--steps``), gradient clip 1, EMA, 10 % of texts dropped. cuDNN's
attention is off: its backward gave NaN on an H100. Writes to DIR the EMA weights in bf16
(``ARCH.safetensors``), ``ARCH.json`` (config, versions, loss curve) and ``ARCH.png`` (samples).

``--prompts`` instead writes the packaged prompts and their embeddings to DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_data import CACHE, DemoData, prepare
from safetensors.torch import load_file, save_file
from torch import nn

from pq_fx.demo.model import CONFIGS, create_model, forward_kwargs, patchify, unpatchify
from pq_fx.demo.sampling import sample

# Plain to see at 64 pixels and unlike each other; simple shapes first, for the README's picture.
PICKED = """red heart|grinning face|soccer ball|evergreen tree|red apple|fox|lemon|rainbow
|snowman|pig face|fire|cactus|alarm clock|mushroom|hamburger|light bulb
|smiling face with sunglasses|panda|strawberry|full moon|pineapple|lady beetle|grapes|carrot
|frog|robot|sailboat|watermelon|teddy bear|butterfly|doughnut|trophy
|rocket|cat face|pizza|sunflower|ghost|octopus|owl|hot beverage|house|airplane|tropical fish
|birthday cake|guitar|penguin|crown|locomotive|umbrella|lion|key|bicycle|tulip|whale|camera
|ice cream|balloon|tiger face|bus|snowflake|skull|star|mouse face|flag of Japan"""
SPLIT_SIZE = 256
SPLIT_SEED = 0


def choose_prompts(names: list[str]) -> dict[str, list[str]]:
    """Two disjoint splits of 256 names; the demo split starts with ``PICKED``."""
    picked = [p.strip() for p in PICKED.replace("\n", "").split("|")]
    missing = [p for p in picked if p not in names]
    if missing or len(set(picked)) != 64:
        raise ValueError(f"need 64 known prompts; {len(set(picked))} picked, unknown: {missing}")
    rest = [n for n in names if n not in picked and "skin tone" not in n and "flag" not in n]
    random.Random(SPLIT_SEED).shuffle(rest)
    cut = SPLIT_SIZE - len(picked)
    return {"demo": picked + rest[:cut], "calibration": rest[cut : cut + SPLIT_SIZE]}


def write_prompts(data: DemoData, out: Path) -> None:
    splits = choose_prompts(data.names)
    index, offsets = {n: i for i, n in enumerate(data.names)}, data.offsets()
    chosen = [index[n] for split in splits.values() for n in split]
    rows = np.concatenate([np.arange(offsets[i], offsets[i] + data.lengths[i]) for i in chosen])
    tensors = {
        "tokens": torch.from_numpy(data.tokens[rows]),
        "lengths": torch.from_numpy(data.lengths[chosen].astype(np.uint8)),
    }
    save_file(tensors, out / "prompts.safetensors")
    (out / "prompts.json").write_text(json.dumps(splits, indent=0) + "\n", encoding="utf-8")
    print(f"{len(chosen)} prompts, {tensors['tokens'].nbytes / 1e6:.2f} MB")


def zimage_batched(
    model: nn.Module, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """``ZImageTransformer2DModel.forward`` on one batch without its per-picture lists.

    The same modules on the same numbers, far fewer launches; ``main`` checks that it equals the
    class's own forward before it trains.
    """
    m: Any = model
    size, pad, device = x_t.shape[-1] // 4, 32 - text.shape[1], x_t.device
    adaln = m.t_embedder(t * m.t_scale)
    grid = m.create_coordinate_grid
    caption_ids = grid((32, 1, 1), (1, 0, 0), device).flatten(0, 2)
    padding_ids = torch.zeros(pad, 3, dtype=caption_ids.dtype, device=device)
    caption_freqs = m.rope_embedder(torch.cat([caption_ids, padding_ids]))[None]
    image_freqs = m.rope_embedder(grid((1, size, size), (33, 0, 0), device).flatten(0, 2))[None]
    x = m.all_x_embedder["4-1"](patchify(x_t))
    for layer in m.noise_refiner:
        x = layer(x, None, image_freqs, adaln)
    caption = m.cap_embedder(text)
    padding = m.cap_pad_token.to(caption.dtype).expand(len(text), pad, -1)
    caption = torch.cat([caption, padding], 1)
    caption_freqs = caption_freqs[:, : caption.shape[1]]
    for layer in m.context_refiner:
        caption = layer(caption, None, caption_freqs)
    joined = torch.cat([x, caption.to(x.dtype)], 1)
    freqs = torch.cat([image_freqs, caption_freqs], 1)
    for layer in m.layers:
        joined = layer(joined, None, freqs, adaln)
    tokens = m.all_final_layer["4-1"](joined, c=adaln)[:, : x.shape[1]]
    return unpatchify(tokens, x_t.shape[-2], x_t.shape[-1])


def flux_batched(
    model: nn.Module, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    tokens = model(**forward_kwargs(model, x_t, t, text))[0]
    return unpatchify(tokens, x_t.shape[-2], x_t.shape[-1])


FORWARD = {"flux": flux_batched, "zimage": zimage_batched}


def check_forward(arch: str, model: nn.Module, text: torch.Tensor) -> None:
    """The training forward equals a plain call of the class, in fp32."""
    from pq_fx.demo.model import velocity

    generator = torch.Generator(text.device).manual_seed(1)
    x = torch.randn(3, 3, 64, 64, generator=generator, device=text.device)
    t = torch.rand(3, generator=generator, device=text.device)
    with torch.no_grad():
        ours = FORWARD[arch](model, x, t, text[:3].float()).float()
        theirs = velocity(model, x, t, text[:3])
    error = (ours - theirs).norm() / theirs.norm()
    print(f"training forward against the class: relative error {error:.2e}", flush=True)
    if not error < 1e-4:  # fp32 rounding in another order of batches
        raise RuntimeError(f"the batched forward of {arch} differs: {error:.3e}")


def start_weights(args: argparse.Namespace, model: nn.Module) -> None:
    """Continue from ``--init``, or start from a zero prediction."""
    if args.init is not None:
        model.load_state_dict(load_file(args.init))
        return
    head: Any = model.proj_out if args.arch == "flux" else model.all_final_layer["4-1"].linear
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


def train(args: argparse.Namespace, data: DemoData, device: torch.device) -> None:
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = create_model(args.arch).to(device)
    parameters = list(model.parameters())
    text = torch.from_numpy(data.dense()).to(device)
    images = torch.from_numpy(data.images).to(device)
    # Half of the pictures are skin tones of others: see them less often.
    weights = torch.tensor([0.35 if "skin tone" in n else 1.0 for n in data.names], device=device)
    check_forward(args.arch, model, text)
    start_weights(args, model)
    torch.backends.cuda.matmul.allow_tf32 = True
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.99), fused=device.type == "cuda"
    )
    count = sum(p.numel() for p in parameters)
    print(f"{args.arch}: {count:,} parameters, {len(data.names)} pictures, {device}", flush=True)
    forward: Any = FORWARD[args.arch]
    if args.compile:
        forward = torch.compile(forward, dynamic=False)
    start, step = time.time(), 0
    curve: list[list[float]] = []
    total, seen = torch.zeros((), device=device), 0
    while True:
        elapsed = time.time() - start
        limit = step / args.steps if args.steps else elapsed / (args.minutes * 60)
        if limit >= 1:
            break
        rate = args.lr * min(1.0, (step + 1) / args.warmup)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * limit))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.multinomial(weights, args.batch, replacement=True)
        x0 = images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.randn_like(x0)
        t = torch.randn(args.batch, device=device).sigmoid()
        keep = (torch.rand(args.batch, device=device) >= 0.1).view(-1, 1, 1)
        x_t = x0 + t.view(-1, 1, 1, 1) * (noise - x0)
        with torch.autocast(device.type, torch.bfloat16):
            out = forward(model, x_t, t, text[rows].float() * keep)
        loss = (out.float() - (noise - x0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
        total += loss.detach()
        step, seen = step + 1, seen + 1
        if step % 50 == 0 or args.steps:
            if not math.isfinite(total.item()):  # also keeps the CPU from running ahead
                raise RuntimeError(f"the loss is not finite at step {step}: stopped")
            if step % 200 == 0 or step == args.steps:
                mean = total.item() / seen
                curve.append([step, round(mean, 5)])
                print(
                    f"{args.arch} step {step} loss {mean:.4f} lr {rate:.2e} "
                    f"{(time.time() - start):.0f} s",
                    flush=True,
                )
                total.zero_()
                seen = 0
    for p, e in zip(parameters, ema, strict=True):
        p.data.copy_(e)
    seconds = time.time() - start
    save(args, model, device, curve, step, seconds, count)


def save(
    args: argparse.Namespace,
    model: nn.Module,
    device: torch.device,
    curve: list[list[float]],
    steps: int,
    seconds: float,
    count: int,
) -> None:
    """Weights first, then the record, then the samples: what is done is safe."""
    state = {k: v.detach().to(torch.bfloat16).cpu() for k, v in model.state_dict().items()}
    save_file(state, args.out / f"{args.arch}.safetensors")
    import diffusers

    gpu = device.type == "cuda"
    record = {
        "arch": args.arch,
        "class": type(model).__name__,
        "config": CONFIGS[args.arch],
        "parameters": count,
        "training": {
            "steps": steps,
            "batch": args.batch,
            "lr": args.lr,
            "warmup": args.warmup,
            "ema": args.ema,
            "seed": args.seed,
            "init": args.init is not None,
            "compile": args.compile,
            "seconds": round(seconds, 1),
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "loss": curve,
    }
    (args.out / f"{args.arch}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"{args.arch}: saved after {steps} steps, {seconds:.0f} s, {curve[-1:]}", flush=True)
    model.eval()
    if args.sheet:
        sheet(args, model, device)


def sheet(args: argparse.Namespace, model: nn.Module, device: torch.device) -> None:
    """Pictures of the first prompts: one block of rows without guidance, one with scale 2."""
    from PIL import Image

    data = prepare(args.cache)
    index = {n: i for i, n in enumerate(data.names)}
    rows = [index[n] for n in choose_prompts(data.names)["demo"][: args.sheet]]
    text = torch.from_numpy(data.dense()[rows]).float().to(device)
    blocks = [sample(model, text, steps=16, seed=0, guidance=g) for g in (1.0, 2.0)]
    pictures = torch.cat(blocks).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    columns = 16 if args.sheet % 16 == 0 else args.sheet
    lines = [
        np.concatenate(list(pictures[i : i + columns]), axis=1)
        for i in range(0, len(pictures), columns)
    ]
    Image.fromarray(np.concatenate(lines, axis=0)).save(args.out / f"{args.arch}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=sorted(CONFIGS), default="flux")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--minutes", type=float, default=8.0, help="length of the training")
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--init", type=Path, help="weights to continue from (safetensors)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=int, default=64, help="prompts in ARCH.png, 0 for none")
    parser.add_argument("--prompts", action="store_true", help="only write the packaged prompts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = prepare(args.cache)
    if args.prompts:
        write_prompts(data, args.out)
        return
    train(args, data, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
