"""What a rounding step costs: the energy `T_g` of a group's transformed activations that its error meets.

Rounded to nearest, the errors of a group's columns meet its inputs' power. With error feedback each column's error is
taken over by the columns behind it, and what is left meets the variance that these do not predict, `d_k` of
`H' = L diag(d) Lᵀ` (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from parofx.calibration.feedback import lower_factor

#: Input channels below this share of their group's mean power count as that: they may just have been silent so far.
POWER_FLOOR = 1e-4


class ActivationEnergy(Protocol):
    """`T_g` of every group, under matrices `R (K/g, out, in)` behind the division by `alpha (K/g, 1, g)`.

    Attributes:
        power: `E[x_k²]`, fp32 `(K/g, g)`, in any unit; that of `T_g` is the same.
        is_costly: whether gradients take so long that a step of a fit may take those of the step before.
    """

    power: Tensor
    is_costly: bool

    def totals(self, matrices: Tensor, alpha: Tensor) -> Tensor:
        """Return `T_g (K/g,)` in fp64."""

    def gradients(self, matrices: Tensor, alpha: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of `Σ_g log T_g` for the matrices, None if it is 0, and for log α `(K/g, g)`."""


class DiagonalEnergy:
    """`T_g = Σ_{k∈g} E[x_k²]/α_k²`, that of rounding to nearest: a rotation keeps a trace.

    Args:
        power: `E[x_k²]`, fp32 `(K,)`.
        group_size: channels per group, g.
    """

    is_costly = False

    def __init__(self, power: Tensor, group_size: int) -> None:
        grouped = power.view(-1, group_size)
        mean = grouped.mean(1, keepdim=True)
        # A group whose inputs are all silent is fitted as if they were all alike.
        self.power = torch.where(mean > 0, grouped.clamp(min=POWER_FLOOR * mean), 1.0)

    def totals(self, matrices: Tensor, alpha: Tensor) -> Tensor:
        """Return `T_g (K/g,)` in fp64."""
        return (self.power / alpha[:, 0].square()).double().sum(1)

    def gradients(self, matrices: Tensor, alpha: Tensor) -> tuple[None, Tensor]:
        """Return no gradient for the matrices, and that for log α."""
        energy = self.power / alpha[:, 0].square()
        return None, -2 * energy / energy.sum(1, keepdim=True)


class FeedbackEnergy:
    """`T_g = Σ_{k∈g} d_k`, that of error feedback, which takes a group's columns in order of falling power.

    Groups of more power are rounded first, and what the others predict of their inputs does not depend on the others'
    transforms: each group's can be fitted for itself.

    Args:
        gram: `E[x xᵀ]`, `(K, K)`.
        group_size: channels per group, g.
        damping: relative to a group's mean power, above 0, as `feedback.damped` has it for all groups together.
    """

    is_costly = True

    def __init__(self, gram: Tensor, group_size: int, damping: float) -> None:
        diagonal = gram.diagonal().float()
        self.power = DiagonalEnergy(diagonal / diagonal.amax().clamp(min=1e-30), group_size).power
        self._moments = conditional_moments(gram, self.power, damping)
        self._share = damping / group_size

    def totals(self, matrices: Tensor, alpha: Tensor) -> Tensor:
        """Return `T_g (K/g,)` in fp64."""
        mixed = (matrices / alpha).double()
        ordered, _ = _ordered(self._damped(mixed @ self._moments.double() @ mixed.mT, alpha))
        factor = lower_factor(ordered)
        return factor.diagonal(dim1=1, dim2=2).square().sum(1)

    def gradients(self, matrices: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients for the matrices and for log α.

        `d_k = v_kᵀ H' v_k` with the rows `v_k` of the inverse of the unit factor, which make it smallest: to first
        order they stay as they are, so that `dT = tr(V dH' Vᵀ)`.
        """
        mixed = matrices / alpha
        half = torch.bmm(mixed, self._moments)
        # Not checked, which would wait for a GPU at every step: a fit that goes astray ends above its start.
        ordered, order = _ordered(self._damped(torch.bmm(half, mixed.mT), alpha))
        factor: Tensor = torch.linalg.cholesky_ex(ordered)[0]
        size = factor.diagonal(dim1=1, dim2=2)
        identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False) * size[..., None]
        unsorted = torch.empty_like(inverse).scatter_(2, order[:, None].expand_as(inverse), inverse)
        total = size.square().sum(1)[:, None, None]
        grad = 2 / total * torch.bmm(unsorted.mT, torch.bmm(unsorted, half))
        # Of the damping, which adds the same to all channels.
        trace = unsorted.square().sum((1, 2))[:, None]
        of_damping = -2 * self._share * trace * self.power / alpha[:, 0].square() / total[:, 0]
        return grad / alpha, of_damping - (grad * mixed).sum(1)

    def _damped(self, moments: Tensor, alpha: Tensor) -> Tensor:
        added = self._share * (self.power / alpha[:, 0].square()).sum(1)
        moments.diagonal(dim1=1, dim2=2).add_(added[:, None])
        return moments


def conditional_moments(gram: Tensor, power: Tensor, damping: float) -> Tensor:
    """Return the moments of each group's inputs given those of all groups of less power, fp32 `(K/g, g, g)`.

    Args:
        gram: `E[x xᵀ]`, `(K, K)`.
        power: its diagonal above 0, `(K/g, g)`, whose unit the result has.
        damping: added to the power of each channel, as a share of it, in the groups given.
    """
    groups, size = power.shape
    order = power.sum(1).argsort()
    channels = (order[:, None] * size + torch.arange(size, device=gram.device)).view(-1)
    # Correlations first: powers may differ by more than fp64 holds.
    norms = gram.diagonal().double().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    full = (gram.double() / norms / norms[:, None])[channels][:, channels]
    full.diagonal().fill_(1 + damping)
    factor = lower_factor(full).view(groups, size, groups, size)
    blocks = factor.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    given = blocks @ blocks.mT
    given.diagonal(dim1=1, dim2=2).sub_(damping)
    own = torch.empty_like(given).index_copy_(0, order, given)
    root = power.double().sqrt()
    return (own * root[:, :, None] * root[:, None]).float()


def _ordered(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return `moments (G, g, g)` with channels of least power first, as their factor takes them, and that order."""
    order = moments.diagonal(dim1=1, dim2=2).argsort(1)
    sorted_rows = moments.gather(1, order[:, :, None].expand_as(moments))
    return sorted_rows.gather(2, order[:, None].expand_as(moments)), order
