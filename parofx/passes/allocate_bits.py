"""`allocate_bits`: PREPARED → PREPARED. Choose each linear's format so that a budget of bits loses least.

    fake_quantize(rotate(W, …, 128), off, 4, 128)   →   fake_quantize(rotate(W, …, 64), off, 3, 64)

Nothing is fitted here: the graph computes what it did. Siblings share group size and rotation rounds; widths are each
linear's own. An output head that `lm_head` gave a width keeps it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from parofx.calibration.format_losses import Losses, TransformFormat, all_format_losses, stored_bytes
from parofx.calibration.knapsack import Option, Variant, choose, largest_cost, smallest_cost
from parofx.calibration.processes import together
from parofx.calibration.sensitivity import Sensitivities, first_sequences, measure_sensitivities
from parofx.config import FALLBACK_GROUP_SIZES, PACKED_BITS, ParoConfig
from parofx.errors import ConfigError
from parofx.packing import COLUMNS_PER_RUN
from parofx.pairing import make_pairs
from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.linears import find_embeddings
from parofx.passes.transforms import Transform, TransformedLinear, check_weights, find_transforms
from parofx.precision import product_precision

#: Calibration sequences on which the output's sensitivity is measured.
_SEQUENCES = 8


@register
@dataclass(frozen=True)
class AllocateBits:
    """Choose bits, group sizes and rotation rounds under `bits_budget`; without one nothing changes.

    `batches` are the model's inputs as mappings; None compares formats on weights alone.
    """

    config: ParoConfig = field(default_factory=ParoConfig)
    batches: Sequence[Mapping[str, Any]] | None = None

    name: ClassVar[str] = "allocate_bits"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.PREPARED,)
    produces: ClassVar[Stage] = Stage.PREPARED

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place.

        Raises:
            ConfigError: if no choice of formats meets the budget, naming the smallest that one does.
            DataError: naming a weight that is not finite, or a linear whose input or gradient is not.
        """
        report = PassReport(self.name)
        set_stage(gm, Stage.PREPARED)
        transforms = find_transforms(gm)
        if self.config.calibration.bits_budget is None or not transforms:
            return report
        check_weights(transforms)
        candidates = [self._candidates(one) for one in transforms]
        budget = self._budget(candidates)
        # Of several processes each measures for itself: equal graphs and sequences give equal formats, and calibration
        # refuses graphs that differ.
        with together():
            losses = self._losses(gm, candidates)
        groups = [
            [one.options(part, form) for form, part in zip(one.forms, of_forms, strict=True)]
            for one, of_forms in zip(candidates, losses, strict=True)
        ]
        predicted = gm.meta.setdefault("parofx_predicted_losses", {})
        for one, variants, choice in zip(candidates, groups, choose(groups, budget), strict=True):
            form = one.forms[choice.variant]
            changed = _reform(gm, one.transform, form, self.config)
            for linear, widths, options, index in zip(
                one.transform.linears, one.bits, variants[choice.variant], choice.options, strict=True
            ):
                report.changed += changed or linear.bits != widths[index]
                linear.set_bits(widths[index])
                predicted[linear.name] = options[index].loss
                what = f"{widths[index]} bits, group_size {form.group_size}, krot {form.krot}"
                report.matched.append((linear.name, f"{what}; predicted loss {options[index].loss:.3e}"))
        return report

    def byte_range(self, gm: GraphModule) -> tuple[int, int]:
        """Return the bytes of the smallest choice of formats, and of the largest that the budget lets be.

        Raises:
            ConfigError: as `run` does for a budget that cannot be met.
        """
        candidates = [self._candidates(one) for one in find_transforms(gm)]
        budget = self._budget(candidates)
        return smallest_cost(_costs(candidates)), min(budget, largest_cost(_costs(candidates)))

    def _candidates(self, transform: Transform) -> _Candidates:
        """Return the formats that a transform and its linears may take."""
        config, in_features = self.config, transform.linears[0].weight.shape[1]
        sizes = [one for one in (config.group_size, *FALLBACK_GROUP_SIZES) if one <= config.group_size]
        forms = [
            TransformFormat(size, krot)
            for size in sizes
            if in_features % size == 0
            for krot in sorted({config.krot, config.krot // 2, 0}, reverse=True)
        ]
        bits = []
        for linear in transform.linears:
            rows = len(linear.weight)
            widths = tuple(width for width in PACKED_BITS if rows % COLUMNS_PER_RUN[width] == 0)
            bits.append((linear.bits,) if linear.bits_given else widths)
        rank = config.calibration.compensation_rank
        return _Candidates(transform, tuple(dict.fromkeys(forms)), tuple(bits), rank)

    def _budget(self, candidates: Sequence[_Candidates]) -> int:
        """Return the bytes that may be spent."""
        weights = sum(linear.weight.numel() for one in candidates for linear in one.transform.linears)
        asked = self.config.calibration.bits_budget
        assert asked is not None
        # Exact but for the last digits of a float, so that the bits of a report are a budget for what it reports.
        exact = Fraction(asked) * weights / 8
        budget, least = math.floor(exact * (1 + Fraction(sys.float_info.epsilon))), smallest_cost(_costs(candidates))
        if least > budget:
            raise ConfigError(
                f"bits_budget must be at least {math.ceil(8000 * least / weights) / 1000:.3f} for this model, got "
                f"{asked}: its linears take that in the smallest formats; raise it, or leave it out"
            )
        return budget

    def _losses(self, gm: GraphModule, candidates: Sequence[_Candidates]) -> list[list[Losses]]:
        """Return the predicted loss by transform, form, linear and width."""
        calibration, found = self.config.calibration, Sensitivities()
        if self.batches is not None and calibration.recipe != "data-free":
            with product_precision("fast") if calibration.autocast else contextlib.nullcontext():
                found = measure_sensitivities(
                    gm,
                    first_sequences(gm, self.batches, _SEQUENCES),
                    frozenset(len(table) for table in find_embeddings(gm)),
                    group_sizes={one.transform.name: one.forms[0].group_size for one in candidates},
                    seed=calibration.seed,
                )
        with torch.no_grad():
            return [
                all_format_losses(
                    one.forms,
                    [linear.weight for linear in one.transform.linears],
                    [found.linears.get(linear.name) for linear in one.transform.linears],
                    found.power(one.transform.name),
                    one.bits,
                    calibration,
                )
                for one in candidates
            ]


@dataclass(frozen=True)
class _Candidates:
    """The formats that a transform may take, the widths of each of its linears, and the rank of its corrections."""

    transform: Transform
    forms: tuple[TransformFormat, ...]
    bits: tuple[tuple[int, ...], ...]
    rank: int

    def options(self, losses: Losses, form: TransformFormat) -> list[list[Option]]:
        """Return each linear's options in one form."""
        return [
            [Option(_stored(linear, form, width, self.rank), loss) for width, loss in zip(widths, part, strict=True)]
            for linear, widths, part in zip(self.transform.linears, self.bits, losses, strict=True)
        ]


def _costs(candidates: Sequence[_Candidates]) -> list[list[Variant]]:
    """Return what the candidates cost, without what they lose."""
    return [
        [one.options([[0.0] * len(widths) for widths in one.bits], form) for form in one.forms] for one in candidates
    ]


def _stored(linear: TransformedLinear, form: TransformFormat, bits: int, rank: int) -> int:
    out_features, in_features = linear.weight.shape
    return stored_bytes(in_features, out_features, form, bits, bias=linear.has_bias, rank=rank)


def _reform(gm: GraphModule, transform: Transform, form: TransformFormat, config: ParoConfig) -> bool:
    """Give a transform a form, at its start; say whether it had another one."""
    if form == TransformFormat(transform.group_size, transform.krot(gm)):
        return False
    device, in_features = transform.linears[0].weight.device, transform.linears[0].weight.shape[1]
    method, seed = config.calibration.pairs, config.calibration.seed
    pairs = make_pairs(in_features, form.group_size, form.krot, method=method, seed=seed).to(device)
    transform.set_group_size(form.group_size)
    theta = torch.zeros(form.krot, in_features // 2, device=device)
    transform.set_parameters(gm, pairs, theta, torch.ones(1, in_features, device=device))
    return True
