"""Seeded damage to files: a named error or the very same model; bench/robustness.py does a thousand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import robust_mutations
import toy
from robust_crafted import CRAFTED
from robust_damage import RAW

import pq_fx
from pq_fx import checkpoint, checkpoint_config, checkpoint_files, statistics_file
from pq_fx.errors import CheckpointError


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


def test_a_quantizer_that_was_struck_out_with_the_checksum_repaired(tmp_path: Path) -> None:
    """Mutation 247 of seed 1: `k` shares its quantizer with `q`, so that nothing else misses it."""
    model = toy.quantized(toy.toy())
    pq_fx.save(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    own = config["quantization_config"]
    own["layers"]["blocks.0.k"]["input_quantizer"] = None
    own[checkpoint_config.CHECKSUM] = checkpoint_config.checksum(config)
    file.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.k has .*None.*the report beside it says"
    ):
        pq_fx.load(tmp_path / "m", toy.toy())
