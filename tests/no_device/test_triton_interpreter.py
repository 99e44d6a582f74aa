"""The Triton kernels in Triton's interpreter on the CPU: byte for byte the reference, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

CHECK = Path(__file__).resolve().parents[2] / "bench" / "check_kernels.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Small checks and a few random shapes, in a process of their own: Triton reads the variable at its import."""
    out = tmp_path_factory.mktemp("interpreter") / "checks.json"
    # The script imports its neighbours, which Python's safe path hides.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, str(CHECK), "--small", "--interpret", "--seed", "7"]
    # Not GPTQ's kernel: test_round_columns.py.
    command += ["--only", "quantize", "linear", "GEMM", "weights"]
    done = subprocess.run(
        [*command, "--random", "6", "--canaries", "--out", str(out)],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["checks"]


def test_random_shapes_between_canaries(result: dict[str, Any]) -> None:
    assert len(result["random_shapes"]) == 7
    assert all(row["tried"] == 6 and row["wrong"] == 0 for row in result["random_shapes"].values())


@pytest.mark.parametrize("where", ["before", "after", "input"])
def test_canaries_see_a_stray_write(where: str) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(CHECK.parent)!r})
import random_shapes as r, torch
from kernel_cases import CheckFailed
def stray(x):
    out = torch.empty((2, 8), dtype=torch.float32, device=x.device)
    if {where!r} == "input":
        x[0] = 1
    else:
        wide = out.as_strided((1,), (1,), out.storage_offset() + (-1 if {where!r} == "before" else 16))
        wide.fill_(0)
    return out
r.launcher = lambda name: stray
try:
    r.guarded_call("cpu")("stray", (torch.zeros(4),))
except CheckFailed as error:
    print(error)
    sys.exit(0)
sys.exit("not caught")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("to an input" if where == "input" else "outside an output") in done.stdout


@pytest.mark.parametrize(
    "op", ["quantize", "act_quantize", "norm_quantize", "linear", "linear_weight_only"]
)
def test_kernel_equals_reference(checks: list[dict[str, Any]], op: str) -> None:
    found = [c for c in checks if c["case"].split()[0] == op]
    assert len(found) >= 6
    assert all(c.get("codes_differ", c.get("relative_error")) <= c["allowed"] for c in found)


def test_codes_are_exact_without_a_norm_or_a_rotation(checks: list[dict[str, Any]]) -> None:
    found = [c for c in checks if c["case"].startswith("quantize ") and c["case"].endswith(" r0")]
    assert len(found) >= 20
    assert {c["allowed"] for c in found} == {0.0}
    assert {c["codes_differ"] + c["scales_differ"] for c in found} == {0.0}


@pytest.mark.parametrize("planted", ["code", "scale"])
def test_the_check_catches_a_wrong_byte(planted: str) -> None:
    """One wrong byte in an output must stop the check: it is not blind."""
    script = f"""
import sys
sys.path.insert(0, {str(CHECK.parent)!r})
import check_kernels as c, kernel_cases, torch
def wrong(name, args):
    data, scale = c.interpreted(name, args)
    if data.numel():
        (data if {planted!r} == "code" else scale).view(torch.uint8).view(-1)[0] ^= 1
    return data, scale
try:
    c.run_one("quantize", "int4:64:bf16", True, 0, wrong)
except kernel_cases.CheckFailed:
    sys.exit(0)
sys.exit("not caught")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
