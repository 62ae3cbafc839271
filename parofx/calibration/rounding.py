"""Rounding to nearest: the clipped range of every quantization group, chosen by its expected output error.

For an error Δ of one row's group and the second moments `H_g` of that group's inputs the expected squared output
error is `Δ H_g Δᵀ` (correlations between groups are left out); without statistics it is taken as `Δ Δᵀ`. Where error
feedback follows, the columns behind a column make up for what they know of it: `Σ_k d_k Δ_k²` is left, with
`H = L diag(d) Lᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parofx.affine import choose_qparams, fake_quantize, grouped, qparams_of, ranges
from parofx.errors import ConfigError, ShapeError
from parofx.rotation import dense_form

#: Elements of the weight worked on at a time: several buffers of this size stay in the cache.
_CHUNK_ELEMENTS = 1 << 19


def rotated_block_gram(
    block_gram: Tensor, pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int
) -> Tensor:
    """Return the second moments `Mᵀ D H D M` of the rotated inputs, fp32 `(K/g, g, g)`.

    Args:
        block_gram: `H = E[x xᵀ]` inside each group, `(K/g, g, g)`.
        pairs: `(krot, K)`.
        theta: `(krot, K/2)`; M is the rotation's dense form.
        channel_scales: 1/α, `(K,)` or `(1, K)`; `D = diag(channel_scales)`.
        group_size: channels per group, g.

    Raises:
        ShapeError: if the tensors do not fit together.
    """
    _check_block_gram(block_gram, pairs.shape[1], group_size)
    matrix = channel_scales.float().view(-1, group_size, 1) * dense_form(pairs, theta.float(), group_size)
    return torch.bmm(matrix.transpose(1, 2), torch.bmm(block_gram.float(), matrix))


def rotated_gram(gram: Tensor, pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int) -> Tensor:
    """Return the second moments of the rotated inputs between all channels, fp32 `(K, K)`, for `gram (K, K)`.

    Raises:
        ShapeError: if the tensors do not fit together.
    """
    in_features = pairs.shape[1]
    if tuple(gram.shape) != (in_features, in_features):
        raise ShapeError(f"gram must be {(in_features, in_features)} to fit the rotation, got {tuple(gram.shape)}")
    matrix = channel_scales.float().view(-1, group_size, 1) * dense_form(pairs, theta.float(), group_size)
    rotated = gram.float()
    for _ in range(2):
        rows = torch.bmm(matrix.transpose(1, 2), rotated.view(-1, group_size, in_features))
        rotated = rows.view(in_features, in_features).t().contiguous()
    return rotated


def choose_clipped_qparams(
    w_rot: Tensor, *, bits: int, group_size: int, clip_ratios: Sequence[float], moments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the `(scales, zeros)` of `affine.choose_qparams` for the best shrink factor of each row's group.

    Args:
        w_rot: scaled and rotated weight `(N, K)`.
        bits: width of a weight.
        group_size: channels per group, g.
        clip_ratios: shrink factors of the min/max range to try; of equal errors the first wins.
        moments: of the rotated inputs, `(K/g, g, g)`, or what weighs the squares of errors, `(K/g, g)`; None weighs
            them alike.

    Returns:
        Scales (rounded to fp16) and integer zeros, both fp32 `(N, K/g)`.

    Raises:
        ShapeError: if the tensors do not fit together.
        ConfigError: if there is no ratio.
    """
    if not clip_ratios:
        raise ConfigError("clip_ratios must hold at least one ratio, got none; pass (1.0,) to leave ranges alone")
    scales, zeros = choose_qparams(w_rot, bits, group_size, shrink=clip_ratios[0])
    if moments is None or moments.dim() != 2:
        _check_block_gram(moments, w_rot.shape[1], group_size)
    elif tuple(moments.shape) != (w_rot.shape[1] // group_size, group_size):
        expected = (w_rot.shape[1] // group_size, group_size)
        raise ShapeError(f"weights of squares must be {expected}, got {tuple(moments.shape)}")
    for chunk in _row_chunks(w_rot):
        rows, best_scales, best_zeros = w_rot[chunk].float(), scales[chunk], zeros[chunk]
        best_error = torch.full_like(best_scales, torch.inf)
        low, high = ranges(rows, group_size)
        for ratio in clip_ratios:
            candidate = qparams_of(low * ratio, high * ratio, bits)
            delta = grouped(fake_quantize(rows, *candidate, bits, group_size).sub_(rows), group_size)
            error = _squared_error(delta, moments)
            better = error < best_error
            for best, value in ((best_error, error), (best_scales, candidate[0]), (best_zeros, candidate[1])):
                torch.where(better, value, best, out=best)
    return scales, zeros


def relative_error(w_rot: Tensor, w_hat: Tensor, block_gram: Tensor | None) -> float:
    """Return the expected squared output error of `w_hat` over the expected squared output of `w_rot`.

    Args:
        w_rot: weight `(N, K)`.
        w_hat: its quantized form, in the same space.
        block_gram: second moments of the inputs in that space, `(K/g, g, g)`; None for plain squares.

    Raises:
        ShapeError: if the tensors do not fit together.
    """
    return relative_errors(w_rot, [w_hat], block_gram)[0]


def relative_errors(w_rot: Tensor, rounded: Sequence[Tensor], block_gram: Tensor | None) -> tuple[float, ...]:
    """Return the `relative_error` of several quantized forms of one weight."""
    for w_hat in rounded:
        if w_rot.dim() != 2 or w_rot.shape != w_hat.shape:
            raise ShapeError(
                f"weights must be two matrices of one shape, got {tuple(w_rot.shape)} and {tuple(w_hat.shape)}"
            )
    group_size = w_rot.shape[1] if block_gram is None else block_gram.shape[-1]
    _check_block_gram(block_gram, w_rot.shape[1], group_size)
    errors, energy = [0.0] * len(rounded), 0.0
    # Squares of very small or very large weights would leave the range of fp32.
    largest = float(w_rot.abs().max()) if w_rot.numel() else 0.0
    unit = largest or 1.0
    for chunk in _row_chunks(w_rot):
        rows = w_rot[chunk].float() / unit
        energy += _squared_error(grouped(rows, group_size), block_gram).double().sum().item()
        for index, w_hat in enumerate(rounded):
            delta = w_hat[chunk].float() / unit - rows
            errors[index] += _squared_error(grouped(delta, group_size), block_gram).double().sum().item()
    return tuple(error / energy if energy > 0 else 0.0 for error in errors)


def _squared_error(delta: Tensor, moments: Tensor | None) -> Tensor:
    """Return `Δ H_g Δᵀ (N, K/g)` for errors `(N, K/g, g)`; of `(K/g, g)` moments the sum of weighted squares."""
    if moments is None:
        return delta.square().sum(-1)
    if moments.dim() == 2:
        return torch.einsum("ngk,gk->ng", delta.square(), moments.float())
    weighted = torch.bmm(delta.transpose(0, 1), moments.float()).transpose(0, 1)
    return (weighted * delta).sum(-1)


def _row_chunks(weight: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return [slice(first, first + step) for first in range(0, len(weight), step)]


def _check_block_gram(block_gram: Tensor | None, in_features: int, group_size: int) -> None:
    expected = (in_features // group_size, group_size, group_size)
    if block_gram is not None and tuple(block_gram.shape) != expected:
        raise ShapeError(
            f"block_gram must be {expected} for {in_features} channels at group_size {group_size}, "
            f"got {tuple(block_gram.shape)}"
        )
