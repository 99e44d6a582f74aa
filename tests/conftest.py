"""Tests and benches share one table of model classes, bench/models.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with a quantized FLUX transformer, tiny."""
    import pipelines  # diffusers is not for every test

    path = tmp_path_factory.mktemp("flux")
    pipelines.quantized("flux").save_pretrained(path)
    return path
