"""Calibrating a pipeline's model picture by picture, so that a run that was cut off goes on where it was.

The statistics' note, which is saved with them, says which prompts were begun and how many calls belong to whole
pictures. Calls after those belong to a picture that was cut off: it is drawn again, and what is known of it is not
counted a second time. So the result has the same bits as that of a run without interruption.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pq_fx.errors import CalibrationError
from pq_fx.integrations.pipelines import Sampling
from pq_fx.quantizer import Quantizer

_NOTE = "pictures"


def calibrate_pipeline(
    quantizer: Quantizer,
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    file: str | os.PathLike[str] | None = None,
) -> None:
    """Draw a picture of each prompt that the quantizer's statistics do not hold yet.

    Args:
        quantizer: of a model of `pipe`.
        pipe: a diffusers pipeline.
        prompts: a picture each; those of an earlier run first.
        sampling: how they are drawn.
        file: saves the statistics each minute, at an interruption and at the end.

    Raises:
        CalibrationError: what the statistics hold was drawn from other prompts or in another way.
        PipelineError: the pipeline does not take the arguments, or fails.
    """
    statistics = quantizer.statistics()
    found = statistics.note.get(_NOTE)
    state = found if isinstance(found, dict) else {}
    how, begun = sampling.to_dict(), list(state.get("prompts", []))
    if quantizer.calls and state.get("sampling") != how:
        before = state.get("sampling") or "code of your own"
        raise CalibrationError(
            f"the statistics were gathered with {before}, this run asks for {how}; start a new file, or convert from "
            "these statistics as they are (on the command line: leave --prompts out)"
        )
    if list(prompts[: len(begun)]) != begun:
        raise CalibrationError(
            f"the statistics were gathered with {len(begun)} prompts that this run does not begin with; start a new "
            "file, or convert from these statistics as they are (on the command line: leave --prompts out)"
        )
    drawn, whole = int(state.get("drawn", 0)), int(state.get("calls", 0))
    if drawn == len(prompts):
        return
    with quantizer.calibrate(skip=quantizer.calls - whole, autosave=file, autosave_seconds=60):
        for number in range(drawn, len(prompts)):
            state = {"sampling": how, "prompts": list(prompts[: number + 1]), "drawn": number}
            statistics.note[_NOTE] = state | {"calls": whole}
            sampling.run(pipe, prompts[number], number)
            each, whole = quantizer.calls - whole, quantizer.calls
            statistics.note[_NOTE] = state | {"drawn": number + 1, "calls": whole}
            quantizer.expect(whole + each * (len(prompts) - number - 1))
