"""What each of several processes runs of the calibration data.

Where only statistics are gathered, whole batches are shared out: process r of n takes the batches r, r + n, …. Where a
step of training is made on each batch, every process takes some of its sequences, so that all make the steps, in the
order, that one process would make. A batch that the captured graph serves only as it is stays whole; the processes that
have nothing of a batch still take part in what is summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from parofx.calibration.processes import process_count, share_of
from parofx.calibration.sensitivity import first_sequences
from parofx.config import CalibrationConfig
from parofx.errors import DataError

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Shares:
    """What one process has of a sequence of batches.

    Args:
        pieces: whole batches, or some sequences of one.
        places: of each piece, the place of its batch among all.
        batches: how many batches there are.
        pieces_in_all: how many pieces all processes have.
        is_cut: whether other processes may hold other sequences of the same batches.
    """

    pieces: list[Batch]
    places: list[int]
    batches: int
    pieces_in_all: int
    is_cut: bool = False

    def of(self, batch: int) -> list[int]:
        """Return this process's pieces of a batch."""
        return [piece for piece, place in enumerate(self.places) if place == batch]


def shares_of(gm: GraphModule, batches: Sequence[Batch], *, cut: bool) -> Shares:
    """Return this process's share of batches; of one process, the batches.

    Args:
        gm: the graph that they are the inputs of.
        batches: the same in every process.
        cut: whether every process shall have a part of each.
    """
    processes = process_count()
    cut = cut and processes > 1
    pieces = [
        (place, piece)
        for place, batch in enumerate(batches)
        for piece in (
            first_sequences(gm, [batch], sequences_of(batch), at_a_time=-(-sequences_of(batch) // processes))
            if cut
            else [batch]
        )
    ]
    own = share_of(pieces)
    return Shares([piece for _, piece in own], [place for place, _ in own], len(batches), len(pieces), cut)


def check_enough(shares: Shares, config: CalibrationConfig) -> None:
    """Refuse more processes than there is work for.

    Raises:
        DataError: if there is none for one of them.
    """
    if shares.pieces_in_all < process_count():
        raise DataError(
            f"calibration must hold a batch for each process, got {shares.batches} for {process_count()} processes: "
            f"give more sequences, smaller batches (batch_size is {config.batch_size}), or start fewer processes"
        )


def sequences_of(batch: Batch) -> int:
    """Return how many sequences a batch holds; vectors may hold something of each position instead."""
    return max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1), default=1)
