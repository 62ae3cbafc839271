"""Budgets on what the compiler makes of the producers that rotate, for GPUs that need not be there."""

import pytest

from parofx.testing.interpreter import is_interpreting

pytest.importorskip("triton")

from parofx.testing.aot import SHARED_LIMITS, TARGET_NAMES, CompiledKernel, compile_kernel
from parofx.triton_ops.producer_tiles import gate_tiles, norm_tiles
from parofx.triton_ops.rmsnorm_rotate import rmsnorm_rotate_kernel
from parofx.triton_ops.silu_mul_rotate import silu_mul_rotate_kernel

pytestmark = pytest.mark.skipif(is_interpreting(), reason="interpreted kernels cannot be compiled")

#: 40 registers let 48 warps live on a processor; the two barriers are those of the sum over the row.
NORM_REGISTERS, NORM_BARRIERS = 40, 2
#: A warp's shuffles: 128 in eight rounds of a group of 128, and those of the sum over the row.
NORM_SHUFFLES = 128 + 10
STRIDES = ("K", "stride_xm", "stride_rm", "stride_gm", "stride_um")
TYPES = {"coefficients_ptr": "*fp32", "order_ptr": "*u8", "weight_offset": "fp32", "eps": "fp32"} | dict.fromkeys(
    ("M", *STRIDES), "i32"
)


def compiled(kernel, constants: dict, num_warps: int, arch: str, dtype: str) -> CompiledKernel:
    pointers = {name: f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
    return compile_kernel(kernel, pointers | TYPES, constants, arch, num_warps=num_warps, divisible=STRIDES)


def compiled_norm(in_features: int, group_size: int, arch: str, dtype: str = "fp16", residual: bool = True):
    tiles = norm_tiles(in_features, group_size, 64 if arch.startswith("gfx") else 32)
    constants = {"HAS_RESIDUAL": residual, "HAS_WEIGHT": True, "GROUP": group_size, "KROT": 8}
    blocks = {"BLOCK_GROUPS": tiles.block_groups, "BLOCK_SUM": tiles.block_sum}
    return compiled(rmsnorm_rotate_kernel, constants | blocks, tiles.num_warps, arch, dtype)


@pytest.mark.parametrize("arch", TARGET_NAMES)
@pytest.mark.parametrize("in_features", [4096, 11008, 14336])
def test_rmsnorm_rotate(in_features, arch):
    """The lengths of 86 and 112 groups, no powers of two, compile to the same as that of 32."""
    found = compiled_norm(in_features, 128, arch)
    assert found.spills == 0
    assert found.shared_bytes <= SHARED_LIMITS[arch]
    if arch.startswith("sm_"):
        assert found.registers <= NORM_REGISTERS
        assert found.count("BAR") <= NORM_BARRIERS
        assert found.count("SHFL") <= NORM_SHUFFLES


@pytest.mark.parametrize(
    ("group_size", "arch", "dtype", "residual"),
    [
        (128, "sm_90", "bf16", True),
        (64, "sm_90", "fp16", False),
        (32, "sm_90", "fp16", True),
        (64, "gfx942", "bf16", True),
    ],
)
def test_other_variants_of_rmsnorm_rotate_spill_nothing(group_size, arch, dtype, residual):
    found = compiled_norm(2048, group_size, arch, dtype, residual)
    assert found.spills == 0
    if group_size == 64 and arch == "sm_90":
        assert found.count("BAR") <= NORM_BARRIERS


@pytest.mark.parametrize("arch", TARGET_NAMES)
@pytest.mark.parametrize("rows", [1, 64])
def test_silu_mul_rotate(rows, arch, request):
    if arch == "sm_89" and not request.config.getoption("--full-aot"):
        pytest.skip("it compiles to the same as sm_80; --full-aot looks")
    tiles = gate_tiles(rows, 14336, 128)
    constants = {"GROUP": 128, "KROT": 8, "BLOCK_M": tiles.block_m}
    found = compiled(silu_mul_rotate_kernel, constants, tiles.num_warps, arch, "bf16")
    assert found.spills == 0
    if arch.startswith("sm_"):
        # A warp has whole groups: nothing waits for another.
        assert found.count("BAR") == 0
