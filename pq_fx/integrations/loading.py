"""What loading a checkpoint has in common where a library builds the model and reads the files itself.

library                              here
opens a folder                       read_folder     files, settings and record checked
builds the model on the meta device  put_empty       quantized linears in place of float ones, without data
fills it, tensor by tensor
hands it over                        finish          nothing left empty; report, record, what calibration saw
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx import applied, checkpoint_config, checkpoint_model, seen
from pq_fx.checkpoint_files import check_weights, read_tensors
from pq_fx.checkpoint_plan import Plan
from pq_fx.errors import CheckpointError
from pq_fx.modules import QuantLinear
from pq_fx.pointwise import linearize
from pq_fx.report import Report


def read_folder(checkpoint_files: Sequence[str]) -> tuple[applied.Applied, Report | None]:
    """The record of folds and the report beside the weight files that a library is about to read.

    Raises:
        CheckpointError: config.json or a file is damaged, or a file is none that config.json lists.
    """
    folder = Path(checkpoint_files[0]).parent
    config = checkpoint_config.read_config(folder)
    files = check_weights(folder, config.get("weights"))
    # Libraries go by the index, which is not ours to trust: it may name files that were not checked.
    if foreign := sorted({Path(f).name for f in checkpoint_files} - {f.name for f in files}):
        raise CheckpointError(
            f"{', '.join(foreign)} would be read, but config.json in {folder} does not list it: the index was "
            "changed, or a variant was asked for that pq_fx did not save"
        )
    with torch.device("cpu"):  # transformers has the meta device switched on here
        record = applied.from_tensors(dict(read_tensors(files, applied.is_record)))
    report = checkpoint_config.read_report(folder)
    Plan.from_dict(config).check_report(report)
    return record, report


def put_empty(model: nn.Module, plan: Plan, record: applied.Applied) -> dict[str, QuantLinear]:
    """Put the plan's quantized linears on the meta device into a float model; returns them by name.

    Raises:
        CheckpointError: plan or record do not fit the model.
    """
    linearize(model, plan.pointwise_names())
    plan.check_model(model)
    applied.check(record, checkpoint_model.float_shapes(model, plan))
    expected = plan.expected()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def empty(name: str, fqn: str) -> Tensor:
        kind, shape = expected[name]
        return torch.empty(shape, dtype=kind or dtype, device="meta")

    linears = checkpoint_model.build_linears(plan, empty)
    checkpoint_model.put_linears(model, checkpoint_model.places_for(model, plan), linears)
    return linears


def finish(
    model: nn.Module, stored: Mapping[str, Any], record: applied.Applied, report: Report | None
) -> None:
    """Leave on a filled model what a conversion leaves; `stored` is the checkpoint's `quantization_config`.

    Raises:
        CheckpointError: a tensor has no data, or `stored` names modules that the model has not.
    """
    empty = [name for name, value in checkpoint_model.state_of(model).items() if value.is_meta]
    if empty:
        kept = _offloaded(model)
        empty = [name for name in empty if name not in kept]
    if empty:
        raise CheckpointError(f"the checkpoint did not fill {', '.join(empty[:5])}")
    if report is not None:
        report.attach(model)
    applied.note(model, record)
    seen.attach(model, *seen.from_config(model, stored))


def _offloaded(model: nn.Module) -> set[str]:
    """Names of tensors that accelerate's hooks keep on the CPU and bring for each call; in the model they show as meta.

    A device map over a GPU and the CPU puts such hooks before a library lets the quantizer finish.
    """
    names = set()
    for path, module in model.named_modules(remove_duplicate=False):
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            kept = getattr(one, "weights_map", None)
            if kept is not None:
                held = (n for n in module.state_dict(keep_vars=True) if n in kept)
                names |= {f"{path}.{n}" if path else n for n in held if not kept[n].is_meta}
    return names
