"""Host side of merged siblings and of split-K, common to the int4 kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parofx.errors import ShapeError

#: Siblings with a rotation each that one launch takes.
MAX_ROTATIONS = 4


def check_siblings(rotations: int, ends: Sequence[int], out_features: int) -> None:
    """Check the column ranges of siblings that have a rotation each.

    Raises:
        ShapeError: if there are too many, or the ranges do not cover the columns in order.
    """
    if not 1 <= rotations <= MAX_ROTATIONS:
        raise ShapeError(f"one launch takes 1 to {MAX_ROTATIONS} rotations, got {rotations}")
    if (
        len(ends) != rotations
        or ends[-1] != out_features
        or any(a >= b for a, b in zip((0, *ends), ends, strict=False))
    ):
        raise ShapeError(f"ends must be {rotations} rising columns, the last {out_features}, got {list(ends)}")


def check_bias(bias: Tensor | None, out_features: int) -> None:
    """Check the bias of all siblings.

    Raises:
        ShapeError: if it is not `(N,)`.
    """
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ShapeError(
            f"bias must be ({out_features},), one number per column of all siblings, got {tuple(bias.shape)}"
        )


def column_tiles(ends: Sequence[int], block_n: int) -> int:
    """Return the number of column tiles; every sibling with its own rotation has its own."""
    return sum(-(-(end - start) // block_n) for start, end in zip((0, *ends), ends, strict=False))


def inner_ends(ends: Sequence[int]) -> tuple[int, int, int]:
    """Return the kernels' arguments `n_end_0`, `n_end_1` and `n_end_2`."""
    first, second, third = (*ends[:3], *(ends[-1],) * (3 - len(ends[:3])))
    return first, second, third


def split_buffer(split_k: int, tokens: int, out_features: int, output_tiles: int, locks: Tensor) -> Tensor:
    """Return memory for the fp32 shares of split-K, `(split_k, M, N)`; without split-K something that is not read.

    Raises:
        ShapeError: if there are fewer locks than output tiles.
    """
    if split_k == 1:
        return locks
    if locks.numel() < output_tiles or locks.dtype != torch.int32:
        raise ShapeError(f"locks must be {output_tiles} int32 zeros, got {locks.numel()} {locks.dtype}")
    return torch.empty((split_k, tokens, out_features), dtype=torch.float32, device=locks.device)
