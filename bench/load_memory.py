"""Peak memory of loading a quantized model through diffusers, as a ratio to its file.

Builds a FLUX transformer of full width with a few blocks, packs random weights into it (no float model of the whole is
ever made), saves it, and loads it in a fresh process, once by `from_pretrained` and once by `pq_fx.load`. Peak is the
growth of the process's resident set (VmHWM) from before the load until every tensor has been read. Linux only.

    python bench/load_memory.py [--blocks 4] [--out bench/results/load_memory.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import pq_fx
from pq_fx.kernels.formats import Format
from pq_fx.modules import ActivationQuantizer, QuantLinear

CHILD = """
import json, sys, pathlib, torch, pq_fx, diffusers
from diffusers import FluxTransformer2DModel as Model
folder, way = sys.argv[1:]
status = lambda key: next(
    int(line.split()[1]) * 1024
    for line in open("/proc/self/status") if line.startswith(key)
)
with torch.device("meta"):
    Model(num_layers=1, num_single_layers=1)  # imports and first uses are not the model's
torch.ones(1).sum()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = status("VmRSS")
if way == "from_pretrained":
    model = Model.from_pretrained(folder)
else:
    with torch.device("meta"):
        empty = Model.from_config(Model.load_config(folder))
    model = pq_fx.load(folder, empty)
for tensor in model.state_dict().values():  # read a byte of each page, without a copy
    if tensor.dim():
        tensor.view(torch.uint8).numpy().ravel()[::1024].sum()
print(json.dumps({"peak": status("VmHWM") - before, "resident": status("VmRSS") - before}))
"""


def build(blocks: int) -> nn.Module:
    """A quantized FLUX transformer with `blocks` double and as many single blocks, random weights, bf16 float parts."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=blocks, num_single_layers=blocks)
    fmt = Format.parse("int4:64:bf16")
    inside = [n for n, m in model.named_modules() if type(m) is nn.Linear and "blocks." in n]
    for name in inside:
        old = model.get_submodule(name)
        quantizer = ActivationQuantizer(
            old.in_features, fmt.key, 64, torch.randperm(old.in_features).int()
        )
        packed = torch.randint(0, 256, (old.out_features, fmt.packed_bytes(old.in_features)))
        scale = 0.01 + torch.rand(old.out_features, fmt.groups(old.in_features))  # none is 0
        new = QuantLinear(
            old.in_features,
            old.out_features,
            fmt.key,
            packed.to(torch.uint8),
            scale.to(fmt.scale_dtype),
            None,
            torch.zeros(old.out_features, dtype=torch.bfloat16),
            quantizer,
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            value = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
            setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
    return model.eval()


def measure(folder: Path) -> dict[str, Any]:
    """Load a saved model both ways, each in a process of its own."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    result: dict[str, Any] = {"file_bytes": size}
    for way in ("from_pretrained", "load"):
        command = [sys.executable, "-c", CHILD, str(folder), way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        result[way] = found | {"peak_to_file": round(found["peak"] / size, 3)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build(arguments.blocks)
        float_bytes = 2 * sum(
            m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)
        )
        pq_fx.save(model, folder)
        del model
        result = measure(Path(folder)) | {"bf16_bytes_of_the_linears": float_bytes}
    result |= {
        "blocks": arguments.blocks,
        "device": platform.machine() + " CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
