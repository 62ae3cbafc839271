"""Second moments of the input channels of one transform, gathered batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from parofx.errors import DataError, ShapeError


class InputStatistics:
    """Mean outer products of input rows inside each group of channels.

    Products are summed in fp32 within a batch, of rows divided by the batch's largest magnitude so that nothing
    overflows, and in fp64 between batches. It holds `8·K·g` bytes, however many rows it sees.

    Args:
        in_features: input channels, K.
        group_size: channels per group, g.

    Raises:
        ShapeError: if the group size does not divide `in_features`.
    """

    def __init__(self, in_features: int, group_size: int) -> None:
        if group_size < 1 or in_features < 1 or in_features % group_size:
            raise ShapeError(
                f"group_size must divide in_features: got {group_size} and {in_features}; pass another group_size"
            )
        self.group_size = group_size
        self.count = 0
        self._sums = torch.zeros(in_features // group_size, group_size, group_size, dtype=torch.float64)

    @property
    def in_features(self) -> int:
        """Input channels, K."""
        return len(self._sums) * self.group_size

    @property
    def block_gram(self) -> Tensor:
        """`E[x xᵀ]` inside each group, fp32 `(K/g, g, g)`; zeros before the first row."""
        return (self._sums / max(self.count, 1)).float()

    @property
    def power(self) -> Tensor:
        """`E[x²]` per channel, fp32 `(K,)`; zeros before the first row."""
        return (self._sums.diagonal(dim1=1, dim2=2).flatten() / max(self.count, 1)).float()

    def update(self, rows: Tensor, *, where: str = "a transform's inputs") -> None:
        """Add a batch of rows.

        Args:
            rows: `(…, K)`, any floating dtype; no rows at all change nothing.
            where: what is observed, for the message of an error.

        Raises:
            ShapeError: if the rows do not have K channels.
            DataError: if a value is NaN or infinite.
        """
        if rows.dim() == 0 or rows.shape[-1] != self.in_features or not rows.is_floating_point():
            raise ShapeError(
                f"{where}: rows must be floating (…, {self.in_features}), got {rows.dtype} {tuple(rows.shape)}"
            )
        rows = rows.detach().reshape(-1, self.in_features)
        if len(rows) == 0:
            return
        peak = rows.abs().amax().item()
        if not math.isfinite(peak):
            raise DataError(
                f"{where}: rows must be finite, got {_count_not_finite(rows)}; run the float model on this batch in "
                "fp32 or bf16 and drop the texts that overflow"
            )
        self.count += len(rows)
        if peak > 0:
            channels = (rows.float() / peak).view(len(rows), -1, self.group_size).transpose(0, 1)
            gram = torch.bmm(channels.transpose(1, 2), channels)
            self._sums += gram.to(self._sums.device, torch.float64) * peak**2

    def merge(self, other: InputStatistics) -> None:
        """Add the rows that `other` saw.

        Raises:
            ShapeError: if it has other sizes.
        """
        if self._sums.shape != other._sums.shape:
            raise ShapeError(
                f"statistics to merge must have in_features {self.in_features} and group_size {self.group_size}, "
                f"got {other.in_features} and {other.group_size}"
            )
        self.count += other.count
        self._sums += other._sums

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the state: `count` int64 `(1,)` and `sums` fp64 `(K/g, g, g)`."""
        return {"count": torch.tensor([self.count]), "sums": self._sums.clone()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> InputStatistics:
        """Restore the state that `to_tensors` returned.

        Raises:
            ShapeError: if a tensor is missing or has another dtype or shape.
        """
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        sums = tensors.get("sums", torch.empty(0))
        groups, group_size = sums.shape[0], sums.shape[-1]
        expected = {
            "count": (torch.int64, (1,)),
            "sums": (torch.float64, (groups, group_size, group_size)),
        }
        if found != expected:
            raise ShapeError(f"statistics must hold count int64 (1,) and sums float64 (K/g, g, g), got {found}")
        statistics = cls(groups * group_size, group_size)
        statistics.count = int(tensors["count"].item())
        statistics._sums.copy_(sums)
        return statistics


def _count_not_finite(rows: Tensor) -> str:
    return f"{int(rows.isnan().sum())} NaN and {int(rows.isinf().sum())} infinite values of {rows.numel()}"
