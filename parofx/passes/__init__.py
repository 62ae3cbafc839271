"""The passes, one file each, and their catalogue.

| stage | made by |
|-|-|
| FLOAT | `capture`, `normalize` |
| PREPARED | `insert_transforms`, `allocate_bits` |
| CALIBRATED | `calibrate` |
| CONVERTED | `convert`, `merge_siblings`, `fuse_producers` |
| LOWERED | `lower` |

Names are resolved when they are first asked for. Calibration reads graphs with helpers of this package, and the passes
fit with calibration's: neither is loaded for the other's sake.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from parofx import ops as _ops  # noqa: F401  (registers torch.ops.parofx)
from parofx.passes.base import Pass, PassReport, Stage, in_stage_order, registered, stage_of

if TYPE_CHECKING:
    from parofx.passes.allocate_bits import AllocateBits
    from parofx.passes.calibrate import Calibrate
    from parofx.passes.convert import Convert
    from parofx.passes.fuse_producers import FuseProducers
    from parofx.passes.insert_transforms import InsertTransforms
    from parofx.passes.lower import Lower
    from parofx.passes.merge_siblings import MergeSiblings
    from parofx.passes.normalize import Normalize
    from parofx.passes.verify import census, verify_equal, verify_stage

#: Where a name is defined; the passes in the order they are run.
_PUBLIC = {
    "Normalize": "normalize",
    "InsertTransforms": "insert_transforms",
    "AllocateBits": "allocate_bits",
    "Calibrate": "calibrate",
    "Convert": "convert",
    "MergeSiblings": "merge_siblings",
    "FuseProducers": "fuse_producers",
    "Lower": "lower",
    "census": "verify",
    "verify_equal": "verify",
    "verify_stage": "verify",
}

__all__ = [
    "AllocateBits",
    "Calibrate",
    "Convert",
    "FuseProducers",
    "InsertTransforms",
    "Lower",
    "MergeSiblings",
    "Normalize",
    "Pass",
    "PassReport",
    "Stage",
    "census",
    "registry",
    "stage_of",
    "verify_equal",
    "verify_stage",
]


def registry() -> list[type[Pass]]:
    """Return every pass class, in the order the stages run."""
    for module in _PUBLIC.values():
        importlib.import_module(f"{__name__}.{module}")
    ranks = {name: index for index, name in enumerate(_PUBLIC)}
    return in_stage_order(sorted(registered(), key=lambda cls: ranks.get(cls.__name__, len(ranks))))


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
