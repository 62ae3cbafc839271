"""Device functions that the kernels share.

Rounds of a rotation on rows held in registers, dequantization of a tile of words, the tile's place among siblings,
and the reduction of split-K. `layout` says how the tensors lie in memory.

`PTX` chooses inline assembly for NVIDIA over the same arithmetic in plain Triton, which serves AMD and the
interpreter; both are exact, so the results are the same to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: fp16 holds 1024 … 2047 in steps of 1, so that a code or-ed into the bits of 1024.0 is the number 1024 + code.
FP16_MAGIC = tl.constexpr(0x6400)
#: And bf16 128 … 255: the bits of 128.0.
BF16_MAGIC = tl.constexpr(0x4300)

# Two words a register. Of the fp16 form's four nibbles, the odd ones are used where they lie, in bits 4..7: there they
# are 1024 + 16·code, and a fused multiply-add by 1/16 (0x2c00) brings the product to 64 + code without a shift.
DEQUANTIZE_FP16 = tl.constexpr("""
{
    .reg .b32 high, even, odd, sixteenth;
    mov.b32 sixteenth, 0x2c002c00;
    shr.u32 high, $4, 8;
    lop3.b32 even, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 odd, $4, 0x00f000f0, 0x64006400, 0xea;
    sub.f16x2 $0, even, $5;
    fma.rn.f16x2 $1, odd, sixteenth, $6;
    lop3.b32 even, high, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 odd, high, 0x00f000f0, 0x64006400, 0xea;
    sub.f16x2 $2, even, $7;
    fma.rn.f16x2 $3, odd, sixteenth, $8;
}
""")
# bf16 has seven bits of mantissa: a code in bits 4..7 would reach into the exponent. sm_80 subtracts by fma only.
DEQUANTIZE_BF16 = tl.constexpr("""
{
    .reg .b32 word, code, one;
    mov.b32 one, 0x3f803f80;
    lop3.b32 code, $4, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, code, one, $5;
    shr.u32 word, $4, 4;
    lop3.b32 code, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, code, one, $6;
    shr.u32 word, $4, 8;
    lop3.b32 code, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $2, code, one, $7;
    shr.u32 word, $4, 12;
    lop3.b32 code, word, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $3, code, one, $8;
}
""")


@triton.jit
def load_in_first_order(x_ptrs, coefficient_ptrs, order_ptrs, mask):
    """Load rows of channel groups in the order of the first round, scaled: fp32 `[ROWS, GROUP]`.

    Args:
        x_ptrs: `[ROWS, 1]`, to the first channel of each row's group.
        coefficient_ptrs: `[ROWS or 1, GROUP]`, to row 0 of the group's coefficients.
        order_ptrs: `[ROWS or 1, GROUP]`, to row 0 of the group's order.
        mask: `[ROWS, 1]`; rows outside are zeros.
    """
    order = tl.load(order_ptrs).to(tl.int32)
    x = tl.load(x_ptrs + order, mask=mask, other=0.0)
    return x.to(tl.float32) * tl.load(coefficient_ptrs)


@triton.jit
def rotate_rows(
    v, coefficient_ptrs, order_ptrs, ROWS: tl.constexpr, GROUP: tl.constexpr, KROT: tl.constexpr, SHARED: tl.constexpr
):
    """Apply all rounds to `v [ROWS, GROUP]`, fp32, scaled and in the first order; return it in channel order.

    Args:
        v: the rows, each a channel group.
        coefficient_ptrs: `[ROWS, GROUP]`, or `[1, GROUP]` if all rows are of one group, to row 0.
        order_ptrs: the same for the order.
        ROWS: rows of `v`.
        GROUP: group size.
        KROT: rounds.
        SHARED: all rows are of one group.
    """
    COEFFICIENT_ROWS: tl.constexpr = 1 if SHARED else ROWS
    for r in tl.static_range(KROT):
        both = tl.load(coefficient_ptrs + (r + 1) * GROUP)
        cos, sin = tl.split(tl.reshape(both, [COEFFICIENT_ROWS, GROUP // 2, 2]))
        first, second = tl.split(tl.reshape(v, [ROWS, GROUP // 2, 2]))
        turned = tl.join(cos * first + sin * second, cos * second - sin * first)
        index = tl.load(order_ptrs + (r + 1) * GROUP).to(tl.int32)
        v = tl.gather(tl.reshape(turned, [ROWS, GROUP]), tl.broadcast_to(index, [ROWS, GROUP]), 1)
    return v


@triton.jit
def load_qparams(ptrs, N, GROUP: tl.constexpr):
    """Load the qparams of a K tile's four nibbles of 32 channels: those of its 1, 2 or 4 groups."""
    first = tl.load(ptrs)
    if GROUP == 128:
        return first, first, first, first
    elif GROUP == 64:
        second = tl.load(ptrs + N)
        return first, first, second, second
    else:
        return first, tl.load(ptrs + N), tl.load(ptrs + 2 * N), tl.load(ptrs + 3 * N)


@triton.jit
def scale_of(qparams):
    """Return the scales of qparams, fp32."""
    return (qparams & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dequantize(words, qparams, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Return `code − zero point` of the words' four nibbles, four tensors of the words' shape, exact in `DTYPE`.

    Args:
        words: int16.
        qparams: what `load_qparams` returned, of a shape that broadcasts to the words'.
        DTYPE: fp16 or bf16.
        PTX: inline assembly instead of plain Triton.
    """
    q_0, q_1, q_2, q_3 = qparams
    zero_0 = _magic_zero(q_0, DTYPE)
    zero_1 = _magic_zero(q_1, DTYPE)
    zero_2 = _magic_zero(q_2, DTYPE)
    zero_3 = _magic_zero(q_3, DTYPE)
    if PTX:
        if DTYPE == tl.float16:
            # 960 − (1024 + zero) is −(64 + zero), exactly.
            return tl.inline_asm_elementwise(
                DEQUANTIZE_FP16,
                "=r,=r,=r,=r,r,r,r,r,r",
                [words, zero_0, 960.0 - zero_1, zero_2, 960.0 - zero_3],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                DEQUANTIZE_BF16,
                "=r,=r,=r,=r,r,r,r,r,r",
                [words, zero_0, zero_1, zero_2, zero_3],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    else:
        return (
            _dequantize_nibble(words, zero_0, 0, DTYPE),
            _dequantize_nibble(words, zero_1, 1, DTYPE),
            _dequantize_nibble(words, zero_2, 2, DTYPE),
            _dequantize_nibble(words, zero_3, 3, DTYPE),
        )


@triton.jit
def _magic_zero(qparams, DTYPE: tl.constexpr):
    """Return 1024 + zero point in fp16, or −(128 + zero point) in bf16, where fma subtracts."""
    zero = qparams >> 16
    if DTYPE == tl.float16:
        return (zero | FP16_MAGIC).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return (zero | BF16_MAGIC | 0x8000).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _dequantize_nibble(words, zero, NIBBLE: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.float16:
        # As in the assembly: one shift for two nibbles, of which the odd one stays in bits 4..7.
        if NIBBLE >= 2:
            words = words >> 8
        if NIBBLE % 2 == 0:
            return ((words & 0x0F) | FP16_MAGIC).to(tl.float16, bitcast=True) - zero
        else:
            return ((words & 0xF0) | FP16_MAGIC).to(tl.float16, bitcast=True) * 0.0625 + (960.0 - zero)
    else:
        return (((words >> (4 * NIBBLE)) & 15) | BF16_MAGIC).to(tl.bfloat16, bitcast=True) + zero


@triton.jit
def locate_tile(tile, N, n_end_0, n_end_1, n_end_2, BLOCK_N: tl.constexpr, ROTATIONS: tl.constexpr):
    """Return `(rotation, first column, end of the columns)` of a column tile.

    Siblings with a rotation each (up to 4, ending at columns `n_end_0`, `n_end_1`, `n_end_2` and `N`) have tiles of
    their own, so that no tile needs two rotations.
    """
    rotation = 0
    start = tile * BLOCK_N
    end = N
    if ROTATIONS > 1:
        tiles = tl.cdiv(n_end_0, BLOCK_N)
        rotation = tl.where(tile >= tiles, 1, 0)
        start = tl.where(tile >= tiles, n_end_0 + (tile - tiles) * BLOCK_N, start)
        end = tl.where(tile >= tiles, n_end_1, n_end_0)
    if ROTATIONS > 2:
        tiles += tl.cdiv(n_end_1 - n_end_0, BLOCK_N)
        rotation = tl.where(tile >= tiles, 2, rotation)
        start = tl.where(tile >= tiles, n_end_1 + (tile - tiles) * BLOCK_N, start)
        end = tl.where(tile >= tiles, n_end_2, end)
    if ROTATIONS > 3:
        tiles += tl.cdiv(n_end_2 - n_end_1, BLOCK_N)
        rotation = tl.where(tile >= tiles, 3, rotation)
        start = tl.where(tile >= tiles, n_end_2 + (tile - tiles) * BLOCK_N, start)
        end = tl.where(tile >= tiles, N, end)
    return rotation, start, end


@triton.jit
def last_to_arrive(partial_ptrs, partial, mask, lock_ptr, splits):
    """Store a program's share of a split-K sum and tell whether it was the last of `splits` to do so.

    The last one adds up all shares, in their order: the result does not depend on who came last. It finds
    `lock_ptr` at zero and leaves it there, so that nothing need be cleared between launches.
    """
    tl.store(partial_ptrs, partial, mask=mask)
    # All warps have stored before one thread announces it.
    tl.debug_barrier()
    arrived = tl.atomic_add(lock_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == splits - 1
    if last:
        tl.store(lock_ptr, 0)
    return last
