"""Prepare, calibrate, convert, call, save and load on model classes that differ in kind; all of them, and compiled:
`python bench/check_models.py --compile`."""

from __future__ import annotations

import pytest
from check_models import check

# linear attention and convolutions, cross attention over text, a table written through `.data`,
# graph breaks, post-norm, grouped queries, a plain module
KINDS = ("sana", "wan", "cogvideo", "lumina", "bert", "llama", "mlp")


@pytest.mark.parametrize("name", KINDS)
def test_whole_road(name: str) -> None:
    row = check(name)
    assert row["quantized"] >= {"mlp": 2}.get(name, 12)
    assert row["loaded_equal"] and row["error"] < 0.2
