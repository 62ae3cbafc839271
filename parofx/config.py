"""The options of quantization, as frozen dataclasses that validate themselves."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from parofx.calibration.recipes import RECIPES, UNSHARED
from parofx.errors import ConfigError, one_per_line

#: Bit widths the quantizer computes.
QUANTIZER_BITS = (2, 3, 4, 8)
#: Bit widths the checkpoint format and the kernels store.
PACKED_BITS = (3, 4, 8)
#: Bit widths of a quantized output head.
HEAD_BITS = (4, 8)
#: Smaller group sizes tried, in this order, when the asked one does not divide every layer.
FALLBACK_GROUP_SIZES = (64, 32)
#: A linear whose `in_features` this does not divide never becomes a quantized one.
SMALLEST_GROUP_SIZE = 32

Recipe = Literal["fast", "best", "paper", "data-free"]
PairMethod = Literal["matching", "greedy"]
#: What a lowered linear multiplies: rotated activations as they are, or quantized to int8 per (row, group).
Activations = Literal["float", "int8"]
ACTIVATIONS: tuple[Activations, ...] = ("float", "int8")
RoundingMethod = Literal["nearest", "feedback"]
Objective = Literal["range", "ldl"]
BlockLoss = Literal["relative", "smooth_l1"]
RowWeights = Literal["relative", "equal"]
#: The options of calibration that are one of a few words.
_CHOICES = {
    "recipe": tuple(RECIPES),
    "objective": ("range", "ldl"),
    "pairs": ("matching", "greedy"),
    "rounding": ("nearest", "feedback"),
    "block_loss": ("relative", "smooth_l1"),
    "row_weights": ("relative", "equal"),
}
#: Stands for an option of `CalibrationConfig` that the recipe decides; there is none left once one is built.
_BY_RECIPE: Any = None

_Config = TypeVar("_Config", "ParoConfig", "CalibrationConfig")


@dataclass(frozen=True)
class CalibrationConfig:
    """How rotations, scales and weights are fitted. What is not given is as the recipe has it (`calibration.recipes`).

    Args:
        recipe: `"fast"` fits the LDL objective on input statistics and rounds with error feedback; `"best"`
            takes more steps and then trains the whole model; `"paper"` is ParoQuant's own; `"data-free"` uses weights
            alone, whatever data is given.
        steps: optimizer steps per transform on the objective.
        learning_rate: of AdamW on the angles and on the logarithm of the channel scales, on the objective;
            cosine to a twentieth.
        rows: output channels sampled per step (all of them if a layer has fewer).
        objective: what angles and channel scales make small: `"range"`, the error of rounding to nearest, or `"ldl"`,
            what error feedback leaves of it. Unless given it goes with `rounding`; without data, or rounded to nearest,
            it is `"range"` in any case.
        pairs: how channel pairs are chosen: `"matching"` (perfect matchings, no dummy pairs) or `"greedy"`
            (the paper's random scan).
        row_weights: how much a token's row counts in the statistics of a transform's input: `"relative"` to the
            squared norm of what its linears make of it, where that is normalized before it is added to anything; or all
            `"equal"`.
        clip_ratios: shrink factors of the min/max range tried per quantization group when rounding.
        rounding: `"nearest"`, or `"feedback"`: columns take over the errors of those before them.
        damping: candidates of what is added to the inputs' second moments before error feedback, relative to their
            mean; of several, as `(0.03, 0.1, 0.3)`, the one with the smallest error on held-out sequences is taken,
            which may pay where there are few sequences.
        sweeps: rounds of coordinate descent and of refitted scales behind error feedback.
        gradient_samples: sequences on which the model's gradients tell how errors in a linear's outputs join, so that
            error feedback runs between rows as well; 0 rounds every row for itself. Where blocks are trained, with
            `compensation_rank`, and without error feedback none are taken.
        transform_epochs: passes over the data in which a block's angles and channel scales are trained.
        weight_epochs: passes in which its weights, scales and zeros are trained.
        transform_learning_rate: of AdamW on angles and channel scales of a block.
        weight_learning_rate: of AdamW on the weights of a block.
        grid_learning_rate: of AdamW on the scales and zeros of a block.
        tune_epochs: passes in which scales, angles and channel scales are trained behind a block's chosen codes.
        tune_learning_rate: of AdamW on those, scales by their logarithm.
        distill_epochs: passes in which these tensors of the whole model are trained in the end, to give the float
            model's distribution over the vocabulary.
        distill_learning_rate: of AdamW on those.
        distill_batch_size: sequences per step of that.
        block_loss: of a block's output against the float one's: `"relative"`, the mean over rows of the squared error
            relative to the row's squared length, or `"smooth_l1"`.
        autocast: run the model with bf16 or TF32 products where it is fp32, and with bf16 ones whatever it is while
            blocks or the model are trained, if the device is fast at them; sums stay fp32.
        seed: fixes pairs, sampled rows and the order of data.
        seqlen: tokens per calibration sequence.
        samples: sequences used.
        validation_samples: of these, how many are held out to choose by, where there is a choice: of several dampings,
            and of states of training; 0 chooses on all of them.
        batch_size: sequences per forward.
        bits_budget: bits per quantized weight, scales, zeros and rotations counted, that may be spent. Widths, group
            sizes and rotation rounds are then chosen for each linear, where they lose least; None leaves all alike.
        compensation_rank: rank of a correction in fp16 that is added to each rounded weight; 0 for none.
        work_dir: folder for per-block results; with it a killed run resumes at the block it was in.
        resume: use what an earlier run with the same options left in `work_dir`.
    """

    recipe: Recipe = "fast"
    steps: int = _BY_RECIPE
    learning_rate: float = 0.1
    rows: int = _BY_RECIPE
    objective: Objective = _BY_RECIPE
    pairs: PairMethod = _BY_RECIPE
    row_weights: RowWeights = _BY_RECIPE
    clip_ratios: tuple[float, ...] = _BY_RECIPE
    rounding: RoundingMethod = _BY_RECIPE
    damping: tuple[float, ...] = (0.1,)
    sweeps: int = 4
    gradient_samples: int = 0
    transform_epochs: int = _BY_RECIPE
    weight_epochs: int = _BY_RECIPE
    transform_learning_rate: float = _BY_RECIPE
    weight_learning_rate: float = 1e-5
    grid_learning_rate: float = 1e-6
    tune_epochs: int = _BY_RECIPE
    tune_learning_rate: float = 1e-3
    distill_epochs: int = _BY_RECIPE
    distill_learning_rate: float = 2e-4
    distill_batch_size: int = 2
    block_loss: BlockLoss = _BY_RECIPE
    autocast: bool = True
    seed: int = 0
    seqlen: int = _BY_RECIPE
    samples: int = _BY_RECIPE
    validation_samples: int = _BY_RECIPE
    batch_size: int = _BY_RECIPE
    bits_budget: float | None = None
    compensation_rank: int = 0
    work_dir: str | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be one of {accepted}, got {getattr(self, name)!r}"
            for name, accepted in _CHOICES.items()
            if getattr(self, name) not in accepted and (name == "recipe" or getattr(self, name) is not _BY_RECIPE)
        ]
        for name, value in RECIPES.get(str(self.recipe), RECIPES["fast"]).items():
            if getattr(self, name) is _BY_RECIPE:
                object.__setattr__(self, name, value)
        if self.objective is _BY_RECIPE:
            object.__setattr__(self, "objective", "ldl" if self.rounding == "feedback" else "range")
        for name in ("rows", "samples", "batch_size", "distill_batch_size"):
            problems += _check_int(name, getattr(self, name), 1)
        for name in ("steps", "sweeps", "gradient_samples", "validation_samples", "seed", "compensation_rank"):
            problems += _check_int(name, getattr(self, name), 0)
        for name in ("transform_epochs", "weight_epochs", "tune_epochs", "distill_epochs"):
            problems += _check_int(name, getattr(self, name), 0)
        if isinstance(self.work_dir, os.PathLike):
            object.__setattr__(self, "work_dir", os.fspath(self.work_dir))
        if self.work_dir is not None and not isinstance(self.work_dir, str):
            problems.append(f"work_dir must be a path, got {self.work_dir!r}")
        problems += _check_int("seqlen", self.seqlen, 2)
        problems += _check_bool("resume", self.resume) + _check_bool("autocast", self.autocast)
        for name in (item.name for item in dataclasses.fields(self) if item.name.endswith("learning_rate")):
            rate = getattr(self, name)
            if not _is_number(rate) or not 0 < rate < 10:
                problems.append(f"{name} must be in (0, 10), got {rate!r}")
        if not problems and self.compensation_rank and self.trains:
            problems.append(
                f"compensation_rank must be 0 in a recipe that trains, got {self.compensation_rank!r}; "
                "use recipe='fast' and distill_epochs=0"
            )
        if self.bits_budget is not None and (not _is_number(self.bits_budget) or not 0 < self.bits_budget < math.inf):
            problems.append(f"bits_budget must be a number of bits above 0, or None, got {self.bits_budget!r}")
        for name in ("clip_ratios", "damping"):
            value = getattr(self, name)
            numbers = tuple(value) if isinstance(value, Iterable) else ()
            if not numbers or any(not _is_number(one) or not 0 < one <= 1 for one in numbers):
                problems.append(f"{name} must hold numbers in (0, 1], got {value!r}")
            else:
                object.__setattr__(self, name, tuple(float(one) for one in numbers))
        _raise_if(problems, "CalibrationConfig")

    @property
    def trains_blocks(self) -> bool:
        """Whether blocks are trained, besides fitting each transform for itself."""
        return self.transform_epochs > 0 or self.weight_epochs > 0 or self.tune_epochs > 0

    @property
    def chooses_damping(self) -> bool:
        """Whether candidates of damping are compared on held-out sequences."""
        return self.rounding == "feedback" and len(self.damping) > 1

    @property
    def joins_outputs(self) -> bool:
        """Whether error feedback runs between rows, by the gradients of some sequences."""
        plain = self.rounding == "nearest" or self.trains_blocks or self.compensation_rank > 0
        return self.gradient_samples > 0 and not plain

    @property
    def trains(self) -> bool:
        """Whether blocks or the whole model are trained."""
        return self.trains_blocks or self.distill_epochs > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-serializable values."""
        return dataclasses.asdict(self) | {"clip_ratios": list(self.clip_ratios), "damping": list(self.damping)}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CalibrationConfig:
        """Build a config from `to_dict`'s form; an unknown option is an error that lists the accepted ones."""
        return _from_dict(cls, options)


@dataclass(frozen=True)
class ParoConfig:
    """What is quantized, and into what.

    Args:
        bits: width of a weight: 3, 4 or 8. Linears on CUDA run the reference, which is slow, unless it is 4.
        group_size: input channels that share a scale, a zero point and a rotation group. It is the largest
            used: where it does not divide every layer, the next of 64 and 32 that does is taken for the
            whole model (or per layer with `mixed_group_size`).
        krot: rotation rounds; 0 leaves only the channel scales.
        modules_to_not_convert: module names or glob patterns (`"model.layers.0.*"`) left float.
        share_siblings: one transform for all linears of a block that read the same tensor. One for each is more
            accurate, takes as many bits and rotates more often. Unless given it is one for each with `"best"`, else one
            for all.
        lm_head: "float" leaves the output head as it is, 4 or 8 quantizes it to so many bits. An embedding table that
            it is tied to stays float and is stored beside it.
        mixed_group_size: choose the group size per layer.
        calibration: how the transforms are fitted.
    """

    bits: int = 4
    group_size: int = 128
    krot: int = 8
    modules_to_not_convert: tuple[str, ...] = ()
    share_siblings: bool | None = None
    lm_head: Literal["float", 4, 8] = "float"
    mixed_group_size: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        problems = []
        names = self.modules_to_not_convert
        names = () if names is None else names
        if isinstance(names, str) or not isinstance(names, Iterable):
            problems.append(f"modules_to_not_convert must be a sequence of names, got {names!r}")
        else:
            names = tuple(names)
            if not all(isinstance(name, str) for name in names):
                problems.append(f"modules_to_not_convert must be a sequence of names, got {names!r}")
            object.__setattr__(self, "modules_to_not_convert", names)
        if not isinstance(self.bits, int) or self.bits not in PACKED_BITS:
            problems.append(
                f"bits must be one of {PACKED_BITS}, got {self.bits!r}: the checkpoint format and the kernels know "
                "no other width"
            )
        if not isinstance(self.group_size, int) or self.group_size not in (128, *FALLBACK_GROUP_SIZES):
            problems.append(f"group_size must be one of (128, 64, 32), got {self.group_size!r}")
        problems += _check_int("krot", self.krot, 0)
        problems += _check_bool("mixed_group_size", self.mixed_group_size)
        if self.lm_head not in ("float", *HEAD_BITS) or isinstance(self.lm_head, (bool, float)):
            problems.append(f"lm_head must be one of {('float', *HEAD_BITS)}, got {self.lm_head!r}")
        if not isinstance(self.calibration, CalibrationConfig):
            problems.append(f"calibration must be a CalibrationConfig, got {type(self.calibration).__name__}")
        if self.share_siblings is not None:
            problems += _check_bool("share_siblings", self.share_siblings)
        _raise_if(problems, "ParoConfig")

    @property
    def shares_transforms(self) -> bool:
        """Whether linears of a block that read the same tensor share a transform."""
        return self.calibration.recipe not in UNSHARED if self.share_siblings is None else self.share_siblings

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-serializable values, calibration nested."""
        return {
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "calibration": self.calibration.to_dict(),
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ParoConfig:
        """Build a config from `to_dict`'s form; an unknown option is an error that lists the accepted ones."""
        options = dict(options)
        if isinstance(options.get("calibration"), Mapping):
            options["calibration"] = CalibrationConfig.from_dict(options["calibration"])
        return _from_dict(cls, options)


def _check_int(name: str, value: object, least: int) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return [f"{name} must be an integer of at least {least}, got {value!r}"]
    return []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_bool(name: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{name} must be True or False, got {value!r}"]


def _raise_if(problems: list[str], where: str) -> None:
    if problems:
        raise ConfigError(f"invalid {where}:\n{one_per_line(problems)}")


def _from_dict(cls: type[_Config], options: Mapping[str, Any]) -> _Config:
    accepted = [item.name for item in dataclasses.fields(cls)]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        nested = [item.name for item in dataclasses.fields(CalibrationConfig)] if cls is ParoConfig else []
        meant = ""
        for name in map(str, unknown):
            if name in nested:
                meant += f"; {name!r} belongs to 'calibration'"
            elif close := difflib.get_close_matches(name, accepted, n=1):
                meant += f"; for {name!r} perhaps {close[0]!r}"
        raise ConfigError(f"unknown {cls.__name__} options {unknown}{meant}; accepted are {accepted}")
    return cls(**options)
