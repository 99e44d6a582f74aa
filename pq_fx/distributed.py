"""Statistics of several processes become one: every process ends with the sum of all, equal to the bit.

Descriptions (calls, seeds, plan) travel as JSON bytes, moments point by point, so that no process holds more than one
point of all the others at once. Nothing is pickled.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from pq_fx.errors import CalibrationError
from pq_fx.passes.moments import Moments
from pq_fx.statistics import Statistics, check_addable
from pq_fx.statistics_file import describe, restore

_JSON = "pq_fx"


def own_seed(seed: int) -> int:
    """The seed of this process's samples: `seed` itself on rank 0 or without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return seed + (dist.get_rank() << 32)
    return seed


def all_reduce(statistics: Statistics, group: dist.ProcessGroup | None = None) -> Statistics:
    """The sum over the processes of `group`, in the order of their ranks; the same on each, on this one's device.

    Every process of the group must call it. All raise the same CalibrationError when the statistics cannot be added
    up: see `Statistics.merge`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise CalibrationError(
            "all_reduce adds up the statistics of several processes, and torch.distributed is not initialized: start "
            "the script with torchrun and call torch.distributed.init_process_group first"
        )
    statistics.prove()
    parts = _exchange_descriptions(statistics, group)
    check_addable([part for part, _ in parts])
    sizes: dict[str, tuple[int, int]] = {}
    for rank, (_, points) in enumerate(parts):
        for name, size in points.items():
            if sizes.setdefault(name, size) != size:
                raise CalibrationError(
                    f"cannot add up the statistics of rank {rank}: {name} has {list(size)} rows and channels there and "
                    f"{list(sizes[name])} on an earlier rank; use the same config and model on all"
                )
    total = parts[0][0]
    for part, _ in parts[1:]:
        total = total.merge(part)
    total.note, total.graphs, total.bound = (
        dict(statistics.note),
        statistics.graphs,
        statistics.bound,
    )
    total._proven = len(total.bound)
    for name, (rows, channels) in sizes.items():
        own = statistics.moments.get(name)
        home = torch.device("cpu") if own is None else own.device
        total.moments[name] = _sum(own or Moments.create(channels, rows), group).to(home)
    return total


def _sum(own: Moments, group: dist.ProcessGroup | None) -> Moments:
    gathered = [_all_gather(t, group) for t in own.tensors()]
    first, *others = (Moments(*tensors) for tensors in zip(*gathered, strict=True))
    for other in others:
        first = first.merge(other)
    return first


def _exchange_descriptions(
    statistics: Statistics, group: dist.ProcessGroup | None
) -> list[tuple[Statistics, dict[str, tuple[int, int]]]]:
    """Of each rank: its statistics without moments, and rows and channels of its points."""
    arrays: list[np.ndarray] = []
    header = describe(statistics, arrays)
    header["points"] = {n: list(m.rows.shape) for n, m in statistics.moments.items()}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8).copy()
    tensors = {str(i): torch.from_numpy(a) for i, a in enumerate(arrays)}
    mine = save({_JSON: torch.from_numpy(text), **tensors})
    result = []
    for data in _all_gather_bytes(mine, group):
        theirs = load(data)
        header = json.loads(theirs.pop(_JSON).numpy().tobytes())
        points = {name: (rows, channels) for name, (rows, channels) in header["points"].items()}
        arrays = [theirs[str(i)].numpy() for i in range(header["arrays"])]
        result.append((restore(header, arrays), points))
    return result


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensor of each rank, each on its own device."""
    device = _device(group)
    own = tensor.to(device).contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.to(tensor.device) for part in parts]


def _all_gather_bytes(data: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    sizes = [int(t) for t in _all_gather(torch.tensor([len(data)]), group)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = _all_gather(padded, group)
    return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the backend moves tensors: NCCL only between GPUs."""
    nccl = "nccl" in str(dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
