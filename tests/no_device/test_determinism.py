"""Equal seeds give equal bytes, and a changed seed changes the sampled rows and what is chosen by them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import toy
from toy import CONFIG, bytes_of, calibrated, quantized

import pq_fx


def saved_bytes(folder: Path, config: pq_fx.QuantConfig) -> dict[str, bytes]:
    model = quantized(toy.toy(blocks=1), config)
    pq_fx.save(model, folder)
    skip = "quantization_report.json"  # holds seconds
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != skip}


@pytest.mark.parametrize("method", ["permuquant-h", "best"])
def test_equal_seeds_give_equal_files(method: str, tmp_path: Path) -> None:
    config = pq_fx.QuantConfig("int3", group_size=16, method=method, calibration_rows=20)
    first, second = (saved_bytes(tmp_path / str(i), config) for i in range(2))
    assert first == second


def test_a_changed_seed_changes_the_sampled_rows_only() -> None:
    configs = [dataclasses.replace(CONFIG, calibration_rows=8, seed=s) for s in (0, 1)]
    one, other = (calibrated(toy.toy(), c).statistics().moments for c in configs)
    for name in one:
        for field in ("count", "calls", "sum_squares", "amax"):
            assert torch.equal(getattr(one[name], field), getattr(other[name], field))
        assert not torch.equal(one[name].keys, other[name].keys)
        assert not torch.equal(one[name].rows, other[name].rows)


def test_a_changed_seed_does_not_reach_what_no_sample_decides() -> None:
    """Rounding to nearest looks at no row, so its weights are the same bytes; a sort fits its rows."""
    for method, equal in (("rtn", True), ("permuquant", False)):
        settings = {"group_size": 16, "method": method, "calibration_rows": 8}
        one, other = (
            bytes_of(quantized(toy.toy(), pq_fx.QuantConfig("int4", seed=seed, **settings)))
            for seed in (0, 1)
        )
        assert (one == other) is equal
