"""What a run did: the layers it quantized, those it left float and why, and what it cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from parofx.config import ParoConfig


class FloatReason(StrEnum):
    """Why a linear stays float. Closed: a new reason needs a new member and a test."""

    EXCLUDED = "excluded by modules_to_not_convert"
    OUTPUT_HEAD = "output head"
    IN_FEATURES = "no group size divides in_features"
    OUT_FEATURES = "out_features fill no whole 32-bit words"
    ROUTER = "router: its output selects experts"
    WEIGHT_NOT_MATRIX = "the weight is a slice of a larger parameter (fused experts)"
    FUNCTIONAL = "the weight is read by code other than one linear module"
    WHOLE_MODEL = "the linear is the whole model, and no module can take its place: quantize nn.Sequential(linear)"
    LEFT_FLOAT = "the model is quantized, and left it float"
    NOT_REACHED = "the example inputs never reach it"


@dataclass(frozen=True)
class LinearReport:
    """One quantized linear.

    `transform` names the rotation it uses: siblings have the same. `relative_error` is the expected squared output
    error over the expected squared output, from the calibration statistics (from the weights alone without data);
    `nearest_error` is that of rounding to nearest in the same rotation, where it was not what was done. With a bits
    budget `predicted_loss` is what its format was expected to cost, as KL divergence in nats if there was data. With a
    low-rank correction `uncorrected_error` is the relative error before it was fitted.
    """

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    krot: int
    transform: str
    block: str
    relative_error: float
    packed_bytes: int
    nearest_error: float | None = None
    predicted_loss: float | None = None
    uncorrected_error: float | None = None


@dataclass(frozen=True)
class TransformReport:
    """One fitted rotation: the objective before and after, the angles' spread, and error feedback's damping.

    `joins_rows` tells whether rows took over errors of other rows (`gradient_samples`); the `relative_error` of its
    linears, which judges each row for itself, is larger then.
    """

    name: str
    members: tuple[str, ...]
    block: str
    loss_before: float
    loss_after: float
    angle_rms: float
    damping: float | None = None
    joins_rows: bool = False


@dataclass(frozen=True)
class StageReport:
    """One stage of training a block: the loss of its output on held-out data before and after.

    `kept` says which state was kept. No stage ends worse than it began; one that found nothing better ends equal.
    """

    name: str
    before: float
    after: float
    kept: str

    @property
    def improved(self) -> bool:
        """Whether anything better than the start was found."""
        return self.after < self.before

    def __str__(self) -> str:
        change = f"{self.name} {self.before:.3e} → {self.after:.3e} ({self.kept})"
        return change if self.improved else f"{change}: no improvement"


@dataclass(frozen=True)
class BlockReport:
    """The stages in which a block was trained, in order."""

    name: str
    stages: tuple[StageReport, ...]


@dataclass(frozen=True)
class FloatLinear:
    """One linear that stays float."""

    name: str
    reason: FloatReason
    detail: str = ""

    @property
    def explanation(self) -> str:
        """The reason in words."""
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)


@dataclass(frozen=True)
class QuantizationReport:
    """The whole run of `parofx.quantize`."""

    config: ParoConfig
    linears: tuple[LinearReport, ...]
    transforms: tuple[TransformReport, ...]
    kept_float: tuple[FloatLinear, ...]
    seconds: float
    peak_memory_bytes: int
    passes: tuple[Mapping[str, Any], ...] = field(default=())
    blocks: tuple[BlockReport, ...] = field(default=())

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight: codes, scales, zeros and rotations, siblings' rotation counted as stored."""
        weights = sum(linear.in_features * linear.out_features for linear in self.linears)
        return 8 * sum(linear.packed_bytes for linear in self.linears) / max(weights, 1)

    def reasons(self) -> Counter[FloatReason]:
        """Count the float linears by reason."""
        return Counter(linear.reason for linear in self.kept_float)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return {
            "config": self.config.to_dict(),
            "bits_per_weight": self.bits_per_weight,
            "linears": [asdict(linear) for linear in self.linears],
            "transforms": [asdict(transform) for transform in self.transforms],
            "kept_float": [asdict(linear) for linear in self.kept_float],
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "passes": [dict(one) for one in self.passes],
            "blocks": [asdict(block) for block in self.blocks],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_dict(), indent=1))
        unfinished.replace(path)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons().items()) or "none"
        return (
            f"quantized {len(self.linears)} linears with {len(self.transforms)} transforms, "
            f"{self.bits_per_weight:.3f} bits per weight, in {self.seconds:.1f} s; kept float: {reasons}"
        )
