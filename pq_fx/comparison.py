"""Pictures of two pipelines from equal noise, side by side on disk, with their distances."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pq_fx import strict_json
from pq_fx.errors import PipelineError
from pq_fx.picture_distance import psnr, structural_distance

FILE = "compare.json"
VERSION = 1


@dataclass(frozen=True)
class Pair:
    """One prompt's two pictures.

    Attributes:
        prompt, seed: what both were drawn from.
        psnr_db: of B against A; infinity where they are equal. Of a video, the mean over its frames.
        structural_distance: 1 - multi-scale SSIM; 0 where they are equal.
        a, b: file names in the comparison's folder; of a video, its middle frame.
    """

    prompt: str
    seed: int
    psnr_db: float
    structural_distance: float
    a: str
    b: str


@dataclass(frozen=True)
class Comparison:
    """All pairs. `name_a` and `name_b` say what was compared, `settings` how it was drawn."""

    name_a: str
    name_b: str
    settings: Mapping[str, Any]
    pairs: tuple[Pair, ...]

    @property
    def mean_psnr_db(self) -> float:
        """Mean over the pairs; infinity when one is equal."""
        return sum(pair.psnr_db for pair in self.pairs) / len(self.pairs)

    @property
    def mean_structural_distance(self) -> float:
        """Mean over the pairs."""
        return sum(pair.structural_distance for pair in self.pairs) / len(self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON. A PSNR of equal pictures is the string "inf"."""
        return {
            "comparison_version": VERSION,
            "a": self.name_a,
            "b": self.name_b,
            "settings": dict(self.settings),
            "mean_psnr_db": _plain(self.mean_psnr_db),
            "mean_structural_distance": self.mean_structural_distance,
            "pairs": [asdict(pair) | {"psnr_db": _plain(pair.psnr_db)} for pair in self.pairs],
        }

    def to_json(self) -> str:
        """`to_dict` as text; equal comparisons give equal bytes."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Comparison:
        """What `compare` wrote into a folder. Raises PipelineError where there is none, or another version."""
        file = Path(folder) / FILE
        try:
            plain = strict_json.read(file)
            if plain["comparison_version"] != VERSION:
                raise PipelineError(
                    f"{file} has version {plain['comparison_version']!r}; this release reads {VERSION}"
                )
            rows = [row | {"psnr_db": float(row["psnr_db"])} for row in plain["pairs"]]
            pairs = tuple(Pair(**row) for row in rows)
            return cls(plain["a"], plain["b"], plain["settings"], pairs)
        except FileNotFoundError as error:
            raise PipelineError(
                f"{folder} holds no {FILE}; expected a folder that `pq-fx compare A B --out DIR` wrote"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(
                f"{file} cannot be read: {type(error).__name__}: {error}"
            ) from error


def compare(
    folder: Path,
    names: tuple[str, str],
    prompts: Sequence[str],
    first_seed: int,
    pictures: tuple[Sequence[Tensor], Sequence[Tensor]],
    settings: Mapping[str, Any],
) -> Comparison:
    """Write pictures and distances into `folder`: 000_a.png, 000_b.png, ..., side_by_side.png and compare.json.

    Args:
        folder: an empty folder.
        names: what A and B are called.
        prompts: one for each picture.
        first_seed: picture i has seed ``first_seed + i``.
        pictures: of A and of B, each fp32 [frames, 3, height, width] in 0..1.
        settings: plain JSON, how they were drawn.

    Raises:
        PipelineError: A and B drew other sizes.
    """
    pairs = []
    for number, (prompt, a, b) in enumerate(zip(prompts, *pictures, strict=True)):
        if a.shape != b.shape:
            raise PipelineError(
                f"A drew {list(a.shape)}, B {list(b.shape)}: expected equal sizes; give --height and --width"
            )
        files = (f"{number:03d}_a.png", f"{number:03d}_b.png")
        for file, picture in zip(files, (a, b), strict=True):
            _image(middle(picture)).save(folder / file)
        distance = float(psnr(a, b).mean()), float(structural_distance(a, b).mean())
        pairs.append(Pair(prompt, first_seed + number, *distance, *files))
    rows = [torch.cat([middle(a), middle(b)], dim=2) for a, b in zip(*pictures, strict=True)]
    _image(torch.cat(rows, dim=1)).save(folder / "side_by_side.png")
    made = Comparison(*names, settings, tuple(pairs))
    (folder / FILE).write_text(made.to_json(), encoding="utf-8")
    return made


def middle(picture: Tensor) -> Tensor:
    """The middle frame [3, height, width] of [frames, 3, height, width]."""
    return picture[len(picture) // 2]


def _image(picture: Tensor) -> Any:
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
