"""Second moments of the input channels of one transform, gathered batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from parofx.errors import DataError, ShapeError
from parofx.precision import product_precision

#: Columns of full second moments computed at a time: what lies above the diagonal is mirrored, not computed.
_COLUMNS = 256
#: Output channels that are converted to fp32 at a time.
OUTPUT_CHUNK = 4096
#: Least squared norm of an output that errors are relative to, in units of what chance gives.
_LEAST_OUTPUT = 1e-3


class OutputNorm:
    """The lengths of what siblings make of rows, `‖[W₁; W₂; …] x‖`.

    Where there are more outputs than inputs, it is computed by `xᵀ (Σ Wᵢᵀ Wᵢ) x`, which takes K² products a row.

    Args:
        weights: of the siblings, `(N_i, K)`.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = [weight.detach() for weight in weights]
        self._product: Tensor | None = None
        squares = sum(float(weight.float().square().sum()) for weight in self._weights)
        self._by_chance = squares / self._weights[0].shape[1]

    def divide(self, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return fp32 `rows (n, K)` divided by these lengths `(n,)`, which are computed unless they are known.

        Rows that the weights map to almost nothing are divided by what chance would make of them, times a small factor.
        """
        squares = self._squares(rows).clamp(min=0.0) if lengths is None else lengths.square()
        squares = squares + _LEAST_OUTPUT * self._by_chance * rows.square().sum(-1)
        return rows * torch.where(squares > 0, squares, torch.inf).rsqrt()[:, None]

    def _parts(self) -> Iterator[Tensor]:
        """Yield the weights in fp32, some output channels at a time."""
        for weight in self._weights:
            for part in torch.split(weight, OUTPUT_CHUNK):
                yield part.float()

    def _squares(self, rows: Tensor) -> Tensor:
        with product_precision("exact"):
            if sum(map(len, self._weights)) <= rows.shape[-1]:
                outputs = [torch.nn.functional.linear(rows, weight.float()) for weight in self._weights]
                return torch.stack([one.square().sum(-1) for one in outputs]).sum(0)
            if self._product is None:
                self._product = rows.new_zeros(rows.shape[-1], rows.shape[-1])
                for part in self._parts():
                    self._product.addmm_(part.t(), part)
            return (rows @ self._product).mul_(rows).sum(-1)


class InputStatistics:
    """Mean outer products of input rows, inside each group of channels or between all channels.

    Products are summed in fp32 within a batch, of rows divided by a power of two about the batch's largest magnitude so
    that nothing overflows, and in fp64 between batches. It holds `8·K·g` bytes (`8·K²` if `full`), however many rows it
    sees, on the device of the first rows.

    Args:
        in_features: input channels, K.
        group_size: channels per group, g.
        full: keep the products of channels of different groups too. They are of rows rounded to bf16 or TF32 where
            the device multiplies those faster: that is noise far below any damping.

    Raises:
        ShapeError: if the group size does not divide `in_features`.
    """

    def __init__(self, in_features: int, group_size: int, *, full: bool = False) -> None:
        if group_size < 1 or in_features < 1 or in_features % group_size:
            raise ShapeError(
                f"group_size must divide in_features: got {group_size} and {in_features}; pass another group_size"
            )
        self.group_size = group_size
        self.count = 0
        width = in_features if full else group_size
        self._sums = torch.zeros(in_features // width, width, width, dtype=torch.float64)

    @property
    def in_features(self) -> int:
        """Input channels, K."""
        return self._sums.shape[0] * self._sums.shape[1]

    @property
    def full(self) -> bool:
        """Whether products of channels of different groups are kept."""
        return self._sums.shape[1] == self.in_features

    @property
    def gram(self) -> Tensor:
        """`E[x xᵀ]` between all channels, fp32 `(K, K)`; zeros before the first row.

        Raises:
            ShapeError: if only those inside groups were kept.
        """
        if not self.full:
            raise ShapeError("moments between groups must have been kept to be read; pass full=True when gathering")
        return (self._sums[0] / max(self.count, 1)).float()

    @property
    def block_gram(self) -> Tensor:
        """`E[x xᵀ]` inside each group, fp32 `(K/g, g, g)`; zeros before the first row."""
        if not self.full:
            return (self._sums / max(self.count, 1)).float()
        return diagonal_blocks(self.gram, self.group_size)

    @property
    def power(self) -> Tensor:
        """`E[x²]` per channel, fp32 `(K,)`; zeros before the first row."""
        return (self._sums.diagonal(dim1=1, dim2=2).flatten() / max(self.count, 1)).float()

    def narrowed(self, group_size: int) -> InputStatistics:
        """Return the moments inside smaller groups; fewer are kept."""
        narrow = InputStatistics(self.in_features, group_size)
        narrow.count = self.count
        narrow._sums = torch.cat([diagonal_blocks(one, group_size) for one in self._sums])
        return narrow

    def update(
        self,
        rows: Tensor,
        *,
        relative_to: OutputNorm | None = None,
        lengths: Tensor | None = None,
        where: str = "a transform's inputs",
    ) -> None:
        """Add a batch of rows.

        Args:
            rows: `(…, K)`, any floating dtype; no rows at all change nothing.
            relative_to: divides each row by the length of the outputs it becomes, so that errors count relative to what
                they are errors of.
            lengths: those of the outputs, fp32 `(n,)`, where they are known already.
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
        low, high = rows.aminmax()
        peak = torch.maximum(high, -low).item()
        if not math.isfinite(peak):
            raise DataError(
                f"{where}: rows must be finite, got {_count_not_finite(rows)}; run the float model on this batch in "
                "fp32 or bf16 and drop the texts that overflow"
            )
        self.count += len(rows)
        if peak > 0:
            if self._sums.device != rows.device:
                self._sums = self._sums.to(rows.device)
            unit = _power_of_two(peak)
            scaled, power = rows.float() / unit, unit**2
            if relative_to is not None:
                # In fp16 outputs may overflow where rows do not.
                known = None if lengths is None or not lengths.isfinite().all() else lengths / unit
                scaled, power = relative_to.divide(scaled, known), 1.0
            for where_to, products in self._products(scaled):
                self._sums[where_to] += products.double().mul_(power)

    def _products(self, rows: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Yield the places of sums and what the rows add there."""
        if not self.full:
            channels = rows.view(len(rows), -1, self.group_size).transpose(0, 1)
            yield (slice(None),), torch.bmm(channels.transpose(1, 2), channels)
            return
        whole = slice(0, 1)
        for begin in range(0, self.in_features, _COLUMNS):
            end = min(begin + _COLUMNS, self.in_features)
            with product_precision("fast"):
                products = (rows[:, begin:].t() @ rows[:, begin:end])[None]
            yield (whole, slice(begin, None), slice(begin, end)), products
            below = products[:, end - begin :]
            yield (whole, slice(begin, end), slice(end, None)), below.transpose(1, 2)

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
        self._sums = self._sums.to(other._sums.device) + other._sums

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the state: `count` and `group_size` int64 `(1,)` and `sums` fp64 `(K/g, g, g)` or `(1, K, K)`."""
        sizes = {"count": torch.tensor([self.count]), "group_size": torch.tensor([self.group_size])}
        return sizes | {"sums": self._sums.clone()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> InputStatistics:
        """Restore the state that `to_tensors` returned.

        Raises:
            ShapeError: if a tensor is missing or has another dtype or shape.
        """
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        sums = tensors.get("sums", torch.empty(0))
        blocks, width = sums.shape[0], sums.shape[-1]
        expected = {
            "count": (torch.int64, (1,)),
            "group_size": (torch.int64, (1,)),
            "sums": (torch.float64, (blocks, width, width)),
        }
        if found != expected:
            raise ShapeError(
                "statistics must hold count and group_size int64 (1,) and sums float64 (K/g, g, g) or (1, K, K), "
                f"got {found}"
            )
        statistics = cls(blocks * width, int(tensors["group_size"].item()), full=blocks == 1)
        statistics.replace(tensors)
        return statistics

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the count and the sums of a state of equal sizes."""
        self.count = int(tensors["count"].item())
        self._sums.copy_(tensors["sums"])


def diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """Return the blocks `(K/g, g, g)` on the diagonal of `gram (K, K)`."""
    groups = len(gram) // group_size
    return gram.view(groups, group_size, groups, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _power_of_two(peak: float) -> float:
    """Return the largest one up to `peak`: whatever else is in a batch, its rows are rounded alike."""
    return 2.0 ** max(math.frexp(peak)[1] - 1, -126)


def _count_not_finite(rows: Tensor) -> str:
    return f"{int(rows.isnan().sum())} NaN and {int(rows.isinf().sum())} infinite values of {rows.numel()}"
