"""JSON files that may be damaged or hostile: read strictly, told apart by a checksum, written one way.

Python's `json` keeps the last of two equal keys, takes NaN, and leaves its own exceptions at deep nesting; here all of
these are a ValueError, and a file that is no regular file (a FIFO would block for ever) or too large an OSError.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

# The largest model class described so far (1,000 linears) takes 0.5 MB.
MAX_BYTES = 64 << 20


def read(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `MAX_BYTES`.
        ValueError: it is no JSON, nests too deeply, or names a key twice.
    """
    size = file.stat().st_size
    if not file.is_file():
        raise OSError("it is not a regular file")
    if size > MAX_BYTES:
        raise OSError(f"it has {size} bytes; a description has at most {MAX_BYTES}")
    return parse(file.read_text(encoding="utf-8"))


def parse(source: str) -> Any:
    """The content of a JSON text; raises ValueError as `read` does."""
    try:
        return json.loads(
            source, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def text(plain: Any) -> str:
    """JSON as it is saved: sorted keys, so that equal data gives equal bytes."""
    return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n"


def digest(plain: Any) -> str:
    """sha256 of JSON data; key order, spaces and line ends do not count."""
    read_back = json.loads(json.dumps(plain))  # keys that are no strings become some, as in a file
    short = json.dumps(read_back, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(short.encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"it names {twice!r} twice")
    return made


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is no JSON number")
