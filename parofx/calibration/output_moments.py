"""Moments of the gradients at linears' outputs: what errors in different output channels have to do with one another.

The gradients are those of `sensitivity`. Each position counts alike, whatever its gradient's length: a few hold most of
the power, and their directions would be taken for those of all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.calibration.processes import process_index, share_of, sum_tensors, together
from parofx.calibration.row_masks import select_rows
from parofx.calibration.sensitivity import backward_of_likelihood, count_sequences, first_sequences
from parofx.passes.linears import find_embeddings

logger = logging.getLogger("parofx")

#: Output channels whose errors are taken over by one another; of more, consecutive ones.
WIDEST = 2048


class OutputMoments:
    """Sums of `ĝ ĝᵀ` over positions, ĝ the gradient at a linear's output divided by its length.

    Args:
        out_features: N. Where they are more than `WIDEST`, parts of equal size are kept: `4·N·min(N, WIDEST)` bytes.
    """

    def __init__(self, out_features: int, device: torch.device | str = "cpu") -> None:
        self._sizes = [len(part) for part in torch.arange(out_features).tensor_split(-(-out_features // WIDEST))]
        #: Of consecutive channels, fp32 `(n, n)` each.
        self.parts = [torch.zeros(size, size, device=device) for size in self._sizes]

    def update(self, gradients: Tensor) -> None:
        """Add gradients `(M, N)`; those that vanish, or that are not finite, say nothing."""
        gradients = gradients.float()
        lengths = gradients.norm(dim=1, keepdim=True)
        known = (lengths > 0) & lengths.isfinite()
        units = torch.where(known, gradients / lengths, 0.0)
        for moments, part in zip(self.parts, torch.split(units, self._sizes, 1), strict=True):
            moments.addmm_(part.t(), part)


def measure_output_moments(
    gm: GraphModule,
    weights: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Any]],
    *,
    samples: int,
    seed: int,
) -> dict[str, OutputMoments]:
    """Run the float model forward and backward on the first sequences, each process on its share of them.

    Args:
        gm: a PREPARED graph; its transforms are taken as identities.
        weights: of the linears that are measured, by name, `(N, K)`.
        batches: the model's inputs as mappings, the same in every process.
        samples: how many sequences.
        seed: of the tokens that are drawn.
    """
    there = sum(map(count_sequences, batches))
    if there < samples and process_index() == 0:
        logger.warning(
            "gradient_samples asks for %d sequences, and there are %d; all of them are taken", samples, there
        )
    vocabularies = frozenset(len(table) for table in find_embeddings(gm))
    found = {name: OutputMoments(len(weight), weight.device) for name, weight in weights.items()}

    def record(node: Node, _: Tensor | None, gradient: Tensor, masks: Mapping[str, Tensor]) -> None:
        weight = node.args[1]
        assert isinstance(weight, Node)
        name = weight.meta["parofx_linear"]
        if name in found:
            found[name].update(select_rows(node, gradient, masks))

    with together():
        sequences = list(enumerate(first_sequences(gm, batches, samples)))
        own = share_of(sequences)
        backward_of_likelihood(
            gm,
            [batch for _, batch in own],
            vocabularies,
            record,
            seeds=[seed + place for place, _ in own],
            inputs=False,
        )
    sum_tensors([part for one in found.values() for part in one.parts])
    for name, moments in found.items():
        if not any(part.any() for part in moments.parts):
            logger.warning("no finite gradient reaches the output of %s; its rows are rounded each for itself", name)
    return found
