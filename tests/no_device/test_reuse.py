"""docs/reuse.md: its code runs, block after block; and what its pass of one's own must not match."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "reuse.md"


def run_page() -> dict:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    scope: dict = {"__name__": "reuse"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    return scope


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_page()
    assert (tmp_path / "block-w4a4.pt2").exists()

    # The page's own pass leaves a product alone that somebody else reads.
    class Shared(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            product = x * y
            return (x + product) * product

    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    gm = torch.export.export(Shared(), inputs, strict=False).module(check_guards=False)
    assert scope["fuse_gate"](gm.graph) == 0
