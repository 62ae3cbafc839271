"""The producers that rotate, as functions of tensors of any shape; as `launch` for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from parofx.triton_ops.launch import as_rows
from parofx.triton_ops.layout import PackedRotation
from parofx.triton_ops.producer_tiles import gate_tiles, norm_tiles
from parofx.triton_ops.rmsnorm_rotate import rmsnorm_rotate as launch_rmsnorm_rotate
from parofx.triton_ops.silu_mul_rotate import silu_mul_rotate as launch_silu_mul_rotate

#: Threads that execute together.
_WARP_SIZE = 32 if torch.version.hip is None else 64


def rmsnorm_rotate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    rotation: PackedRotation,
) -> list[Tensor]:
    """Return the normed and rotated `x + residual`, `(S, …, K)`, and with a residual that sum, `(…, K)`."""
    tiles = norm_tiles(x.shape[-1], rotation.order.shape[-1], _WARP_SIZE)
    rows = None if residual is None else as_rows(residual)
    out, total = launch_rmsnorm_rotate(as_rows(x), rows, weight, weight_offset, eps, rotation, tiles)
    rotated = out.reshape(len(out), *x.shape)
    return [rotated] if total is None else [rotated, total.reshape(x.shape)]


def silu_mul_rotate(gate: Tensor, up: Tensor, rotation: PackedRotation) -> Tensor:
    """Return `ROT_s(silu(gate) ⊙ up ⊙ channel_scales_s)`, `(S, …, K)`."""
    rows = as_rows(gate)
    tiles = gate_tiles(*rows.shape, rotation.order.shape[-1])
    return launch_silu_mul_rotate(rows, as_rows(up), rotation, tiles).reshape(rotation.order.shape[0], *gate.shape)
