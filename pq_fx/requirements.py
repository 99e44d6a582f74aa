"""Versions of other packages that pq_fx is made for, checked when it is imported.

The passes use private names of torch, and loading private tables of diffusers: with a version that they do not fit, an
error far from its cause would be the best case. bench/versions.py runs the tests on each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from pq_fx.errors import UnsupportedVersionError

# Package -> the oldest version that works and the first that is not known to (None: no such version is known).
SUPPORTED: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "torch": ((2, 11), (2, 15)),
    "triton": ((3, 6), None),
    "diffusers": ((0, 41), None),
}


def check(installed: Callable[[str], str] = version) -> None:
    """Raise UnsupportedVersionError for an installed package outside of `SUPPORTED`; absent ones are fine."""
    for name, (oldest, beyond) in SUPPORTED.items():
        try:
            found = installed(name)
        except PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", found)
        known = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        if known < oldest or (beyond is not None and known >= beyond):
            below = "" if beyond is None else f",<{_text(beyond)}"
            raise UnsupportedVersionError(
                f"pq_fx works with {name} >= {_text(oldest)}{below.replace(',', ' and ')}, and {found} is installed: "
                f"pip install '{name}>={_text(oldest)}{below}'"
            )


def _text(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"


check()  # imported first by the package: before anything else can fail
