"""Random small shapes of every Triton kernel against the reference, between guard bytes.

Each case draws a format, sizes, options and strides; what Triton compiles for (channels, format,
flags) is drawn once for `A_BUCKET` shapes. With canaries, kernels see inputs inside larger buffers
filled with 0xFF (NaN, to a read beyond the end) and write outputs between guard bytes; a changed
guard or input counts as wrong. Launchers are called directly, so that their allocations are seen.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from typing import Any

import torch
from kernel_cases import (
    BOUNDS,
    CARRIERS,
    DTYPES,
    KEYS,
    Call,
    CheckFailed,
    activation_global,
    as_bytes,
    carriers_of,
    check_output,
    check_quantized,
    launcher,
    random_perm,
    random_rows,
    random_weight,
    to_device,
)
from kernel_rounding import check_rounding, inputs
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pq_fx.kernels import reference_ops
from pq_fx.kernels.carriers import carries
from pq_fx.kernels.formats import Format

A_BUCKET = 50
GUARD = 1024  # bytes
Case = Iterator[dict[str, Any]]


class Guarded:
    """A tensor of given strides inside a buffer of 0xFF, and whether anything around it was written."""

    def __init__(self, size: Any, stride: Any, dtype: torch.dtype, device: Any) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        count = 0 if 0 in size else extent * dtype.itemsize
        self.count = count
        self.buffer = torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=device)
        self.tensor = self.buffer[GUARD : GUARD + count].view(dtype).as_strided(size, stride)

    def intact(self) -> bool:
        """Whether the guards hold what they held."""
        outside = torch.cat([self.buffer[:GUARD], self.buffer[GUARD + self.count :]])
        return bool((outside == 0xFF).all())


class Canaries(TorchFunctionMode):
    """While active, `torch.empty` gives tensors inside guards."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Guarded] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        size = torch.Size([args[0]] if isinstance(args[0], int) else args[0])
        strides, step = [], 1
        for n in reversed(size):
            strides.insert(0, step)
            step *= max(n, 1)
        self.outputs.append(Guarded(size, strides, kwargs["dtype"], kwargs["device"]))
        return self.outputs[-1].tensor


def guarded_call(device: str) -> Call:
    """Calls launchers between guards; raises CheckFailed where a guard or an input changed."""

    def call(name: str, args: tuple[Any, ...]) -> Any:
        inputs, befores, moved = [], [], []
        for a in args:
            if isinstance(a, Tensor):
                inputs.append(Guarded(a.size(), a.stride(), a.dtype, device))
                as_bytes(inputs[-1].tensor).copy_(as_bytes(a))
                befores.append(inputs[-1].buffer.clone())
                a = inputs[-1].tensor
            moved.append(a)
        with Canaries() as canaries:
            out = launcher(name)(*moved)
        if not all(guarded.intact() for guarded in canaries.outputs):
            raise CheckFailed(f"{name} wrote outside an output")
        if not all(torch.equal(g.buffer, b) for g, b in zip(inputs, befores, strict=True)):
            raise CheckFailed(f"{name} wrote to an input")
        if not canaries.outputs:
            raise CheckFailed(f"{name} allocated nothing between guards")
        return out

    return call


def plain_call(device: str) -> Call:
    """Calls launchers on ordinary tensors."""
    return lambda name, args: launcher(name)(*to_device(args, device))


def _sizes(fmt: Format, unit: int = 16) -> int:
    unit = max(fmt.group_size, unit)
    return unit * random.randint(1, max(768 // unit, 2))


def _rows(channels: int, dtype: torch.dtype) -> Tensor:
    """Rows [T, K], [B, T, K] or a slice of wider ones, sizes at random; 1 row now and then."""
    tokens = random.choice((1, 2, random.randint(1, 40)))
    kind = random.randrange(3)
    if kind == 0:
        return random_rows(tokens, channels, dtype=dtype)
    if kind == 1:
        return random_rows(random.randint(1, 3), tokens, channels, dtype=dtype)
    return random_rows(2, tokens, channels + 8 * random.randint(1, 5), dtype=dtype)[..., :channels]


def quantize(call: Call, count: int) -> Case:
    """quantize and act_quantize: every carrier, activation, gate, rows that come first."""
    fmt = Format.parse(random.choice(KEYS))
    channels, dtype = _sizes(fmt), random.choice(DTYPES)
    carrier = random.choice(carriers_of(fmt))
    act = random.choice(reference_ops.ACTIVATIONS)
    gated, joined, permute, clipped = (random.random() < 0.4 for _ in range(4))
    rotation = random.choice((0, fmt.group_size or 64))
    rotation = rotation if rotation and channels % rotation == 0 else 0
    exact = act in ("none", "relu") and (rotation == 0 or dtype == torch.float32)
    for _ in range(count):
        x = _rows(channels, dtype)
        lead = x.shape[:-1]
        first = 8 * (channels // 16) if joined else 0
        before = random_rows(*lead, first, dtype=dtype) if first else None
        x = x[..., first:]
        gate = random_rows(*x.shape, dtype=dtype) if gated else None
        perm = random_perm(channels) if permute else None
        clip = torch.tensor(0.8) if clipped else None
        glob = activation_global(random_rows(3, channels, dtype=dtype), fmt)
        args = (x, gate, act, before, perm, glob, clip, fmt.key, rotation, carrier)
        case = f"act_quantize {fmt.key} {carrier} {act} {tuple(x.shape)} {dtype} {gated=} {first=}"
        allowed = 0.0 if exact else _flips(x.numel())
        yield check_quantized(case, "act_quantize", args, call, allowed)


def norm_quantize(call: Call, count: int) -> Case:
    """norm_quantize: both norms, affine, modulation of a batch entry."""
    fmt = Format.parse(random.choice(KEYS))
    channels, dtype = _sizes(fmt), random.choice(DTYPES)
    carrier, norm = random.choice(carriers_of(fmt)), random.choice(reference_ops.NORMS)
    affine, modulated, permute = (random.random() < 0.5 for _ in range(3))
    rotation = random.choice((0, fmt.group_size or 0))
    for _ in range(count):
        x = _rows(channels, dtype)
        batch = x.shape[0] if x.dim() > 2 else 1
        weight = torch.rand(channels) + 0.5 if affine else None
        bias = torch.randn(channels) if affine and norm == "layer" else None
        mods = torch.randn(batch, 2 * channels).chunk(2, dim=-1) if modulated else (None, None)
        glob = torch.tensor(0.004) if fmt.two_level else None
        perm = random_perm(channels) if permute else None
        tail = (perm, glob, None, fmt.key, rotation, carrier)
        args = (x, norm, weight, bias, 1e-6, *mods, *tail)
        case = f"norm_quantize {fmt.key} {norm} {carrier} {tuple(x.shape)} {dtype} r{rotation}"
        yield check_quantized(case, "norm_quantize", args, call, _flips(x.numel()))


def _flips(elements: int) -> float:
    """The share of bytes that may differ; a whole group of 128 may in a small tensor."""
    return max(BOUNDS.FLIPPED_CODES, 130.0 / max(elements, 1))


def _linear(carrier: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[Call, int], Case]:
    def cases(call: Call, count: int) -> Case:
        weight_fmt = Format.parse(random.choice(KEYS))
        keys = [k for k in KEYS if carries(carrier, Format.parse(k))]
        fmt = Format.parse(
            random.choice((*keys, weight_fmt.key) if weight_fmt.key in keys else keys)
        )
        if carrier == "e4m3" and "int8" in (fmt.element, weight_fmt.element):
            fmt, weight_fmt = Format.parse("fp8:0:fp32"), Format.parse("int4:64:bf16")
        unit = max(fmt.group_size, weight_fmt.group_size, 16)
        channels = unit * random.randint(1, max(512 // unit, 2))
        dtype = random.choice(dtypes)
        with_bias = random.random() < 0.5
        for _ in range(count):
            m, n = random.randint(1, 70), random.randint(1, 90)
            if random.random() < 0.3:
                m, n = 16 * (1 + m // 16), 16 * (1 + n // 16)
            weight, weight_scale, weight_global = random_weight(n, channels, weight_fmt)
            x = random_rows(m, channels, dtype=torch.bfloat16)
            glob = activation_global(x, fmt)
            data, scale = reference_ops.quantize(x, None, glob, None, fmt.key, 0, carrier)
            bias = torch.randn(n).to(dtype) if with_bias else None
            packed = (weight, weight_scale, weight_global, weight_fmt.key, bias)
            case = f"linear {carrier} {fmt.key} x {weight_fmt.key} {m}x{n}x{channels} {dtype}"
            bound = BOUNDS.FP8_OUTPUT_ERROR
            if carrier != "e4m3":
                bound = BOUNDS.OUTPUT_ERROR[str(dtype).removeprefix("torch.")]
            args = (data, scale, glob, fmt.key, *packed, dtype)
            yield check_output(case, "linear", args, call, bound)

    return cases


def weights_only(call: Call, count: int) -> Case:
    """linear_weight_only: 1 to 64 rows (gemv), and more (decode_float)."""
    fmt, dtype = Format.parse(random.choice(KEYS)), random.choice(DTYPES)
    channels, with_bias = _sizes(fmt), random.random() < 0.5
    for _ in range(count):
        m = random.choice((1, 1, random.randint(1, 8), random.randint(1, 64), 70))
        n = random.randint(1, 90)
        x = random_rows(m, channels, dtype=dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        args = (x, *random_weight(n, channels, fmt), fmt.key, bias)
        table = BOUNDS.OUTPUT_ERROR if m <= 64 else BOUNDS.DECODED_WEIGHT_ERROR
        case = f"linear_weight_only {fmt.key} {m}x{n}x{channels} {dtype}"
        bound = table[str(dtype).removeprefix("torch.")]
        yield check_output(case, "linear_weight_only", args, call, bound)


def round_columns(call: Call, count: int) -> Case:
    """GPTQ's columns: a part of a group to 128, rows of the weight at random."""
    fmt, columns = Format.parse(random.choice(KEYS)), random.choice((16, 32, 64, 128, 0))
    columns = columns or random.randint(1, 128)
    by_column = random.random() < 0.5
    for _ in range(count):
        n = random.choice((random.randint(1, 40), random.randint(1, 400)))
        case = f"round_columns {fmt.key} {columns}x{n} {by_column=}"
        yield check_rounding(case, inputs(fmt, columns, n, by_column), call)


KERNELS: dict[str, Callable[[Call, int], Case]] = {
    "quantize, act_quantize": quantize,
    "norm_quantize": norm_quantize,
    "decode + fp8 GEMM (cuBLAS, Triton)": _linear("e4m3", DTYPES),
    "int8 GEMM": _linear("int8", DTYPES),
    "GEMM of code points": _linear("codes", DTYPES),
    "GEMM of packed e2m1": _linear("e2m1", DTYPES),
    "weights only (gemv, decode)": weights_only,
    "round_columns (GPTQ)": round_columns,
}
assert set(CARRIERS) == {"codes", "int8", "e2m1", "e4m3"}


def bucket(kernel: str, seed: int, count: int, device: str, canaries: bool) -> dict[str, Any]:
    """`count` shapes of one draw of what Triton compiles for: how many were tried and wrong."""
    random.seed(f"{kernel} {seed}")
    torch.manual_seed(random.getrandbits(30))
    torch.set_num_threads(1)
    call = guarded_call(device) if canaries else plain_call(device)
    cases = KERNELS[kernel](call, count)
    found: dict[str, Any] = {"tried": 0, "wrong": 0, "worst": 0.0, "errors": []}
    while found["tried"] < count:
        found["tried"] += 1
        try:
            check = next(cases)
        except (CheckFailed, RuntimeError, ValueError) as error:
            found["wrong"] += 1
            found["errors"].append(str(error)[:300])
            cases = KERNELS[kernel](call, count)  # a generator that raised has ended
            continue
        found["worst"] = max(found["worst"], check.get("relative_error", check.get("codes_differ")))
    return found


def run(
    shapes: int, seed: int, jobs: int, device: str, canaries: bool, only: Sequence[str] = ("",)
) -> dict[str, Any]:
    """About `shapes` shapes of every kernel that `only` names: {kernel: {"tried", "wrong", "worst", "errors"}}."""
    buckets = max(1, round(shapes / A_BUCKET))
    each = min(A_BUCKET, shapes)
    kernels = [kernel for kernel in KERNELS if any(word in kernel for word in only)]
    # All kernels at the same pace, and every bucket said: what is cut off has told something.
    tasks = [(kernel, seed * 1000 + i) for i in range(buckets) for kernel in kernels]
    total = {k: {"tried": 0, "wrong": 0, "worst": 0.0, "errors": []} for k in kernels}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) if jobs > 1 else nullcontext() as pool:
        if pool is None:
            done: Any = [(task, bucket(*task, each, device, canaries)) for task in tasks]
        else:
            futures = {pool.submit(bucket, *t, each, device, canaries): t for t in tasks}
            done = ((futures[f], f.result()) for f in as_completed(futures))
        for (kernel, _), found in done:
            row: Any = total[kernel]
            for key in ("tried", "wrong", "errors"):
                row[key] = row[key] + found[key]
            row["worst"] = max(row["worst"], found["worst"])
            row["errors"] = row["errors"][:10]
            print(f"  so far {kernel}: {row['tried']}, {row['wrong']} wrong", flush=True)
    for kernel, row in total.items():
        print(f"{kernel}: {row['tried']} shapes, {row['wrong']} wrong, worst {row['worst']:.1e}")
        for error in row["errors"]:
            print(f"  {error}")
    return total
