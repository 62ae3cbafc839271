"""The Triton kernels as functions of tensors: choose by the cost model, then launch.

Weights and rotations come in the layout of `parofx.triton_ops.layout`. Nothing here waits for the device or
allocates but through torch, so calls can be captured in CUDA graphs. Split-K is deterministic; its `locks` belong to a
weight, so the same weight must not be used on two streams at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parofx.triton_ops import cost_model
from parofx.triton_ops.architectures import architecture_of
from parofx.triton_ops.dequantize import dequantize_linear as launch_dequantize_linear
from parofx.triton_ops.int4_linear import int4_linear as launch_int4_linear
from parofx.triton_ops.layout import PackedRotation, PackedWeight
from parofx.triton_ops.rotate import rotate as launch_rotate
from parofx.triton_ops.rotate_dense import rotate_dense as launch_rotate_dense
from parofx.triton_ops.rotate_int4_linear import rotate_int4_linear as launch_rotate_int4_linear
from parofx.triton_ops.siblings import MAX_ROTATIONS
from parofx.triton_ops.tiles import DenseTiles, DequantizeTiles, FusedTiles, LinearTiles

#: The least block_n of any launch table.
_FEWEST_COLUMNS = 64


def make_locks(out_features: int, device: torch.device) -> Tensor:
    """Return what every packed weight of N columns needs besides: int32 zeros, for split-K."""
    tiles = (-(-out_features // _FEWEST_COLUMNS) + MAX_ROTATIONS) * cost_model.MOST_ROW_TILES
    return torch.zeros(tiles, dtype=torch.int32, device=device)


def uses_ptx(device: torch.device) -> bool:
    """Say whether kernels on a device use inline PTX: on NVIDIA, and in the interpreter, which evaluates it."""
    return device.type == "cpu" or torch.version.hip is None


def rotate(x: Tensor, rotation: PackedRotation) -> Tensor:
    """Return `ROT(x ⊙ channel_scales)` of `x (…, K)`, `(S, M, K)` for S stacked rotations, M the product of `…`."""
    rows = as_rows(x)
    return launch_rotate(rows, rotation, cost_model.choose_rotate(len(rows), rows.shape[1], architecture_of(x.device)))


def int4_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, ends: Sequence[int], group_size: int, locks: Tensor
) -> Tensor:
    """Return `x @ Wq + bias`, `(M, N)`, of rotated activations.

    Args:
        x: `(S, M, K)`, one rotation for all columns or one per sibling.
        weight: of N columns, of all siblings.
        bias: `(N,)`, or None.
        ends: S numbers, the columns' end of each rotation's sibling; the last is N.
        group_size: channels per group.
        locks: what `make_locks` returned.
    """
    _, tokens, channels = x.shape
    out_features, arch = weight.words.shape[1], architecture_of(x.device)
    tiles = cost_model.choose_product(max(tokens, 1), channels, out_features, arch, group_size)
    return _product(tiles, x, weight, bias, ends, group_size, locks)


def rotate_int4_linear(
    x: Tensor,
    rotation: PackedRotation,
    weight: PackedWeight,
    bias: Tensor | None,
    ends: Sequence[int],
    locks: Tensor,
) -> Tensor:
    """Return `ROT(x ⊙ channel_scales) @ Wq + bias`, `(M, N)`, of `x (…, K)`, in one, two or three launches.

    Args:
        x: activations, not rotated.
        rotation: S stacked rotations, one for all columns or one per sibling.
        weight: of N columns, of all siblings.
        bias: `(N,)`, or None.
        ends: S numbers, the columns' end of each rotation's sibling; the last is N.
        locks: what `make_locks` returned.
    """
    rows = as_rows(x)
    rotations, _, steps, group_size = rotation.order.shape
    plan = cost_model.plan_layer(
        max(len(rows), 1),
        rows.shape[1],
        weight.words.shape[1],
        group_size,
        steps - 1,
        architecture_of(x.device),
        rotations=rotations,
    )
    return run_plan(plan, rows, rotation, weight, bias, ends, locks)


def run_plan(
    plan: cost_model.Plan,
    rows: Tensor,
    rotation: PackedRotation,
    weight: PackedWeight,
    bias: Tensor | None,
    ends: Sequence[int],
    locks: Tensor,
) -> Tensor:
    """Launch what a plan says on `rows (M, K)`; arguments as `rotate_int4_linear`'s."""
    ptx = uses_ptx(rows.device)
    if isinstance(plan.linear, FusedTiles):
        return launch_rotate_int4_linear(rows, rotation, weight, bias, ends, locks, plan.linear, ptx=ptx)
    assert plan.rotation is not None
    if isinstance(plan.rotation, DenseTiles):
        rotated = launch_rotate_dense(rows, rotation, plan.rotation)
    else:
        rotated = launch_rotate(rows, rotation, plan.rotation)
    return _product(plan.linear, rotated, weight, bias, ends, rotation.order.shape[-1], locks)


def _product(
    tiles: LinearTiles | DequantizeTiles,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    ends: Sequence[int],
    group_size: int,
    locks: Tensor,
) -> Tensor:
    """Multiply rotated activations `x (S, M, K)` as the cost model chose."""
    ptx = uses_ptx(x.device)
    if isinstance(tiles, DequantizeTiles):
        return launch_dequantize_linear(x, weight, bias, ends, group_size, tiles, ptx=ptx)
    return launch_int4_linear(x, weight, bias, ends, group_size, locks, tiles, ptx=ptx)


def as_rows(x: Tensor) -> Tensor:
    """Return `x (…, K)` as `(M, K)` with contiguous channels; copied if its strides do not allow a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
