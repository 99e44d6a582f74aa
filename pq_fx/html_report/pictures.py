"""The report page's pictures of two pipelines, embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

from pq_fx.comparison import Comparison
from pq_fx.errors import PipelineError

_LARGEST = 768  # pixels of a side; larger pictures are scaled down, so that the page stays a page


def pictures(comparison: Comparison, folder: Path) -> Iterator[str]:
    """The section's HTML. Raises PipelineError where a picture cannot be read."""
    names = escape(comparison.name_a), escape(comparison.name_b)
    yield "<h2>Pictures from equal noise</h2>"
    yield (
        f'<p class="note">Left {names[0]}, right {names[1]}; only the model differs. Mean over '
        f"{len(comparison.pairs)} pictures: PSNR {comparison.mean_psnr_db:.2f} dB, structural distance "
        f"(1 &minus; multi-scale SSIM) {comparison.mean_structural_distance:.4f}.</p>"
    )
    yield '<div class="pictures">'
    for pair in comparison.pairs:
        (a, small), (b, _) = _embedded(folder / pair.a), _embedded(folder / pair.b)
        yield (
            f'<figure class="{"small" if small else ""}"><figcaption>{escape(pair.prompt)} <span class="note">seed '
            f"{pair.seed} &middot; PSNR {pair.psnr_db:.2f} dB &middot; structural distance "
            f"{pair.structural_distance:.4f}</span></figcaption>"
        )
        yield f'<div class="both"><div><img alt="{names[0]}" src="{a}"><span class="which">{names[0]}</span></div>'
        yield f'<div><img alt="{names[1]}" src="{b}"><span class="which">{names[1]}</span></div></div></figure>'
    yield "</div>"


def _embedded(file: Path) -> tuple[str, bool]:
    """A picture as a data: address, and whether it is so small that its pixels are shown as they are."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise PipelineError(f"the picture {file} cannot be read: {error}") from error
    small, kind = max(picture.size) <= 256, "PNG"
    if max(picture.size) > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST))
    if not small:
        kind = "JPEG"
    memory = io.BytesIO()
    picture.save(memory, kind, quality=92)
    text = base64.b64encode(memory.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}", small
