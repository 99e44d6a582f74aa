"""Seeded damage to files: a named error or the very same model; bench/robustness.py does a thousand."""

from __future__ import annotations

from pathlib import Path

import pytest
import robust_mutations
from robust_crafted import CRAFTED
from robust_damage import RAW

from pq_fx import checkpoint, checkpoint_config, checkpoint_files, statistics_file


@pytest.mark.timeout(300)
def test_damaged_files_are_refused_or_read_exactly(tmp_path: Path) -> None:
    result = robust_mutations.run_mutations(100, seed=7, work=tmp_path)
    assert result["found"] == []
    assert result["reads"] == 170 and result["outcomes"]["refused by name"] > 100
    seen = {kind.split(": ")[1] for kind in result["by_kind"]}
    assert len({k.__name__ for k in RAW + CRAFTED} - seen) <= 2


def test_without_checksums_the_damage_would_load(tmp_path: Path, monkeypatch) -> None:
    """The check is not blind: what the checksums refuse are other numbers."""
    monkeypatch.setattr(checkpoint_files, "sha256", lambda _: "x")
    for module in (checkpoint, checkpoint_config):
        monkeypatch.setattr(module, "checksum", lambda _: "x")
    monkeypatch.setattr(statistics_file, "checksum", lambda *_: "x")
    monkeypatch.setattr(robust_mutations.damage, "RAW", (robust_mutations.damage.bit_flip,))
    result = robust_mutations.run_mutations(30, seed=7, work=tmp_path)
    assert result["outcomes"]["other numbers"] >= 3
