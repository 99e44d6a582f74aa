"""Three ways to feed 4-bit weights to fp8 GEMMs, at FLUX.1-dev's block sizes.

    python bench/bench_overlap.py --out bench/results/overlap_h100.json

scratch: decode into a scratch buffer, then cuBLAS, in one stream (what pq_fx does).
side stream: the weights that follow a block's attention are decoded on another stream while
    attention runs, with events between the streams, into buffers of their own.
inside: one Triton kernel that loads packed weights and decodes them in its main loop, the decoded
    tile as the register operand of wgmma; with the group scale folded in, and by bit moves alone
    (a bound: it leaves the group scale out).

Everything is captured in CUDA graphs of several blocks with different weights, so that neither
launches nor the L2 help; median of 7 replays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from bench_gemm import SHAPES, packed_weight
from timing import device_microseconds, made_with

from pq_fx.kernels.codes import code_value
from pq_fx.kernels.decode import Packed, decode_e4m3
from pq_fx.kernels.formats import Format
from pq_fx.kernels.gemm_fp8 import scaled_gemm
from pq_fx.kernels.linear import linear
from pq_fx.kernels.rounding import e4m3_byte

KEY = "int4:64:bf16"
TOKENS, HEADS, WIDTH = 4608, 24, 128
# GEMMs (rows, N, K) between one attention and the next: FLUX.1's two kinds of block. Text has 512
# rows in a double block and shares no weights with the picture.
BLOCKS = {
    "single": (38, ((4608, 3072, 15360), (4608, 21504, 3072))),
    "double": (
        19,
        tuple(
            (m, *nk)
            for m in (4096, 512)
            for nk in ((3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072))
        ),
    ),
}


@triton.jit
def _inside_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    factor_ptr,
    row_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [M, N] = x [M, K] e4m3 @ decode(weight uint8 [N, K / 2])^T; factor fp32 [N, K / GROUP]."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first = (pid // (8 * blocks_n)) * 8
    size = tl.minimum(blocks_m - first, 8)
    inside = pid % (8 * blocks_n)
    rows = (first + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (inside // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_K // 2)
    weights = weight_ptr + columns.to(tl.int64)[:, None] * (K // 2) + half[None, :]
    xs = x_ptr + (rows % M).to(tl.int64)[None, :] * K + tl.arange(0, BLOCK_K)[:, None]
    PARTS: tl.constexpr = BLOCK_K // GROUP
    factors = factor_ptr + columns[:, None] * (K // GROUP) + tl.arange(0, PARTS)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in tl.range(0, K // BLOCK_K, num_stages=STAGES):
        packed = tl.load(weights + block * (BLOCK_K // 2))
        x = tl.load(xs + block * BLOCK_K)
        if FOLD:
            factor = tl.load(factors + block * PARTS)[:, :, None]
            pairs = tl.reshape(packed, [BLOCK_N, PARTS, GROUP // 2])
            low = e4m3_byte(code_value(pairs & 15, "int4") * factor, True)
            high = e4m3_byte(code_value(pairs >> 4, "int4") * factor, True)
        else:
            low = ((packed & 8) << 4) | (packed & 7)
            high = (packed & 128) | ((packed >> 4) & 7)
        w = tl.reshape(tl.join(low, high), [BLOCK_N, BLOCK_K]).to(tl.float8e4nv, bitcast=True)
        total = tl.dot(w, x, total)
    total *= tl.load(row_ptr + columns)[:, None]
    total *= tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)[None, :]
    target = out_ptr + rows.to(tl.int64)[None, :] * N + columns[:, None]
    tl.store(target, total.to(tl.bfloat16), mask=(rows < M)[None, :])


def inside(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Packed,
    factor: torch.Tensor,
    row: torch.Tensor,
    *,
    fold: bool,
    tile: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """One launch of `_inside_kernel`; tile: BLOCK_M, BLOCK_N, BLOCK_K, stages, warps."""
    (m, k), n = x.shape, weight.weight.shape[0]
    block_m, block_n, block_k, stages, warps = tile
    out = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    _inside_kernel[grid](
        x, x_scale, weight.weight, factor, row, out, m, n,
        K=k, GROUP=64, FOLD=fold, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


TILES = ((128, 128, 128, 3, 8), (256, 128, 128, 3, 8), (128, 128, 128, 4, 4), (128, 256, 64, 4, 8))


def inside_rows(warm: bool) -> Iterator[dict[str, Any]]:
    """Per shape: decode into scratch and cuBLAS, and the kernel that decodes inside, best tile."""
    fmt = Format.parse(KEY)
    for m, n, k in SHAPES:
        xs = [torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(2)]
        x_scale = torch.rand(m, 1, device="cuda")
        weights = [Packed(*packed_weight(fmt, n, k)) for _ in range(1 if warm else 4)]
        prepared = []
        for weight in weights:
            row = weight.scale.float().amax(dim=1, keepdim=True) / float(fmt.operand_gain)
            prepared.append((weight, weight.scale.float() / row, row))
        line: dict[str, Any] = {"m": m, "n": n, "k": k}
        operand, rows, _ = decode_e4m3(weights[:1], fmt, k, torch.bfloat16)
        right = scaled_gemm(xs[0], x_scale, operand, rows, None, torch.bfloat16).float()
        for name, fold in (("inside", True), ("inside, bit moves alone", False)):
            for tile in TILES:
                call = partial(inside, fold=fold, tile=tile)
                try:
                    out = call(xs[0], x_scale, *prepared[0]).float()
                except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
                    line[f"{name} {tile}"] = str(error)[:80]
                    continue
                error = float((out - right).norm() / right.norm())
                if fold and not error < 0.01:
                    line[f"{name} {tile}"] = f"wrong: {error}"
                elif not warm:
                    calls = [partial(call, x, x_scale, *p) for x, p in product(xs, prepared)]
                    line[f"{name} {tile}"] = device_microseconds(calls, 3)
        if not warm:
            calls = [
                partial(linear, x, x_scale, None, KEY, *w[:3], KEY, None, torch.bfloat16)
                for x, w in product(xs, weights)
            ]
            line["scratch"] = device_microseconds(calls, 3)
        print(line, flush=True)
        yield line


def block_times(kind: str, blocks: int) -> dict[str, float]:
    """Microseconds a block: attention and the GEMMs after it, decoded before each or beside attention."""
    fmt = Format.parse(KEY)
    shapes = BLOCKS[kind][1]
    q, key, value = (
        torch.randn(1, HEADS, TOKENS, WIDTH, device="cuda").bfloat16() for _ in range(3)
    )
    inputs = {
        s: (
            torch.randn(s[0], s[2], device="cuda").to(torch.float8_e4m3fn),
            torch.rand(s[0], 1, device="cuda"),
        )
        for s in shapes
    }
    weights = [[Packed(*packed_weight(fmt, n, k)) for _, n, k in shapes] for _ in range(blocks)]
    side = torch.cuda.Stream()

    def attend() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, key, value)

    def decode(weight: Packed, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_e4m3([weight], fmt, k, torch.bfloat16)[:2]

    def gemm(shape: tuple[int, int, int], operand: tuple[torch.Tensor, torch.Tensor]) -> None:
        scaled_gemm(*inputs[shape], *operand, None, torch.bfloat16)

    def scratch() -> None:
        for block in weights:
            attend()
            for shape, weight in zip(shapes, block, strict=True):
                gemm(shape, decode(weight, shape[2]))

    def beside() -> None:
        main = torch.cuda.current_stream()
        for block in weights:
            side.wait_stream(main)  # so the buffers of the last block may be used again
            operands = []
            with torch.cuda.stream(side):
                for shape, weight in zip(shapes, block, strict=True):
                    operand = decode(weight, shape[2])
                    operands.append((operand, side.record_event()))
            attend()
            for shape, (operand, done) in zip(shapes, operands, strict=True):
                main.wait_event(done)
                gemm(shape, operand)

    def no_decode() -> None:
        for _ in weights:
            attend()
            for shape in shapes:
                gemm(shape, operands_once[shape])

    operands_once = {s: decode(weights[0][i], s[2]) for i, s in enumerate(shapes)}
    ways: dict[str, Callable[[], None]] = {
        "scratch": scratch,
        "side stream": beside,
        "no decode at all": no_decode,
        "attention alone": attend,
    }
    found = {}
    for name, way in ways.items():
        us = device_microseconds([way], 1)
        found[name] = round(us / (1 if way is attend else blocks), 2)
    print(kind, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", action="store_true", help="compile only, time nothing")
    args = parser.parse_args()
    result: dict[str, Any] = {
        **made_with(),
    }
    if not args.warm:
        result["blocks_us"] = {kind: block_times(kind, 6) for kind in BLOCKS}
        gain = sum(
            BLOCKS[kind][0] * (us["scratch"] - us["side stream"])
            for kind, us in result["blocks_us"].items()
        )
        result["side_stream_saves_ms_a_step"] = round(gain / 1000.0, 2)
        print("side stream saves ms a step:", result["side_stream_saves_ms_a_step"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result["per_shape_us"] = []
    for line in inside_rows(args.warm):
        result["per_shape_us"].append(line)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
