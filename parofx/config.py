"""The options of quantization, as frozen dataclasses that validate themselves."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from parofx.errors import ConfigError, one_per_line

#: Bit widths the quantizer computes.
QUANTIZER_BITS = (2, 3, 4, 8)
#: Bit widths the checkpoint format and the kernels store.
PACKED_BITS = (4,)
#: Bit widths of a quantized output head.
HEAD_BITS = (4,)
#: Smaller group sizes tried, in this order, when the asked one does not divide every layer.
FALLBACK_GROUP_SIZES = (64, 32)
#: A linear whose `in_features` this does not divide never becomes a quantized one.
SMALLEST_GROUP_SIZE = 32

Recipe = Literal["fast", "data-free"]
PairMethod = Literal["matching", "greedy"]
#: What a lowered linear multiplies: rotated activations as they are, or quantized to int8 per (row, group).
Activations = Literal["float", "int8"]
ACTIVATIONS: tuple[Activations, ...] = ("float", "int8")
_RECIPES = ("fast", "data-free")
_PAIR_METHODS = ("matching", "greedy")

_Config = TypeVar("_Config", "ParoConfig", "CalibrationConfig")


@dataclass(frozen=True)
class CalibrationConfig:
    """How rotations and scales are fitted.

    Args:
        recipe: `"fast"` fits the range objective on input statistics; `"data-free"` uses weights alone,
            whatever data is given.
        steps: optimizer steps per transform.
        learning_rate: of AdamW on the angles and on the logarithm of the channel scales; cosine to a twentieth.
        rows: output channels sampled per step (all of them if a layer has fewer).
        pairs: how channel pairs are chosen: `"matching"` (perfect matchings, no dummy pairs) or `"greedy"`
            (the paper's random scan).
        clip_ratios: shrink factors of the min/max range tried per quantization group when rounding.
        seed: fixes pairs, sampled rows and the order of data.
        seqlen: tokens per calibration sequence.
        samples: sequences used.
        batch_size: sequences per forward.
        work_dir: folder for per-block results; with it a killed run resumes at the block it was in.
        resume: use what an earlier run with the same options left in `work_dir`.
    """

    recipe: Recipe = "fast"
    steps: int = 60
    learning_rate: float = 0.1
    rows: int = 512
    pairs: PairMethod = "matching"
    clip_ratios: tuple[float, ...] = tuple(1 - step / 40 for step in range(13))
    seed: int = 0
    seqlen: int = 512
    samples: int = 64
    batch_size: int = 8
    work_dir: str | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.recipe not in _RECIPES:
            problems.append(f"recipe must be one of {_RECIPES}, got {self.recipe!r}")
        if self.pairs not in _PAIR_METHODS:
            problems.append(f"pairs must be one of {_PAIR_METHODS}, got {self.pairs!r}")
        for name, least in (("steps", 0), ("rows", 1), ("seqlen", 2), ("samples", 1), ("batch_size", 1)):
            problems += _check_int(name, getattr(self, name), least)
        problems += _check_int("seed", self.seed, 0)
        problems += _check_bool("resume", self.resume)
        if isinstance(self.work_dir, os.PathLike):
            object.__setattr__(self, "work_dir", os.fspath(self.work_dir))
        if self.work_dir is not None and not isinstance(self.work_dir, str):
            problems.append(f"work_dir must be a path, got {self.work_dir!r}")
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate < 10:
            problems.append(f"learning_rate must be in (0, 10), got {self.learning_rate!r}")
        ratios = tuple(self.clip_ratios) if isinstance(self.clip_ratios, Iterable) else ()
        if not ratios or any(not _is_number(ratio) or not 0 < ratio <= 1 for ratio in ratios):
            problems.append(f"clip_ratios must hold numbers in (0, 1], got {self.clip_ratios!r}")
        else:
            object.__setattr__(self, "clip_ratios", tuple(float(ratio) for ratio in ratios))
        _raise_if(problems, "CalibrationConfig")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-serializable values."""
        return dataclasses.asdict(self) | {"clip_ratios": list(self.clip_ratios)}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CalibrationConfig:
        """Build a config from `to_dict`'s form; an unknown option is an error that lists the accepted ones."""
        return _from_dict(cls, options)


@dataclass(frozen=True)
class ParoConfig:
    """What is quantized, and into what.

    Args:
        bits: width of a weight.
        group_size: input channels that share a scale, a zero point and a rotation group. It is the largest
            used: where it does not divide every layer, the next of 64 and 32 that does is taken for the
            whole model (or per layer with `mixed_group_size`).
        krot: rotation rounds; 0 leaves only the channel scales.
        modules_to_not_convert: module names or glob patterns (`"model.layers.0.*"`) left float.
        share_siblings: one transform for all linears of a block that read the same tensor.
        lm_head: "float" leaves the output head as it is, 4 quantizes it. An embedding table that it is tied to stays
            float and is stored beside it.
        mixed_group_size: choose the group size per layer.
        calibration: how the transforms are fitted.
    """

    bits: int = 4
    group_size: int = 128
    krot: int = 8
    modules_to_not_convert: tuple[str, ...] = ()
    share_siblings: bool = True
    lm_head: Literal["float", 4] = "float"
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
                f"no other width (parofx.affine computes {QUANTIZER_BITS})"
            )
        if not isinstance(self.group_size, int) or self.group_size not in (128, *FALLBACK_GROUP_SIZES):
            problems.append(f"group_size must be one of (128, 64, 32), got {self.group_size!r}")
        problems += _check_int("krot", self.krot, 0)
        problems += _check_bool("share_siblings", self.share_siblings)
        problems += _check_bool("mixed_group_size", self.mixed_group_size)
        if self.lm_head not in ("float", *HEAD_BITS) or isinstance(self.lm_head, (bool, float)):
            problems.append(f"lm_head must be one of {('float', *HEAD_BITS)}, got {self.lm_head!r}")
        if not isinstance(self.calibration, CalibrationConfig):
            problems.append(f"calibration must be a CalibrationConfig, got {type(self.calibration).__name__}")
        _raise_if(problems, "ParoConfig")

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
        raise ConfigError(f"unknown {cls.__name__} options {unknown}; accepted are {accepted}")
    return cls(**options)
