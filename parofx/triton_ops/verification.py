"""The Triton kernels with the signatures of `torch.ops.parofx`'s operators, to be checked against their reference.

Every adapter packs the checkpoint's tensors, calls a kernel with the launch parameters it was given, and checks that
the locks of split-K are zero again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parofx.triton_ops import layout
from parofx.triton_ops.dequantize import dequantize_linear as launch_dequantize_linear
from parofx.triton_ops.int4_linear import int4_linear as launch_int4_linear
from parofx.triton_ops.launch import as_rows, make_locks
from parofx.triton_ops.layout import PackedRotation
from parofx.triton_ops.rotate import rotate as launch_rotate
from parofx.triton_ops.rotate_dense import rotate_dense as launch_rotate_dense
from parofx.triton_ops.rotate_int4_linear import rotate_int4_linear as launch_rotate_int4_linear
from parofx.triton_ops.tiles import DenseTiles, DequantizeTiles, FusedTiles, LinearTiles, RotateTiles

Kernel = Callable[..., Tensor]


def rotate(tiles: RotateTiles) -> Kernel:
    """Return `rotate` as `fn(v, pairs, theta, scales, group_size)`."""

    def kernel(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Tensor:
        rotation = _stacked(pairs, theta, scales, group_size)
        return launch_rotate(as_rows(v), rotation, tiles)[0].reshape(v.shape)

    return kernel


def rotate_dense(tiles: DenseTiles) -> Kernel:
    """Return `rotate_dense` as `fn(v, pairs, theta, scales, group_size)`."""

    def kernel(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Tensor:
        rotation = _stacked(pairs, theta, scales, group_size)
        return launch_rotate_dense(as_rows(v), rotation, tiles)[0].reshape(v.shape)

    return kernel


def int4_linear(tiles: LinearTiles | DequantizeTiles, *, ptx: bool) -> Kernel:
    """Return `int4_linear`, or `dequantize` and a product, as `fn(x, qweight, qzeros, scales, bias, group_size)`."""

    def kernel(
        x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
    ) -> Tensor:
        weight = layout.pack_weight(qweight, qzeros, scales, group_size)
        out_features = scales.shape[1]
        rows = as_rows(x)[None]
        if isinstance(tiles, DequantizeTiles):
            out = launch_dequantize_linear(rows, weight, bias, [out_features], group_size, tiles, ptx=ptx)
        else:
            locks = make_locks(out_features, x.device)
            out = launch_int4_linear(rows, weight, bias, [out_features], group_size, locks, tiles, ptx=ptx)
            _check_locks(locks)
        return out.reshape(*x.shape[:-1], out_features)

    return kernel


def rotate_int4_linear(tiles: FusedTiles, *, ptx: bool, siblings: int = 1, which: int = 0) -> Kernel:
    """Return `rotate_int4_linear` as `fn(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size)`.

    Args:
        tiles: launch parameters.
        ptx: inline assembly.
        siblings: linears in the launch, each with a rotation of its own; all but one have other angles and weights.
        which: the one that is returned.
    """

    def kernel(
        x: Tensor,
        pairs: Tensor,
        theta: Tensor,
        channel_scales: Tensor,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        group_size: int,
    ) -> Tensor:
        others = [index != which for index in range(siblings)]
        rotation = layout.stack_rotations(
            [layout.pack_rotation(pairs, theta + other, channel_scales, group_size) for other in others]
        )
        weight = layout.merge_weights(
            [layout.pack_weight(~qweight if other else qweight, qzeros, scales, group_size) for other in others]
        )
        out_features = scales.shape[1]
        ends = [out_features * (index + 1) for index in range(siblings)]
        merged_bias = None if bias is None else torch.cat([bias + other for other in others])
        locks = make_locks(ends[-1], x.device)
        out = launch_rotate_int4_linear(as_rows(x), rotation, weight, merged_bias, ends, locks, tiles, ptx=ptx)
        _check_locks(locks)
        return out[:, out_features * which : ends[which]].reshape(*x.shape[:-1], out_features)

    return kernel


def _stacked(pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> PackedRotation:
    return layout.stack_rotations([layout.pack_rotation(pairs, theta, scales, group_size)])


def _check_locks(locks: Tensor) -> None:
    if bool(locks.any()):
        raise AssertionError("the kernel must leave its locks at zero")
