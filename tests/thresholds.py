"""Bounds that tests compare with, each with its reason."""

from __future__ import annotations

# Kernels against the reference: share of codes that may differ, by one step each, where a norm or a
# transcendental function comes first. Its sums have another order (about 1e-7 relative), and a code
# moves only where a value lies that close to a rounding boundary: seen below 1e-5 of the codes; a
# whole group moves with its scale when its largest value rounds the other way in bf16.
FLIPPED_CODES = 2e-4
# Relative error ||out - ref|| / ||ref|| of kernels with the same quantized operands, by output
# dtype: half a unit in the last place of the output (2^-9, 2^-12) plus fp32 sums in another order.
OUTPUT_ERROR = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-3}
# Carrier "e4m3" in any output dtype: Hopper's fp8 tensor cores keep about 14 bits of a partial sum
# (cuBLAS with fast accumulation too); 1.4e-3 was seen at K = 3072, 7e-4 at K = 384.
FP8_OUTPUT_ERROR = 4e-3
# Triton's interpreter drops bits where it converts to bf16, instead of rounding: a whole unit.
INTERPRETER_BF16_ERROR = 8e-3
# More than 64 rows of a weights-only linear: the decoded weight is rounded to x's dtype too.
DECODED_WEIGHT_ERROR = {"bfloat16": 6e-3, "float16": 1.5e-3, "float32": 1e-3}
# A bf16 output of a compiled quantized linear against eager: equal, but where a norm's sum of
# another order moves a code by one step, which moves one of 192 terms: one unit in the last place
# of values of size 14, 2^-4, and twice that for safety.
COMPILED_SUMS = {"rtol": 2**-7, "atol": 0.125}
