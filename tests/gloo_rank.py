"""One of two processes that calibrate: `gloo_rank.py RANK FOLDER`. Writes FOLDER/RANK.safetensors and RANK.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from small_calls import block, calls, gathered

from pq_fx.errors import CalibrationError

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
# The ranks see different calls, and not equally many.
quantizer = gathered(block(), calls(3) if rank == 0 else calls(2, first=3))
quantizer.all_reduce()
quantizer.save_statistics(folder / f"{rank}.safetensors")
messages = []
for other in (
    quantizer,  # added up already: both hold all calls
    gathered(block(width=32 + 16 * rank), calls(1)),
    gathered(block(), calls(1), calibration_rows=24 + rank),
):
    try:
        other.all_reduce()
    except CalibrationError as error:
        messages.append(str(error))
(folder / f"{rank}.txt").write_text("\n".join(messages))
dist.destroy_process_group()
