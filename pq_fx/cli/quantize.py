"""``pq-fx quantize``: a float pipeline's folder in, a quantized one's out."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pq_fx.cli.common import (
    add_command,
    add_sampling,
    add_where,
    dtype_of,
    logged,
    printed,
    sampling_of,
)

if TYPE_CHECKING:
    from pq_fx.config import QuantConfig
    from pq_fx.statistics import Statistics


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "quantize",
        "Quantize the transformer of a diffusers pipeline. Draws with your prompts to calibrate, converts, prints what "
        "became of each layer and saves the whole pipeline: after `import pq_fx`, "
        "DiffusionPipeline.from_pretrained(DIR) loads it.",
        _quantize,
    )
    command.add_argument(
        "model", metavar="MODEL_DIR", help="folder of the pipeline, with model_index.json"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace the pipeline in DIR")
    what = command.add_argument_group("what to quantize and how")
    what.add_argument(
        "--preset",
        default="w4a4",
        help="w4a4, w4a8 (better on Hopper and Ada), w4a4-nvfp4, w3a3-int3, ... or a format",
    )
    what.add_argument(
        "--method",
        help="rtn, smoothquant, svdquant, convrot, permuquant, permuquant-h (default) or best",
    )
    what.add_argument(
        "--settings",
        metavar="FILE|JSON",
        help='further fields of QuantConfig, e.g. \'{"modules_to_not_convert": ["proj_out"]}\'',
    )
    what.add_argument(
        "--component",
        default="transformer",
        metavar="NAME",
        help="the part of the pipeline to quantize",
    )
    drawn = command.add_argument_group("calibration")
    drawn.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, a picture each. rtn and convrot fit nothing to data and take four of their own instead, "
        "to trace the model and to measure errors",
    )
    drawn.add_argument(
        "--statistics",
        metavar="FILE",
        help="where to keep what calibration gathers. A run that was interrupted goes on from it; with other settings "
        "it is not gathered again",
    )
    add_sampling(drawn)
    add_where(command)


def _quantize(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pq_fx.integrations import pipelines
    from pq_fx.integrations.pipeline_calibration import calibrate_pipeline
    from pq_fx.quantizer import prepare

    # Everything that can be wrong with the arguments shows before anything is loaded.
    config = _config(arguments)
    folder = pipelines.check_folder(arguments.model, arguments.component)
    pipelines.check_float(folder / arguments.component)
    pipelines.check_out(arguments.out, arguments.overwrite, folder)
    gathered = _gathered(arguments)
    prompts = _prompts(arguments, config, gathered)
    dtype, sampling = dtype_of(arguments), sampling_of(arguments)

    console = Console(stderr=True)
    console.print(f"loading {folder}", highlight=False)
    pipe = pipelines.load(folder, dtype, arguments.device, arguments.offload)
    sampling.of_call(pipe)
    model = getattr(pipe, arguments.component)
    quantizer = prepare(model, config, statistics=gathered)
    if prompts:
        with logged():
            try:
                calibrate_pipeline(quantizer, pipe, prompts, sampling, arguments.statistics)
            except KeyboardInterrupt:
                if quantizer.calls:
                    kept = "lost; with --statistics FILE it is kept, and the same command goes on from it"
                    if arguments.statistics:
                        kept = f"in {arguments.statistics}; the same command goes on from it"
                    print(f"pq-fx: what was gathered is {kept}", file=sys.stderr)
                raise
    if arguments.offload:  # it is alone on the device now
        pipe.remove_all_hooks()
        model.to(arguments.device)
    report = quantizer.convert()
    with pipelines.new_folder(arguments.out, arguments.overwrite, folder) as fresh:
        pipe.save_pretrained(fresh)
    printed(report)
    console.print(f"saved: {arguments.out}", highlight=False)


def _config(arguments: argparse.Namespace) -> QuantConfig:
    from pq_fx.config import QuantConfig
    from pq_fx.model_source import read_config

    plain = QuantConfig.of(arguments.preset).to_dict()
    if arguments.settings is not None:
        plain |= read_config(arguments.settings, "--settings")
    if arguments.method is not None:
        plain["method"] = arguments.method
    return QuantConfig.from_dict(plain)


def _gathered(arguments: argparse.Namespace) -> Statistics | None:
    """The statistics of an earlier run, or None."""
    from pathlib import Path

    from pq_fx.integrations.pipelines import check_writable
    from pq_fx.statistics_file import load_statistics

    if arguments.statistics is None:
        return None
    if not Path(arguments.statistics).exists():
        check_writable(arguments.statistics)
        return None
    return load_statistics(arguments.statistics)


def _prompts(
    arguments: argparse.Namespace, config: QuantConfig, gathered: Statistics | None
) -> list[str]:
    """What to draw; nothing where the statistics are taken as they are."""
    from pq_fx.errors import PipelineError
    from pq_fx.integrations import pipelines

    if arguments.prompts is not None:
        prompts = pipelines.read_prompts(arguments.prompts)
    elif gathered is not None:
        return []
    elif config.recipe.fits_data:
        raise PipelineError(
            f"method {config.method!r} is fitted to what the model computes: give --prompts FILE, a text file with a "
            "prompt a line (16 to 32 like those you will draw). The methods rtn and convrot need none"
        )
    else:
        prompts = list(pipelines.PROMPTS)
    return pipelines.first_prompts(prompts, arguments.num_prompts)
