"""Scaled pairwise rotation: the transform that moves a linear layer to coordinates where four bits suffice.

Channels are split in groups of `group_size`. A *round* rotates disjoint pairs `(i, j)` inside each group,

    v_i ← cosθ·v_i + sinθ·v_j        v_j ← −sinθ·v_i + cosθ·v_j        (simultaneously)

and `ROT(v) = R_{krot−1}(… R_0(v))`. Every round is orthogonal, so for a linear layer `y = x Wᵀ`

    ROT(x ⊘ α) · ROT(W ⊙ α)ᵀ = x Wᵀ        for any angles θ and any non-zero channel scales α.

| tensor | dtype | shape | holds |
|-|-|-|-|
| `pairs` | int16 | `(krot, K)` | `pairs[r, G·g + 2t]`, `pairs[r, G·g + 2t + 1]`: the pair of slot t, local to group G |
| `theta` | floating | `(krot, K/2)` | `theta[r, G·g/2 + t]`, radians |
| `scales` | floating | `(K,)` or `(1, K)` | multiplies `v` before the rounds |

Everything is computed in the *gather form* `v ← c ⊙ v + s ⊙ v[partner]`, in fp32 (fp64 for fp64 inputs) across the
rounds, and rounded once at the end. Source: ParoQuant (arXiv 2511.10645) eq. 3 and 4; the sign is the one of the
published checkpoints, the transpose of eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from parofx.errors import ShapeError

#: What is rotated at a time, so that an output head, with its hundreds of thousands of rows, is not held six times.
BLOCK_ELEMENTS = 2**24


class GatherForm(NamedTuple):
    """Rounds as gathers: `v ← cos[r] ⊙ v + sin[r] ⊙ v[partner[r]]`.

    `partner` is int64 `(krot, K)` with indices over all of K; `cos` and `sin` are `(krot, K)`, `sin` signed.
    """

    partner: Tensor
    cos: Tensor
    sin: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rotations of a tensor of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_shapes(in_features: int, pairs: Tensor, theta: Tensor, scales: Tensor | None, group_size: int) -> None:
    """Check that a rotation fits `in_features` channels.

    Raises:
        ShapeError: naming the tensor, what was expected and what came.
    """
    if group_size < 2 or group_size % 2:
        raise ShapeError(f"group_size must be even and at least 2, got {group_size}")
    if in_features % group_size:
        raise ShapeError(
            f"group_size must divide in_features: got {group_size} and {in_features}; pass another group_size"
        )
    if pairs.dim() != 2 or pairs.shape[1] != in_features or pairs.is_floating_point():
        raise ShapeError(
            f"pairs must be an integer tensor (krot, {in_features}), got {pairs.dtype} {tuple(pairs.shape)}"
        )
    if tuple(theta.shape) != (pairs.shape[0], in_features // 2) or not theta.is_floating_point():
        raise ShapeError(
            f"theta must be a floating tensor {(pairs.shape[0], in_features // 2)} to fit pairs, "
            f"got {theta.dtype} {tuple(theta.shape)}"
        )
    if scales is not None and tuple(scales.shape) not in ((in_features,), (1, in_features)):
        raise ShapeError(f"scales must be ({in_features},) or (1, {in_features}), got {tuple(scales.shape)}")


def check_pairs(pairs: Tensor, group_size: int, where: str = "pairs") -> None:
    """Check that each round pairs every channel of each group exactly once.

    Raises:
        ShapeError: naming the first round and group that is no permutation of `0..group_size−1`.
    """
    krot, in_features = pairs.shape
    grouped = pairs.reshape(krot, in_features // group_size, group_size).long()
    expected = torch.arange(group_size, device=pairs.device)
    wrong = (grouped.sort(-1).values != expected).any(-1).nonzero()
    if len(wrong):
        rounds, group = wrong[0].tolist()
        raise ShapeError(
            f"{where}: round {rounds}, group {group} must be a permutation of 0..{group_size - 1}, "
            f"got {grouped[rounds, group].tolist()}"
        )


def gather_form(pairs: Tensor, theta: Tensor, group_size: int) -> GatherForm:
    """Return the rounds in gather form, `cos` and `sin` in the compute dtype of `theta`.

    Args:
        pairs: integer `(krot, K)`.
        theta: `(krot, K/2)`, radians.
        group_size: channels per group.
    """
    krot, in_features = pairs.shape
    first, second, slot = _pair_indices(pairs, group_size)
    partner = torch.empty(krot, in_features, dtype=torch.int64, device=pairs.device)
    partner.scatter_(1, first, second).scatter_(1, second, first)
    sign = torch.ones(krot, in_features, dtype=compute_dtype(theta.dtype), device=theta.device)
    sign.scatter_(1, second, -1.0)
    angle = theta.to(compute_dtype(theta.dtype)).gather(1, slot)
    return GatherForm(partner, angle.cos(), angle.sin() * sign)


def rotate(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return `ROT(v ⊙ scales)` for `v (…, K)`, in `v`'s dtype.

    Activations pass the checkpoint's `channel_scales` (1/α), weights `(N, K)` its reciprocal.

    Raises:
        ShapeError: if a tensor does not fit.
    """
    check_shapes(v.shape[-1], pairs, theta, scales, group_size)
    if not v.is_floating_point():
        raise ShapeError(f"v must be a floating tensor, got {v.dtype}")
    dtype = compute_dtype(v.dtype)
    form = _gather_form_for(dtype, pairs, theta, group_size)
    scale = scales.reshape(-1).to(dtype)

    def rotated(rows: Tensor) -> Tensor:
        channels = _channels_first(rows.to(dtype) * scale)
        return _channels_last(_apply_rounds(channels, form), rows.shape).to(v.dtype)

    return _by_rows(rotated, v, (v, theta, scales))


def inverse_rotate(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return `ROT⁻¹(v) ⊘ scales`: rounds reversed, angles negated, then the scale undone.

    Raises:
        ShapeError: if a tensor does not fit.
    """
    check_shapes(v.shape[-1], pairs, theta, scales, group_size)
    if not v.is_floating_point():
        raise ShapeError(f"v must be a floating tensor, got {v.dtype}")
    dtype = compute_dtype(v.dtype)
    form = _gather_form_for(dtype, pairs, theta, group_size)
    scale = scales.reshape(-1).to(dtype)

    def restored(rows: Tensor) -> Tensor:
        channels = _undo_rounds(_channels_first(rows.to(dtype)), form)
        return (_channels_last(channels, rows.shape) / scale).to(v.dtype)

    return _by_rows(restored, v, (v, theta, scales))


def rotate_backward(
    grad: Tensor, v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `rotate` for `v`, `theta` and `scales`, storing no intermediate round.

    The rounds are walked backwards: before each is undone on the values `y` and on their gradient `g`, its angles'
    gradient is read off, `dL/dθ = Σ_rows (g_i·y_j − g_j·y_i)` (values and gradient after the round).
    """
    dtype = compute_dtype(v.dtype)
    form = _gather_form_for(dtype, pairs, theta, group_size)
    scale = scales.reshape(-1).to(dtype)
    values = _apply_rounds(_channels_first(v.to(dtype) * scale), form)
    values, gradient, grad_theta = _undo_rounds_with_gradient(
        values, _channels_first(grad.to(dtype)), form, _pair_indices(pairs, group_size)
    )
    grad_scaled = _channels_last(gradient, v.shape)
    grad_scales = (grad_scaled * v.to(dtype)).reshape(-1, v.shape[-1]).sum(0).reshape(scales.shape)
    return (grad_scaled * scale).to(v.dtype), grad_theta.to(theta.dtype), grad_scales.to(scales.dtype)


def dense_form(pairs: Tensor, theta: Tensor, group_size: int) -> Tensor:
    """Return the rotation as one orthogonal matrix per group, `(K/g, g, g)`; differentiable in `theta`.

    Row-vector convention: `ROT(v)` of a group is `v_group @ matrix`.
    """
    check_shapes(pairs.shape[1], pairs, theta, None, group_size)
    result: Tensor = _DenseForm.apply(theta, pairs, group_size)  # type: ignore[no-untyped-call]
    return result


class _DenseForm(torch.autograd.Function):
    """The rounds applied to identity matrices, with the memory-lean backward of `rotate_backward`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, theta: Tensor, pairs: Tensor, group_size: int) -> Tensor:
        form = gather_form(pairs, theta, group_size)
        groups = pairs.shape[1] // group_size
        eye = torch.eye(group_size, dtype=form.cos.dtype, device=theta.device)
        values = _apply_rounds(eye.repeat(groups, 1), form)
        ctx.save_for_backward(values, pairs, theta)
        ctx.group_size = group_size  # type: ignore[attr-defined]
        return values.view(groups, group_size, group_size).transpose(1, 2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        values, pairs, theta = ctx.saved_tensors  # type: ignore[attr-defined]
        group_size: int = ctx.group_size  # type: ignore[attr-defined]
        gradient = grads[0].transpose(1, 2).reshape(values.shape)
        form = gather_form(pairs, theta, group_size)
        pair_indices = _pair_indices(pairs, group_size)
        _, _, grad_theta = _undo_rounds_with_gradient(values, gradient, form, pair_indices)
        return grad_theta.to(theta.dtype), None, None


def _pair_indices(pairs: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each slot's two channels over all of K, `(krot, K/2)`, and each channel's slot, `(krot, K)`."""
    krot, in_features = pairs.shape
    offset = torch.arange(in_features, device=pairs.device) // group_size * group_size
    absolute = pairs.long() + offset
    first, second = absolute[:, 0::2], absolute[:, 1::2]
    slot = torch.empty(krot, in_features, dtype=torch.int64, device=pairs.device)
    slots = torch.arange(in_features // 2, device=pairs.device).expand(krot, -1)
    slot.scatter_(1, first, slots).scatter_(1, second, slots)
    return first, second, slot


def _gather_form_for(dtype: torch.dtype, pairs: Tensor, theta: Tensor, group_size: int) -> GatherForm:
    """The gather form for values computed in `dtype`: cosines of narrower angles are as exact as the values."""
    form = gather_form(pairs, theta.to(torch.promote_types(theta.dtype, dtype)), group_size)
    return GatherForm(form.partner, form.cos.to(dtype), form.sin.to(dtype))


def _by_rows(function: Callable[[Tensor], Tensor], v: Tensor, inputs: Iterable[Tensor]) -> Tensor:
    """Apply a function of each row of `v (…, K)` to some rows at a time, where that keeps a round's copies small.

    Gradients are recorded for all rows at once.
    """
    whole = v.numel() <= BLOCK_ELEMENTS or torch.compiler.is_compiling()
    if whole or (torch.is_grad_enabled() and any(one.requires_grad for one in inputs)):
        return function(v)
    rows = v.reshape(-1, v.shape[-1])
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    count = max(1, BLOCK_ELEMENTS // v.shape[-1])
    for source, target in zip(torch.split(rows, count), torch.split(result, count), strict=True):
        target.copy_(function(source))
    return result.view(v.shape)


def _channels_first(v: Tensor) -> Tensor:
    """`(…, K)` → contiguous `(K, rows)`: gathering channels then copies whole rows."""
    return v.reshape(-1, v.shape[-1]).t().contiguous()


def _channels_last(channels: Tensor, shape: torch.Size) -> Tensor:
    return channels.t().reshape(shape)


def _apply_rounds(channels: Tensor, form: GatherForm) -> Tensor:
    for partner, cos, sin in zip(*form, strict=True):
        gathered = channels.index_select(0, partner)
        channels = torch.addcmul(channels * cos[:, None], gathered, sin[:, None])
    return channels


def _undo_rounds(channels: Tensor, form: GatherForm) -> Tensor:
    for partner, cos, sin in zip(*(part.flip(0) for part in form), strict=True):
        gathered = channels.index_select(0, partner)
        channels = torch.addcmul(channels * cos[:, None], gathered, sin[:, None], value=-1)
    return channels


def _undo_rounds_with_gradient(
    values: Tensor, gradient: Tensor, form: GatherForm, pair_indices: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, _ = pair_indices
    grad_theta = torch.zeros(first.shape, dtype=values.dtype, device=values.device)
    for r in reversed(range(len(form.partner))):
        partner, cos, sin = form.partner[r], form.cos[r][:, None], form.sin[r][:, None]
        values_partner = values.index_select(0, partner)
        per_channel = (gradient * values_partner).sum(1)
        grad_theta[r] = per_channel[first[r]] - per_channel[second[r]]
        values = torch.addcmul(values * cos, values_partner, sin, value=-1)
        gradient = torch.addcmul(gradient * cos, gradient.index_select(0, partner), sin, value=-1)
    return values, gradient, grad_theta
