"""What a report page is about: a folder's report and the names around it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pq_fx.checkpoint_config import REPORT_FILE, read_report
from pq_fx.errors import CheckpointError
from pq_fx.report import Report


@dataclass(frozen=True)
class Subject:
    """A quantized model: its report, its class, and the folder that was named (its last part)."""

    report: Report
    model_class: str
    folder: str


def find_subject(folder: str | os.PathLike[str], component: str | None = None) -> Subject:
    """The quantized model of a folder: of a model, or of a pipeline that holds one.

    Raises:
        CheckpointError: there is no report, or there are several and `component` names none of them.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; expected one that pq-fx quantize wrote")
    if component is None and (path / REPORT_FILE).is_file():
        return _subject(path, path)
    found = sorted(f.parent.name for f in path.glob(f"*/{REPORT_FILE}"))
    if component is None and len(found) == 1:
        component = found[0]
    if component not in found:
        which = f"reports of {', '.join(found)}; choose one by --component" if found else "none"
        raise CheckpointError(
            f"expected a {REPORT_FILE} in {path} or in one folder in it, found {which}"
        )
    return _subject(path, path / str(component))


def _subject(named: Path, model: Path) -> Subject:
    report = read_report(model)
    assert report is not None
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        name = str(config.get("_class_name") or (config.get("architectures") or ["model"])[0])
    except (OSError, ValueError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{model / 'config.json'} cannot be read: {error}") from error
    return Subject(report, name, named.resolve().name)
