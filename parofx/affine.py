"""Asymmetric group-wise affine quantization, `ŵ = (q − zero)·scale`, in plain PyTorch.

One `(scale, zero)` pair serves one output channel and `group_size` input channels: weights are `(N, K)`, scales and
zeros `(N, K/g)`. For a group with minimum `lo ≤ 0` and maximum `hi ≥ 0` (zero is included, or a group of one sign
would be clipped)

    scale = fp16(max((hi − lo)/(2^bits − 1), 1e-5))      zero = clamp(−round(lo/scale), 0, 2^bits − 1)
    q     = clamp(round(w/scale) + zero, 0, 2^bits − 1)

Source: ParoQuant (arXiv 2511.10645) §3 and the published checkpoints; the inclusion of zero is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parofx.config import QUANTIZER_BITS
from parofx.errors import ConfigError, ShapeError

#: Smallest scale; below it a group is all but zero and any finite scale serves.
SMALLEST_SCALE = 1e-5
#: Largest finite fp16: the scale is stored in 16 bit.
LARGEST_SCALE = 65504.0


def quant_max(bits: int) -> int:
    """Return the largest code, `2^bits − 1`.

    Raises:
        ConfigError: if the quantizer does not know the width.
    """
    if bits not in QUANTIZER_BITS:
        raise ConfigError(f"bits must be one of {QUANTIZER_BITS}, got {bits!r}")
    return int(2**bits) - 1


def quant_maxima(bits: int | Tensor) -> float | Tensor:
    """Return the largest code of one width, or of each of a tensor's, in fp32."""
    return (2.0 ** bits.float() - 1) if isinstance(bits, Tensor) else float(quant_max(bits))


def grouped(w: Tensor, group_size: int) -> Tensor:
    """Return `w (N, K)` as `(N, K/g, g)`.

    Raises:
        ShapeError: if `w` is no matrix or the group size does not divide K.
    """
    if w.dim() != 2 or group_size < 1 or w.shape[1] % group_size:
        raise ShapeError(f"weight must be (N, K) with K divisible by group_size {group_size}, got {tuple(w.shape)}")
    return w.reshape(w.shape[0], w.shape[1] // group_size, group_size)


def choose_qparams(w: Tensor, bits: int, group_size: int, *, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Return `(scales, zeros)`, both `(N, K/g)` in fp32, `scales` rounded to fp16 and `zeros` integers.

    Args:
        w: weight `(N, K)`.
        bits: 2, 3, 4 or 8.
        group_size: input channels per group.
        shrink: factor on both ends of the range, below 1 to clip outliers; broadcasts to `(N, K/g)`.
    """
    low, high = ranges(w, group_size)
    return qparams_of(low * shrink, high * shrink, bits)


def ranges(w: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the ends `lo ≤ 0` and `hi ≥ 0` of each group's range, fp32 `(N, K/g)`."""
    parts = grouped(w, group_size).float()
    return parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)


def qparams_of(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the `(scales, zeros)` of ranges."""
    top = quant_max(bits)
    scales = ((high - low) / top).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    zeros = (-torch.round(low / scales)).clamp(0, top)
    return scales, zeros


def quantize(w: Tensor, scales: Tensor, zeros: Tensor, bits: int | Tensor, group_size: int) -> Tensor:
    """Return the codes `q (N, K)`, uint8; `bits` are those of all rows, or of each, `(N,)`."""
    _check_qparams(w, scales, zeros, group_size)
    # In place, for the sake of output heads, which are large.
    codes = (grouped(w, group_size).float() / scales[..., None]).round_().add_(zeros[..., None])
    top = quant_maxima(bits)
    codes = codes.clamp_(min=0).minimum(top[:, None, None]) if isinstance(top, Tensor) else codes.clamp_(0, top)
    return codes.to(torch.uint8).reshape(w.shape)


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """Return `ŵ (N, K) = (q − zeros)·scales`, in the dtype of `scales`."""
    _check_qparams(q, scales, zeros, group_size)
    codes = grouped(q, group_size).to(scales.dtype)
    return ((codes - zeros.to(scales.dtype)[..., None]) * scales[..., None]).reshape(q.shape)


def fake_quantize(w: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """Return `dequantize(quantize(w))` in `w`'s dtype, computed in fp32 (fp64 for fp64 weights).

    `zeros` may be fractional while they are trained; they are rounded and clamped here.
    """
    _check_qparams(w, scales, zeros, group_size)
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    top = quant_max(bits)
    scale, zero = scales.to(dtype)[..., None], torch.round(zeros.to(dtype)).clamp(0, top)[..., None]
    codes = (grouped(w, group_size).to(dtype) / scale).round_().add_(zero).clamp_(0, top)
    return codes.sub_(zero).mul_(scale).reshape(w.shape).to(w.dtype)


def fake_quantize_backward(
    grad: Tensor, w: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return straight-through gradients of `fake_quantize` for `w`, `scales` and `zeros`.

    Rounding counts as the identity. Where the code is inside its range, `∂ŵ/∂w = 1`, `∂ŵ/∂scale = (q − zero) − w/scale`
    and `∂ŵ/∂zero = 0`; where it is clamped, `0`, `q − zero` and `−scale`.
    """
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    top = quant_max(bits)
    scale, zero = scales.to(dtype)[..., None], torch.round(zeros.to(dtype)).clamp(0, top)[..., None]
    ratio = grouped(w, group_size).to(dtype) / scale
    raw = torch.round(ratio) + zero
    inside = (raw >= 0) & (raw <= top)
    steps = raw.clamp(0, top) - zero
    gradient = grouped(grad, group_size).to(dtype)
    grad_w = torch.where(inside, gradient, 0.0).reshape(w.shape).to(w.dtype)
    grad_scales = (gradient * torch.where(inside, steps - ratio, steps)).sum(-1).to(scales.dtype)
    grad_zeros = torch.where(inside, 0.0, -gradient * scale).sum(-1)
    in_range = (zeros >= 0) & (zeros <= top)
    return grad_w, grad_scales, torch.where(in_range, grad_zeros, 0.0).to(zeros.dtype)


def _check_qparams(w: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> None:
    expected = (w.shape[0], grouped(w, group_size).shape[1])
    if tuple(scales.shape) != expected or tuple(zeros.shape) != expected:
        raise ShapeError(
            f"scales and zeros must be {expected} for a weight {tuple(w.shape)} at group_size {group_size}, "
            f"got {tuple(scales.shape)} and {tuple(zeros.shape)}"
        )
