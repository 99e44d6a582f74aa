"""One of two processes that calibrate: `calibrating_rank.py RANK FOLDER DEVICE`.

Writes FOLDER/RANK.safetensors and RANK.txt. DEVICE: cpu (gloo between the processes) or cuda (NCCL, a GPU for each).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small_calls import block, calls, gathered

from pq_fx.errors import CalibrationError

rank, folder, kind = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
device = torch.device(kind, rank if kind == "cuda" else None)
if kind == "cuda":
    torch.cuda.set_device(device)
backend = {"cpu": "gloo", "cuda": "nccl"}[kind]
dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)


def own(count: int, first: int = 0) -> list[torch.Tensor]:
    """Calls on this process's device."""
    return [x.to(device) for x in calls(count, first=first)]


# The ranks see different calls, and not equally many.
quantizer = gathered(block().to(device), own(3) if rank == 0 else own(2, first=3))
quantizer.all_reduce()
quantizer.save_statistics(folder / f"{rank}.safetensors")
messages = []
for other in (
    quantizer,  # added up already: both hold all calls
    gathered(block(width=32 + 16 * rank).to(device), own(1)),
    gathered(block().to(device), own(1), calibration_rows=24 + rank),
):
    try:
        other.all_reduce()
    except CalibrationError as error:
        messages.append(str(error))
(folder / f"{rank}.txt").write_text("\n".join(messages))
dist.destroy_process_group()
