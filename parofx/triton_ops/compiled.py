"""Compile a row of a launch table ahead of time, as a launch would: what budgets and the static benchmark look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parofx.testing.aot import CompiledKernel, compile_kernel
from parofx.triton_ops.dequantize import dequantize_kernel
from parofx.triton_ops.int4_linear import int4_linear_kernel
from parofx.triton_ops.rotate import rotate_kernel
from parofx.triton_ops.rotate_dense import rotate_dense_kernel, rotation_matrices_kernel
from parofx.triton_ops.rotate_int4_linear import rotate_int4_linear_kernel
from parofx.triton_ops.tiles import (
    DenseTiles,
    DequantizeTiles,
    FusedTiles,
    LinearTiles,
    RotateTiles,
    operand_slots,
    padded_rows,
)

_POINTERS = {
    "words_ptr": "*i16",
    "qparams_ptr": "*i32",
    "coefficients_ptr": "*fp32",
    "order_ptr": "*u8",
    "bias_ptr": "*fp16",
    "partials_ptr": "*fp32",
    "locks_ptr": "*i32",
}
_SIZES = ("M", "N", "K", "stride_xm", "stride_xs", "n_end_0", "n_end_1", "n_end_2", "start", "end")
#: Sizes that are multiples of 16 in every model; M is anything, and is never specialized on.
_DIVISIBLE = tuple(name for name in _SIZES if name != "M")


@dataclass(frozen=True)
class Variant:
    """What a kernel is specialized on besides its tiles.

    Args:
        dtype: Triton's name of the activations' dtype, `"fp16"` or `"bf16"`.
        group_size: channels per group.
        krot: rounds.
        rotations: of siblings that have one each.
        split: the int4 product is shared by several programs.
        tokens: M, for `rotate_int4_linear`.
        portable: plain Triton instead of inline PTX; always so for AMD.
    """

    dtype: str = "fp16"
    group_size: int = 128
    krot: int = 8
    rotations: int = 1
    split: bool = True
    tokens: int = 1
    portable: bool = False


def compile_tiles(
    tiles: RotateTiles | DenseTiles | LinearTiles | DequantizeTiles | FusedTiles, arch: str, variant: Variant
) -> CompiledKernel:
    """Return the kernel of some tiles, compiled for an architecture.

    Raises:
        Exception: what the compiler raises.
    """
    ptx = not variant.portable and not arch.startswith("gfx")
    linear = {"ROTATIONS": variant.rotations, "HAS_BIAS": True, "SPLIT": variant.split, "PTX": ptx}
    rotation = {"GROUP": variant.group_size, "KROT": variant.krot}
    if isinstance(tiles, RotateTiles):
        return _compile(rotate_kernel, rotation | {"BLOCK_M": tiles.block_m}, tiles, arch, variant)
    if isinstance(tiles, LinearTiles):
        constants = linear | {"GROUP": variant.group_size, "EVEN_K": True, "SWAP_AB": tiles.swap_ab}
        blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
        return _compile(int4_linear_kernel, constants | blocks, tiles, arch, variant)
    if isinstance(tiles, DequantizeTiles):
        constants = {"GROUP": variant.group_size, "EVEN_K": True, "BLOCK_N": tiles.block_n, "PTX": ptx}
        return _compile(dequantize_kernel, constants, tiles, arch, variant)
    if isinstance(tiles, FusedTiles):
        blocks = {"ROWS": padded_rows(variant.tokens), "BLOCK_N": tiles.block_n, "SLICE": tiles.slice_tiles}
        blocks |= {"SLOTS": operand_slots(ptx=not arch.startswith("gfx"))}
        return _compile(rotate_int4_linear_kernel, linear | rotation | blocks, tiles, arch, variant)
    return _compile(rotate_dense_kernel, rotation | {"BLOCK_M": tiles.block_m}, tiles, arch, variant)


def compile_matrices(arch: str, variant: Variant) -> CompiledKernel:
    """Return the kernel that makes the matrices of `rotate_dense`, compiled for an architecture."""
    constants = {"GROUP": variant.group_size, "KROT": variant.krot, "BLOCK_M": 4}
    return _compile(rotation_matrices_kernel, constants, RotateTiles(4, 1), arch, variant)


def _compile(kernel: Any, constants: Mapping[str, Any], tiles: Any, arch: str, variant: Variant) -> CompiledKernel:
    activations = dict.fromkeys(("x_ptr", "matrices_ptr", "out_ptr"), f"*{variant.dtype}")
    types = activations | _POINTERS | dict.fromkeys(_SIZES, "i32")
    return compile_kernel(
        kernel,
        types,
        constants,
        arch,
        num_warps=tiles.num_warps,
        num_stages=getattr(tiles, "num_stages", 1),
        divisible=_DIVISIBLE,
    )
