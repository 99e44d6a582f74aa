"""``pq-fx inspect``: see `pq_fx.inspection`. Finds the model, makes its inputs and prints the result."""

from __future__ import annotations

import argparse
import json

from pq_fx.cli.common import add_command, positive, printed


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "inspect",
        "Say what quantizing a model would do. Needs no weights: shows which linears become 4 bits, their regions, "
        "where permutations go, shares of FLOPs and parameters, memory, and what is left alone and why.",
        _inspect,
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers or transformers class name, a local folder with config.json (or a pipeline's "
        "model_index.json), or module:function returning (model, arguments)",
    )
    command.add_argument(
        "--config",
        metavar="FILE|JSON",
        help="the class's configuration, a file or a JSON object; what it lacks keeps the class's default",
    )
    command.add_argument(
        "--preset", default="w4a4-int4", help="quantization settings: a preset or a format"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--real",
        action="store_true",
        help="run the model of module:function itself, for one that reads values on the host",
    )
    sizes = command.add_argument_group("inputs that are made for MODEL, in tokens")
    sizes.add_argument("--batch", type=positive, default=1, metavar="N")
    sizes.add_argument("--height", type=positive, default=64, metavar="N", help="rows of patches")
    sizes.add_argument("--width", type=positive, default=64, metavar="N", help="columns of patches")
    sizes.add_argument("--frames", type=positive, default=1, metavar="N", help="of a video")
    sizes.add_argument("--text", type=positive, default=256, metavar="N", help="text tokens")


def _inspect(arguments: argparse.Namespace) -> None:
    import pq_fx
    from pq_fx.example_inputs import InputSizes
    from pq_fx.model_source import find_model

    config = pq_fx.QuantConfig.of(arguments.preset)  # a wrong name fails before a model is built
    sizes = InputSizes(
        arguments.batch, arguments.height, arguments.width, arguments.frames, arguments.text
    )
    model, args, kwargs = find_model(arguments.model, arguments.config, sizes)
    found = pq_fx.inspect(model, *args, config=config, real=arguments.real, **kwargs)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        printed(found)
