"""The Triton kernels compile to machine code for every supported chip, without a GPU."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pq_fx.kernels.formats import Format

CHIPS = (80, 89, 90, 100, 120)
FP8_CHIPS = CHIPS[1:]
# The tensor-core instruction of each chip.
MMA = {
    80: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
}


def kernels(name: str) -> Any:
    return import_module(f"pq_fx.kernels.{name}")


def compile_kernel(
    kernel: Any, chip: int, constants: dict[str, Any], types: dict[str, str], **options: Any
) -> Any:
    """Compile as the launcher would: pointers, row lengths and strides divisible by 16."""
    names = [p.name for p in kernel.params]
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        kind = "*bf16" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, kind)
        if name not in constants and signature[name] != "fp32":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def check_target(compiled: Any, chip: int) -> str:
    """The PTX, after: it names the chip, machine code exists, nothing spilled into local memory."""
    ptx = compiled.asm["ptx"]
    assert re.search(rf"\.target sm_{chip}a?\b", ptx)
    assert len(compiled.asm["cubin"]) > 1000
    assert "ld.local" not in ptx and "st.local" not in ptx
    return ptx


def row_constants(key: str, carrier: str, chip: int, channels: int, **more: Any) -> dict[str, Any]:
    arguments = kernels("row_arguments")
    fmt = Format.parse(key)
    rotation = fmt.group_size
    tile = arguments.row_tile(channels, fmt, rotation, torch.bfloat16, more["HAS_PERM"])
    constants = arguments.row_constants(fmt, tile, rotation, carrier, torch.bfloat16)
    return {**constants, "NATIVE_FP8": chip >= 89, "CHANNELS": channels, **more}


ROW_TYPES = {
    "perm_ptr": "*i32",
    "global_ptr": "*fp32",
    "clip_ptr": "*fp32",
    "data_ptr": "*u8",
    "eps": "fp32",
}


@pytest.mark.parametrize(
    ("chip", "key"),
    [(chip, "int4f:64:bf16") for chip in CHIPS] + [(80, "int4:64:bf16"), (90, "int4:64:bf16")],
)
def test_norm_quantize(chip: int, key: str) -> None:
    carrier = "codes" if chip == 80 else "e4m3"
    flags = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_GLOBAL", "HAS_CLIP"), False)
    flags |= dict.fromkeys(("RMS", "HAS_SCALE", "HAS_SHIFT"), True) | {"HAS_PERM": chip == 90}
    constants = row_constants(key, carrier, chip, 768, **flags)
    types = {**ROW_TYPES, "scale_ptr": "*bf16" if chip == 80 else "*fp32"}
    if chip == 90:
        types["eps"] = "fp64"  # as Inductor passes a Python float
    kernel = kernels("norm_quantize")._norm_quantize_kernel
    ptx = check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)
    # The codes leave in wide stores, fp8 bytes come from the hardware's conversion, and tensor
    # cores rotate.
    assert "st.global.v" in ptx
    assert ("e4m3x2" in ptx) == (chip >= 89)
    assert "mma" in ptx


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("permute", [False, True])
def test_rows_stay_in_registers(rotation: int, permute: bool) -> None:
    """Modulation and rotation move nothing between threads; a gather stores a row once and reads two at once."""
    flags = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_GLOBAL", "HAS_CLIP", "RMS"), False)
    flags |= {"HAS_SCALE": True, "HAS_SHIFT": True, "HAS_PERM": permute}
    constants = row_constants("int4:64:bf16", "e4m3", 90, 3072, **flags)
    constants |= {"ROTATION": rotation, "BY_DOT": rotation > 0}
    kernel = kernels("norm_quantize")._norm_quantize_kernel
    types = {**ROW_TYPES, "scale_ptr": "*fp32"}
    compiled = compile_kernel(kernel, 90, constants, types, num_warps=2)
    ptx = check_target(compiled, 90)
    padded = 2 * 4096 * constants["ROWS"] if permute else 0
    # 512 bytes: the matrix of signs, and sums of the warps.
    assert compiled.metadata.shared <= max(padded, 512)
    # 4096 channels of two rows of 16 bits are 64 words by each of 64 threads, and the norm's sums a few more. Triton
    # before 3.8 stores four at once.
    widths = re.findall(r"st\.shared(?:::cta)?(?:\.v([24]))?\.b32", ptx)
    rows = 64 if permute else 0
    assert rows <= sum(int(width or 1) for width in widths) < rows + 32
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        assert widths.count("4") == rows // 4
    assert not re.search(r"ld\.shared\S*\.[bu]16", ptx)
    assert ("mma" in ptx) == (rotation > 0)


@pytest.mark.parametrize("chip", CHIPS)
def test_act_quantize(chip: int) -> None:
    flags = {"ACT": "gelu_tanh", "HAS_GATE": True, "HAS_PERM": True, "HAS_GLOBAL": True}
    flags |= {"HAS_CLIP": True, "BEFORE": 256}
    constants = row_constants("nvfp4:16:4over6", "codes", chip, 768, **flags)
    kernel = kernels("activation_quantize")._act_quantize_kernel
    types = {**ROW_TYPES, "scale_ptr": "*u8"}
    check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)


# One chip is enough for the second layout and for joined weights.
@pytest.mark.parametrize(
    ("chip", "key", "count"),
    [(chip, "int4:64:bf16", 1) for chip in FP8_CHIPS]
    + [(chip, "int4f:64:bf16", 1) for chip in FP8_CHIPS]
    + [(90, "int4:64:bf16", 4), (90, "int3:64:bf16", 1), (90, "int3f:64:bf16", 1)],
)
def test_decode(chip: int, key: str, count: int) -> None:
    fmt = Format.parse(key)
    absent = [f"{n}_{i}_ptr" for n in ("weight", "scale", "bias") for i in range(count, 4)]
    absent += ["global_ptr", *(f"global_{i}_ptr" for i in (1, 2, 3))]
    absent += ["joint_ptr", "bias_ptr"] if count == 1 else []
    constants = {
        **dict.fromkeys(absent),
        "COUNT": count,
        "HAS_BIAS": count > 1,
        "HAS_GLOBAL": False,
        "LENGTH": 1024,
        "CHANNELS": 768,
        "GROUP": fmt.group_size,
        "ELEMENT": fmt.element,
        "SCALE": fmt.scale,
        "GAIN": float(fmt.operand_gain),
        "TO_FP8": True,
        "NATIVE_FP8": True,
    }
    types = {"out_ptr": "*u8", "row_ptr": "*fp32", "weight_ptr": "*u8"}
    types |= {f"weight_{i}_ptr": "*u8" for i in range(1, 4)}
    kernel = kernels("decode")._decode_kernel
    ptx = check_target(
        compile_kernel(kernel, chip, constants, types, enable_fp_fusion=False, num_warps=2), chip
    )
    assert "st.global.v" in ptx
    if fmt.bits == 4:  # wide, whichever weight a program reads
        assert "ld.global.v" in ptx


@pytest.mark.parametrize("chip", FP8_CHIPS)
def test_fp8_gemm_uses_fp8_tensor_cores(chip: int) -> None:
    constants = {
        "K": 256,
        "HAS_BIAS": True,
        "NATIVE_FP8": True,
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 64,
        "GROUP_M": 8,
    }
    types = {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv"}
    types |= {"a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
    kernel = kernels("gemm_fp8")._fp8_gemm_kernel
    ptx = check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)
    assert MMA[chip] in ptx


@pytest.mark.parametrize("chip", CHIPS)
def test_dequantizing_gemm(chip: int) -> None:
    constants = {
        "K": 256,
        "A_ELEMENT": "int4",
        "A_PACKED": False,
        "A_STEP": 1.0,
        "A_SCALE": "bf16",
        "A_GROUP": 64,
        "HAS_A_GLOBAL": False,
        "B_ELEMENT": "int4",
        "B_SCALE": "bf16",
        "B_GROUP": 64,
        "HAS_B_GLOBAL": False,
        "HAS_BIAS": False,
        "DOT": triton.language.bfloat16,
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "BLOCK_K": 64,
    }
    types = {"a_ptr": "*u8", "b_ptr": "*u8", "a_global_ptr": "*fp32", "b_global_ptr": "*fp32"}
    kernel = kernels("gemm_codes")._dequantizing_gemm_kernel
    ptx = check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)
    assert "mma" in ptx and "bf16" in ptx


@pytest.mark.parametrize("chip", [80, 86, 90])
@pytest.mark.parametrize(
    "key", ["int4:64:bf16", "mxfp4:32:e8m0", "int3:128:bf16", "int3f:128:bf16"]
)
def test_int8_gemm_uses_int8_tensor_cores(chip: int, key: str) -> None:
    fmt = Format.parse(key)
    constants = {
        "K": 3072,
        "A_SCALE": fmt.scale,
        "A_GROUP": fmt.group_size,
        "B_ELEMENT": fmt.element,
        "B_SCALE": fmt.scale,
        "B_GROUP": fmt.group_size,
        "STEP": 1.0,
        "HAS_BIAS": True,
        "BLOCK_M": 128,
        "BLOCK_N": 64,
        "BLOCK_K": fmt.group_size,
        "STAGES": 3,
    }
    types = {"a_ptr": "*i8", "b_ptr": "*u8"}
    if fmt.scale == "e8m0":
        types |= {"a_scale_ptr": "*u8", "b_scale_ptr": "*u8"}
    kernel = kernels("gemm_int8")._int8_gemm_kernel
    ptx = check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)
    if chip == 90:  # where the kernel could be run
        assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in ptx
    else:
        assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in ptx


@pytest.mark.parametrize(
    ("chip", "key", "instruction"),
    [
        (100, "nvfp4:16:e4m3", "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16"),
        (100, "mxfp4:32:e8m0", "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32"),
        (120, "nvfp4:16:e4m3", "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"),
        (120, "mxfp4:32:e8m0", "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0"),
    ],
)
def test_e2m1_gemm_uses_block_scaled_tensor_cores(chip: int, key: str, instruction: str) -> None:
    fmt = Format.parse(key)
    constants = {
        "K": 3072,
        "SCALE": fmt.scale,
        "GROUP": fmt.group_size,
        "HAS_A_GLOBAL": fmt.two_level,
        "HAS_B_GLOBAL": fmt.two_level,
        "HAS_BIAS": True,
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 128,
    }
    scales = "*fp8e4nv" if fmt.two_level else "*u8"
    types = {"a_ptr": "*u8", "b_ptr": "*u8", "a_scale_ptr": scales, "b_scale_ptr": scales}
    types |= {"a_global_ptr": "*fp32", "b_global_ptr": "*fp32"}
    kernel = kernels("gemm_e2m1")._e2m1_gemm_kernel
    ptx = check_target(compile_kernel(kernel, chip, constants, types, num_warps=4), chip)
    # Of two names of one scale size (PTX ISA 8.8, tcgen05.mma), Triton writes the second from 3.8 on.
    for old, new in (
        ("mxf4.block_scale.scale_vec::2X", "mxf4.block_scale.block32"),
        ("mxf4nvf4.block_scale.scale_vec::4X", "mxf4nvf4.block_scale.block16"),
    ):
        if chip == 100:
            ptx = ptx.replace(old, new)
    assert instruction in ptx


# One chip is enough for the other elements.
@pytest.mark.parametrize(
    ("chip", "key"),
    [(chip, "int4:64:bf16") for chip in CHIPS]
    + [(chip, "int4f:64:bf16") for chip in CHIPS]
    + [(chip, k) for chip in (80, 90) for k in ("nvfp4:16:e4m3", "int3:64:bf16", "int3f:64:bf16")]
    + [(90, "fp8:0:fp32")],
)
def test_gemv(chip: int, key: str) -> None:
    fmt = Format.parse(key)
    constants = {
        "K": 3072,
        "HAS_GLOBAL": False,
        "HAS_BIAS": True,
        "ELEMENT": fmt.element,
        "SCALE": fmt.scale,
        "GROUP": fmt.group_size,
        "DOT": triton.language.bfloat16,
        "BLOCK_M": 8,
        "BLOCK_N": 32,
        "BLOCK_K": min(512, 16 * (32 if fmt.two_level else fmt.group_size or 32)),
        "STAGES": 3,
    }
    types = {"weight_ptr": "*u8", "global_ptr": "*fp32"}
    kernel = kernels("gemv")._gemv_kernel
    compiled = compile_kernel(kernel, chip, constants, types, num_warps=4)
    ptx = check_target(compiled, chip)
    # 16 packed bytes a thread in one copy, and tensor cores.
    assert "mma.sync" in ptx
    if fmt.bits == 4:
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)
