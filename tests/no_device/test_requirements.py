"""Unsupported versions fail at import, with one sentence that says what to install."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from pq_fx.errors import PQError, UnsupportedVersionError
from pq_fx.requirements import SUPPORTED, check


def installed(**versions: str):
    def find(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return find


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.10.0"),
        ("torch", "2.15.0+cu130"),
        ("torch", "3.0.0"),
        ("torch", "1.99"),
        ("triton", "3.5.1"),
        ("diffusers", "0.35.2"),
        ("diffusers", "unknown"),
    ],
)
def test_an_unsupported_version(name: str, version: str) -> None:
    with pytest.raises(UnsupportedVersionError) as error:
        check(installed(**{name: version}))
    text = str(error.value)
    assert text.startswith(f"pq_fx works with {name} >= ")
    assert f"{version} is installed" in text and f"pip install '{name}>=" in text
    assert isinstance(error.value, ImportError) and isinstance(error.value, PQError)
    assert "\n" not in text and text.count(". ") == 0


def test_supported_and_absent_ones() -> None:
    check(installed())
    check(installed(torch="2.11.0+cu130", triton="3.9.0", diffusers="0.41.0"))
    check(installed(torch="2.14.1+cu130"))
    check(installed(torch="2.13.1a0+git1234", diffusers="0.42.0.dev0"))
    check()


def test_pyproject_says_the_same(request: pytest.FixtureRequest) -> None:
    text = (request.config.rootpath / "pyproject.toml").read_text()
    (low, high), diffusers = SUPPORTED["torch"], SUPPORTED["diffusers"][0]
    assert high is not None
    assert f'"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}"' in text
    assert f'"diffusers>={diffusers[0]}.{diffusers[1]}"' in text


def test_the_import_fails_before_anything_else() -> None:
    script = """
import importlib.metadata as m
real = m.version
m.version = lambda name: "2.10.0" if name == "torch" else real(name)
try:
    import pq_fx
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        "UnsupportedVersionError pq_fx works with torch >= 2.11 and <2.15"
    )
