"""Bounds that tests compare with, each with its reason."""

from __future__ import annotations

# Kernels against the reference: share of codes that may differ, by one step each, where a norm or a
# transcendental function comes first. Its sums have another order (about 1e-7 relative), and a code
# moves only where a value lies that close to a rounding boundary: seen below 1e-5 of the codes; a
# whole group moves with its scale when its largest value rounds the other way in bf16.
FLIPPED_CODES = 2e-4
# Relative error ||out - ref|| / ||ref|| of kernels with the same quantized operands, by output
# dtype: half a unit in the last place of the output (2^-9, 2^-12) plus fp32 sums in another order.
# Hopper's fp8 tensor cores keep about 14 bits of a partial sum, which shows only in fp32 outputs.
OUTPUT_ERROR = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-3}
# More than 64 rows of a weights-only linear: the decoded weight is rounded to x's dtype too.
DECODED_WEIGHT_ERROR = {"bfloat16": 6e-3, "float16": 1.5e-3, "float32": 1e-3}
