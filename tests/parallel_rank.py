"""One of the processes that torchrun starts: `parallel_rank.py HOW FOLDER DEVICE`, HOW data, ulysses or ring.

FOLDER holds a quantized FLUX pipeline. The first process writes FOLDER/HOW.safetensors: "data" draws a picture of each
prompt, each process every second one; the others run the transformer once, its tokens spread over the processes, and
once more with compiled blocks ("compiled"; on a CPU up to the lowered graphs, for C++ takes its time, and by Inductor
where HOW ends with "-inductor").
DEVICE: cpu (gloo between the processes) or cuda (NCCL, a GPU for each). A ring needs attention that gives the
log-sum-exp: on a GPU diffusers calls PyTorch's flash attention, which computes in 16 bits; "ring-cpu" puts the CPU's
own in its place, which diffusers has no name for.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pipelines
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, DiffusionPipeline, FluxTransformer2DModel
from diffusers.models import attention_dispatch
from safetensors.torch import save_file

import pq_fx  # teaches diffusers the format
from pq_fx.passes import _torch

how, folder, kind = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
way, _, variant = how.partition("-")
dtype = torch.bfloat16 if (way, kind) == ("ring", "cuda") else torch.float32
backend = {"cpu": "gloo", "cuda": "nccl"}[kind]
dist.init_process_group(backend, timeout=timedelta(seconds=240))
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device(kind, rank if kind == "cuda" else None)
if kind == "cuda":
    torch.cuda.set_device(device)


def flash_on_cpu(
    ctx: object,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: object,
    **__: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, tokens, heads, head_dim] each -> the output alike, and the log-sum-exp [batch, tokens, heads]."""
    heads_first = [t.transpose(1, 2) for t in (query, key, value)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    return out.transpose(1, 2), lse.transpose(1, 2)


def pictures() -> dict[str, torch.Tensor]:
    """ "made": [prompts, side, side, 3], drawn by all processes."""
    pipe = pipelines.aligned(DiffusionPipeline.from_pretrained(folder).to(device))
    drawn = torch.zeros(len(pipelines.PROMPTS), pipelines.SIDE, pipelines.SIDE, 3, device=device)
    for number in range(rank, len(pipelines.PROMPTS), world):
        picture = pipelines.call(pipe, pipelines.PROMPTS[number], seed=number)[0]
        drawn[number] = torch.from_numpy(picture).to(device)
    dist.all_reduce(drawn)
    return {"made": drawn}


@torch.no_grad()
def velocity() -> dict[str, torch.Tensor]:
    """The transformer's output, launched and with compiled blocks, every process having seen a part of the tokens."""
    model = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype
    ).to(device)
    if variant == "cpu" or (way, kind) == ("ring", "cuda"):
        model.set_attention_backend("_native_flash")
    if variant == "cpu":
        attention_dispatch._native_flash_attention_forward_op = flash_on_cpu
    degrees = {"ring_degree": 1, "ulysses_degree": 1} | {f"{way}_degree": world}
    config = ContextParallelConfig(**degrees)
    if kind == "cpu":
        # diffusers takes the accelerator's device and count; here there are none, so both are given.
        torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
        config.mesh = dist.device_mesh.init_device_mesh(
            "cpu", tuple(degrees.values()), mesh_dim_names=("ring", "ulysses")
        )
    seen: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    pq_fx.allow_hooks(model)
    model.enable_parallelism(config=config)
    inputs = {n: value.to(device) for n, value in pipelines.flux_inputs(dtype, text=8).items()}
    (result,) = model(**inputs, return_dict=False)
    assert seen == [16 // world]  # tokens of the picture in one process
    if kind == "cpu" and variant != "inductor":
        _torch.compile_fx = lambda graph, *_, **__: graph.forward  # type: ignore[assignment]
    model.compile_repeated_blocks(backend="permuquant", fullgraph=True)
    (compiled,) = model(**inputs, return_dict=False)
    return {"made": result + 0, "compiled": compiled + 0}  # waits for what is still being gathered


made = pictures() if how == "data" else velocity()
if rank == 0:
    save_file({name: tensor.cpu() for name, tensor in made.items()}, folder / f"{how}.safetensors")
dist.barrier()
dist.destroy_process_group()
