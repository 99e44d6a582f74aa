"""Whole diffusers pipelines for the command line: load one, draw with it from a given noise, save it quantized."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_fx import strict_json
from pq_fx.errors import ConfigError, PipelineError, PQError
from pq_fx.storage import atomic_folder

INDEX_FILE = "model_index.json"
# What a data-free method traces the model with and measures its errors on.
PROMPTS = (
    "a photo of a cat on a wooden chair by the window",
    "a mountain lake at sunrise, fog over the water",
    "a street market at night, neon signs, people with umbrellas",
    'a poster with the word "hello" in large red letters',
)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """One prompt a line; empty lines are left out. Raises PipelineError where there is none."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"the prompts {file} cannot be read: {error}; expected a text file, a prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PipelineError(f"{file} holds no prompt; expected one a line")
    return prompts


def first_prompts(prompts: Sequence[str], count: int | None) -> list[str]:
    """The first `count` prompts (None: all). Raises PipelineError where there are fewer."""
    if count is not None and count > len(prompts):
        raise PipelineError(f"--num-prompts {count}, but there are {len(prompts)} prompts")
    return list(prompts[:count])


def check_folder(folder: str | os.PathLike[str], component: str | None = None) -> Path:
    """The folder of a saved pipeline, which has `component`. Raises PipelineError; nothing is loaded."""
    path = Path(folder)
    if not path.is_dir():
        raise PipelineError(
            f"{path} is not a folder. Expected a pipeline on this machine, as pipe.save_pretrained writes it; "
            "`hf download REPO --local-dir DIR` fetches one"
        )
    try:
        parts = strict_json.read(path / INDEX_FILE)
    except FileNotFoundError as error:
        hint = ""
        if (path / "config.json").is_file():
            hint = " It holds a single model; give the pipeline's folder above it."
        raise PipelineError(
            f"{path} has no {INDEX_FILE}; expected a diffusers pipeline, as pipe.save_pretrained writes it.{hint}"
        ) from error
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path / INDEX_FILE} cannot be read: {error}") from error
    names = [n for n, v in parts.items() if isinstance(v, list) and v[0] is not None]
    if component is not None and component not in names:
        raise PipelineError(
            f"the pipeline in {path} has no component {component!r}; it has {', '.join(names)}"
        )
    return path


def check_float(folder: Path) -> None:
    """Raise PipelineError where a component's folder names a quantization; nothing is loaded."""
    file = folder / "config.json"
    try:
        plain = strict_json.read(file)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise PipelineError(f"{file} cannot be read: {error}") from error
    found = plain.get("quantization_config") if isinstance(plain, dict) else None
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise PipelineError(
            f"{folder} is quantized already ({method}); expected the float model that it was made from"
        )


def load(
    folder: str | os.PathLike[str], dtype: torch.dtype, device: str, offload: bool = False
) -> Any:
    """The pipeline of a folder, float or quantized, on `device`, without progress bars.

    With `offload` its models are on the CPU, and each goes to `device` while it runs.

    Raises:
        PipelineError: diffusers cannot load it, or is too old to load it in `dtype`.
        CheckpointError: a quantized model in it is damaged.
    """
    import diffusers

    path = check_folder(folder)
    diffusers.utils.logging.disable_progress_bar()
    if diffusers.utils.is_transformers_available():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except PQError:
        raise
    except Exception as error:  # whatever a damaged folder makes of diffusers and transformers
        raise PipelineError(
            f"diffusers cannot load {path}: {type(error).__name__}: {error}"
        ) from error
    found = {str(p.dtype) for p in pipe.components.values() if isinstance(p, nn.Module)}
    if str(dtype) not in found:
        raise PipelineError(
            f"asked for {dtype}, diffusers {diffusers.__version__} loaded {', '.join(sorted(found))}; upgrade diffusers"
        )
    pipe.set_progress_bar_config(disable=True)
    if not offload:
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn. Picture i starts from ``torch.Generator().manual_seed(seed + i)``, on any device.

    Attributes:
        steps: of the scheduler; None = the pipeline's default.
        height, width: pixels; None = the pipeline's default.
        seed: of the first picture's noise.
        arguments: further arguments of the pipeline's call.
    """

    steps: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def of_call(self, pipe: Any) -> dict[str, Any]:
        """Arguments of each call of `pipe`. Raises PipelineError where its call does not take them."""
        known = inspect.signature(type(pipe).__call__).parameters
        wanted: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
        }
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if "use_resolution_binning" in known and {"height", "width"} & set(wanted):
            wanted["use_resolution_binning"] = False  # the size that was asked for
        wanted |= self.arguments
        if unknown := [n for n in ("prompt", "generator", *wanted) if n not in known]:
            raise PipelineError(
                f"{type(pipe).__name__} does not take {', '.join(unknown)}; it takes {', '.join(list(known)[1:])}"
            )
        if clash := sorted({"prompt", "generator", "output_type"} & set(self.arguments)):
            raise PipelineError(f"--call cannot set {', '.join(clash)}: this command does")
        return wanted

    def run(self, pipe: Any, prompt: str, number: int) -> None:
        """Draw picture `number` as far as its latents, for calibration."""
        self._call(pipe, prompt, number, "latent")

    def draw(self, pipe: Any, prompt: str, number: int) -> Tensor:
        """Picture `number`, fp32 [frames, 3, height, width] in 0..1 on the CPU; an image is one frame."""
        made = torch.as_tensor(self._call(pipe, prompt, number, "np")[0])
        if made.ndim not in (4, 5) or made.shape[-1] != 3:
            raise PipelineError(
                f"{type(pipe).__name__} gave {list(made.shape)}; expected images [1, height, width, 3] or a video"
            )
        return made.flatten(0, -4).movedim(-1, 1).float().clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "seed": self.seed,
            "arguments": dict(self.arguments),
        }

    def _call(self, pipe: Any, prompt: str, number: int, output: str) -> Any:
        known = inspect.signature(type(pipe).__call__).parameters
        arguments = self.of_call(pipe)
        if "output_type" in known:
            arguments["output_type"] = output
        generator = torch.Generator().manual_seed(self.seed + number)
        try:
            return pipe(prompt=prompt, generator=generator, return_dict=False, **arguments)
        except (ValueError, TypeError, IndexError) as error:
            if isinstance(error, PQError):
                raise
            raise PipelineError(
                f"{type(pipe).__name__} failed on the prompt {prompt!r}: {type(error).__name__}: {error}"
            ) from error


def parse_arguments(pairs: list[str]) -> dict[str, Any]:
    """``["guidance_scale=3.5", "negative_prompt=blurry"]`` -> a dict; values are JSON, or else text."""
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"--call {pair!r}; expected NAME=VALUE, e.g. --call guidance_scale=3.5"
            )
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def check_out(
    out: str | os.PathLike[str], overwrite: bool, source: Path, mark: str = INDEX_FILE
) -> None:
    """Raise PipelineError where writing a folder would damage something.

    Refused are the source, a folder that is there without `overwrite`, and one that does not hold the file `mark`,
    which shows that it was written by the same command.
    """
    path, read = Path(out).resolve(), source.resolve()
    if path == read or path in read.parents or read in path.parents:
        raise PipelineError(
            f"--out {path} and the model {read} overlap; write to a folder of its own"
        )
    check_writable(path)
    if path.exists() and not path.is_dir():
        raise PipelineError(f"--out {path} is a file; expected a folder or a name that is free")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise PipelineError(
            f"--out {path} is there already; give another, or --overwrite to replace it"
        )
    if not (path / mark).is_file():
        raise PipelineError(
            f"--out {path} holds no {mark}, so --overwrite would delete something else; "
            "give another folder"
        )


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise PipelineError where nothing can be written at `path`, before hours of work end there."""
    near = Path(path).resolve().parent
    while not near.exists():
        near = near.parent
    if not (near.is_dir() and os.access(near, os.W_OK)):
        raise PipelineError(f"{path} cannot be written: {near} is no folder that you may write to")


@contextmanager
def new_folder(
    out: str | os.PathLike[str], overwrite: bool, source: Path, mark: str = INDEX_FILE
) -> Iterator[Path]:
    """A folder to fill that becomes `out` when it is whole; `check_out` is asked again first."""
    with atomic_folder(out, lambda _: check_out(out, overwrite, source, mark)) as folder:
        yield folder
