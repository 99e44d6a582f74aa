"""The kernel of GPTQ's columns compiles to machine code for every supported chip, its tile in registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from tests.compile_only.test_targets import CHIPS, check_target, compile_kernel, kernels


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("columns, bounds", [(64, 14), (16, 14), (128, 254)])
def test_round_columns(chip: int, columns: int, bounds: int) -> None:
    constants = {"COLUMNS": columns, "PADDED": columns, "BOUNDS": bounds}
    constants |= {"BLOCK_N": max(16, 2048 // columns)}
    types = dict.fromkeys(("block_ptr", "within_ptr", "factor_ptr", "values_ptr"), "*fp32")
    types |= {"bounds_ptr": "*fp32", "errors_ptr": "*fp32", "index_ptr": "*i32"}
    kernel = kernels("round_columns")._round_columns_kernel
    check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)
