"""How the benches time: CUDA graphs over several input sets; neither host nor L2 shows. And what a result names."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import triton

Call = Callable[[], object]


def made_with(device: str = "cuda") -> dict[str, str]:
    """The head of a result: the device's name (a CPU's is "cpu"), torch, triton."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def device_microseconds(calls: Sequence[Call], repeats: int = 12, replays: int = 7) -> float:
    """Median time of one call on the device; `calls` are the same work on different inputs.

    The calls are captured `repeats` times in turn into one CUDA graph; with enough input sets (more
    than the L2's bytes) each reads from memory. Launch gaps of the host do not count.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000.0 / (repeats * len(calls)))
    return round(statistics.median(times), 2)


def host_microseconds(call: Call, repeats: int = 50) -> float:
    """Time the host spends on one call (Python, dispatch, launch); the device is not awaited."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return round(spent * 1e6 / repeats, 2)


def copy_bandwidth() -> float:
    """Bytes a microsecond of a device-to-device copy, read plus written."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * source.numel() / device_microseconds([lambda: target.copy_(source)], 4)
