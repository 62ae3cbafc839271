"""Rotation rounds as dense matrices with a hand-written gradient: the hot path of fitting.

It computes what `parofx.rotation.dense_form` does, transposed, and reuses the index tensors between steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parofx.calibration import compiled
from parofx.rotation import check_pairs, check_shapes


class DenseRounds:
    """The rounds of fixed `pairs`, applied to the identity of every group for varying angles.

    Args:
        pairs: integer `(krot, K)`.
        group_size: channels per group, g.

    Raises:
        ShapeError: if `group_size` does not divide K, or a round does not pair every channel of a group once.
    """

    def __init__(self, pairs: Tensor, group_size: int) -> None:
        krot, in_features = pairs.shape
        check_shapes(in_features, pairs, torch.empty(krot, in_features // 2), None, group_size)
        check_pairs(pairs, group_size)
        device = pairs.device
        absolute = pairs.long() + torch.arange(in_features, device=device) // group_size * group_size
        self._group_size = group_size
        self._first, self._second = absolute[:, 0::2].contiguous(), absolute[:, 1::2].contiguous()
        self._partner = torch.empty_like(absolute)
        self._partner.scatter_(1, self._first, self._second).scatter_(1, self._second, self._first)
        self._identity = torch.eye(group_size, dtype=torch.float32, device=device).repeat(in_features // group_size, 1)
        self._cos = self._sin = torch.empty(0)
        # Written anew by each `forward`: allocating megabytes per step costs more than the arithmetic on them.
        self._after = torch.empty(krot, in_features, group_size, dtype=torch.float32, device=device)

    def forward(self, theta: Tensor) -> Tensor:
        """Return `(K/g, out, in)`, so that a group of `ROT(v)` is `matrix @ v_group`, and remember the rounds.

        The next call overwrites the result.

        Args:
            theta: `(krot, K/2)`, computed with in fp32.
        """
        cos, sin = theta.float().cos(), theta.float().sin()
        per_channel = torch.empty_like(self._partner, dtype=torch.float32)
        self._cos = per_channel.scatter(1, self._first, cos).scatter_(1, self._second, cos)
        self._sin = per_channel.scatter_(1, self._first, sin).scatter_(1, self._second, -sin)
        if self._is_compiled():
            torch.ops.parofx_cpu.dense_rounds(self._after, self._partner, self._cos, self._sin)
            return self._after[-1].view(-1, self._group_size, self._group_size)
        values = self._identity
        for r, after in enumerate(self._after):
            partner, cos, sin = self._round(r)
            values = torch.mul(values, cos, out=after).addcmul_(values.index_select(0, partner), sin)
        return values.view(-1, self._group_size, self._group_size)

    def backward(self, grad: Tensor) -> Tensor:
        """Return `dL/dθ (krot, K/2)` for the gradient of the matrices that `forward` returned last.

        With values `y` and gradient `g` after a round, `dL/dθ = Σ (g_i·y_j − g_j·y_i)`; then `g` is rotated back.
        """
        grad = grad.reshape(self._identity.shape).float()
        crossed = torch.empty_like(self._partner, dtype=torch.float32)
        if self._is_compiled():
            given = self._partner, self._cos, self._sin
            torch.ops.parofx_cpu.dense_rounds(self._after, *given, grad.contiguous(), crossed)
            return crossed.gather(1, self._first) - crossed.gather(1, self._second)
        for r in reversed(range(len(self._after))):
            partner, cos, sin = self._round(r)
            torch.sum(self._after[r].index_select(0, partner).mul_(grad), 1, out=crossed[r])
            grad = (grad * cos).addcmul_(grad.index_select(0, partner), sin, value=-1)
        return crossed.gather(1, self._first) - crossed.gather(1, self._second)

    def _round(self, r: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._partner[r], self._cos[r][:, None], self._sin[r][:, None]

    def _is_compiled(self) -> bool:
        fits = len(self._after) > 0 and self._group_size % 16 == 0 and self._group_size <= 128
        return fits and compiled.has_loops_for(self._after)
