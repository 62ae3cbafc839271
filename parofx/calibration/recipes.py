"""The named recipes: what each option of `CalibrationConfig` is unless it is given.

| recipe | transform | weights | rounding |
|-|-|-|-|
| `"fast"` | LDL objective | as they are | error feedback |
| `"best"` | LDL objective per linear, more steps | as they are | error feedback; then the whole model is distilled |
| `"paper"` | block by block | block by block | to nearest, trained grids |
| `"data-free"` | range objective, weights alone | as they are | to nearest |

`"paper"` is ParoQuant (arXiv 2511.10645) §4 with the hyperparameters of its public code, but for the data: its
validation sequences are held out of the calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_CLIP_RATIOS = tuple(1 - step / 40 for step in range(13))

_FAST: dict[str, object] = {
    "steps": 60,
    "rows": 512,
    "pairs": "matching",
    "row_weights": "relative",
    "clip_ratios": _CLIP_RATIOS,
    "rounding": "feedback",
    "seqlen": 512,
    "samples": 64,
    "validation_samples": 8,
    "batch_size": 8,
    "transform_epochs": 0,
    "weight_epochs": 0,
    "tune_epochs": 0,
    "distill_epochs": 0,
    "transform_learning_rate": 0.05,
    "block_loss": "relative",
}
_BEST = _FAST | {"steps": 300, "rows": 1024, "distill_epochs": 3, "transform_learning_rate": 0.01}
_PAPER = _FAST | {
    "steps": 0,
    "pairs": "greedy",
    "row_weights": "equal",
    "clip_ratios": (1.0,),
    "rounding": "nearest",
    "seqlen": 2048,
    "samples": 2048,
    "validation_samples": 64,
    "batch_size": 16,
    "transform_epochs": 10,
    "weight_epochs": 10,
    "block_loss": "smooth_l1",
}

#: Recipe → its options.
RECIPES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {"fast": _FAST, "best": _BEST, "data-free": _FAST | {"rounding": "nearest"}, "paper": _PAPER}
)
#: Recipes that fit a transform for each linear: it costs a rotation more at run time, and no bits.
UNSHARED = frozenset({"best"})
