"""One of the processes that torchrun starts: `parallel_rank.py HOW FOLDER`, HOW data, ulysses or ring.

FOLDER holds a quantized FLUX pipeline. The first process writes FOLDER/HOW.safetensors: "data" draws a picture of each
prompt, each process every second one; the others run the transformer once, its tokens spread over the processes.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pipelines
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

import pq_fx  # noqa: F401 - teaches diffusers the format

how, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo", timeout=timedelta(seconds=240))
rank, world = dist.get_rank(), dist.get_world_size()


def pictures() -> torch.Tensor:
    """[prompts, side, side, 3], drawn by all processes."""
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(folder))
    drawn = torch.zeros(len(pipelines.PROMPTS), pipelines.SIDE, pipelines.SIDE, 3)
    for number in range(rank, len(pipelines.PROMPTS), world):
        picture = pipelines.call(pipe, pipelines.PROMPTS[number], seed=number)[0]
        drawn[number] = torch.from_numpy(picture)
    dist.all_reduce(drawn)
    return drawn


@torch.no_grad()
def velocity() -> torch.Tensor:
    """The transformer's output, every process having seen a part of the tokens."""
    model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    # diffusers takes the accelerator's device and count; on a CPU there are none, so both are given.
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
    shape = (1, world) if how == "ulysses" else (world, 1)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
    seen: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    model.enable_parallelism(
        config=ContextParallelConfig(ring_degree=shape[0], ulysses_degree=shape[1], mesh=mesh)
    )
    (result,) = model(**pipelines.flux_inputs(text=8), return_dict=False)
    assert seen == [16 // world]  # tokens of the picture in one process
    return result + 0  # waits for what is still being gathered


made = pictures() if how == "data" else velocity()
if rank == 0:
    save_file({"made": made}, folder / f"{how}.safetensors")
dist.barrier()
dist.destroy_process_group()
