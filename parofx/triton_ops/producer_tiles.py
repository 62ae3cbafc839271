"""Launch parameters of the producers that rotate, as pure functions of the sizes. Nothing here needs Triton.

Rounds pair neighbouring channels and then reorder a group. Where a warp has two channels or more of one group in each
thread, both happen inside it and cost no barrier; several groups in a warp, or several warps to a group, exchange
through shared memory. So a group has one warp, or the program has only one.

| K | g | warp size | `block_groups` | `num_warps` | why |
|-|-|-|-|-|-|
| 4096 | 128 | 32 | 8 | 8 | a token has four programs |
| 14336 | 128 | 32 | 8 | 8 | fourteen |
| 2048 | 64 | 32 | 8 | 8 | two channels a thread |
| 2048 | 32 | 32 | 4 | 1 | one channel a thread: a single warp |
| 2048 | 64 | 64 | 4 | 1 | the same |
| 256 | 128 | 32 | 2 | 2 | no more groups |
"""

from __future__ import annotations

from dataclasses import dataclass

#: Groups that a program of `rmsnorm_rotate` rotates.
_MOST_GROUPS = 8
#: Channels a thread loads at once for the norm, in registers that the rounds use later.
_SUMMED_PER_THREAD = 8
#: Rows that share the loaded rounds of one group, if there are rows enough to fill a GPU besides.
_MOST_ROWS = 4
_MANY_PROGRAMS = 1024


@dataclass(frozen=True)
class NormTiles:
    """Of `rmsnorm_rotate`.

    Args:
        block_groups: channel groups that a program rotates, a power of two.
        block_sum: channels of the row that it loads at once for the norm, a power of two.
        num_warps: warps of a program.
    """

    block_groups: int
    block_sum: int
    num_warps: int


@dataclass(frozen=True)
class GateTiles:
    """Of `silu_mul_rotate`: rows of one channel group per program, a power of two, and warps."""

    block_m: int
    num_warps: int


def norm_tiles(in_features: int, group_size: int, warp_size: int) -> NormTiles:
    """Return the launch parameters of `rmsnorm_rotate` for a row of K channels."""
    if group_size >= 2 * warp_size:
        block_groups = num_warps = min(_MOST_GROUPS, _power_of_two(in_features // group_size))
    else:
        block_groups, num_warps = 4 * warp_size // group_size, 1
    block_sum = min(_power_of_two(in_features), _SUMMED_PER_THREAD * num_warps * warp_size)
    return NormTiles(block_groups, block_sum, num_warps)


def gate_tiles(rows: int, in_features: int, group_size: int) -> GateTiles:
    """Return the launch parameters of `silu_mul_rotate`: more rows a program once there are programs enough."""
    block_m = 1
    while block_m < _MOST_ROWS and rows * (in_features // group_size) >= 2 * block_m * _MANY_PROGRAMS:
        block_m *= 2
    return GateTiles(block_m, num_warps=1)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
