"""The passes, one file each, and their catalogue.

| stage | made by |
|-|-|
| FLOAT | `capture`, `normalize` |
| PREPARED | `insert_transforms` |
| CALIBRATED | `calibrate` |
| CONVERTED | `convert`, `merge_siblings`, `fuse_producers` |
| LOWERED | `lower` |
"""

from __future__ import annotations

from parofx import ops as _ops  # noqa: F401  (registers torch.ops.parofx)
from parofx.passes.base import Pass, PassReport, Stage, registry, stage_of
from parofx.passes.calibrate import Calibrate
from parofx.passes.capture import capture
from parofx.passes.convert import Convert
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.lower import Lower
from parofx.passes.merge_siblings import MergeSiblings  # isort: skip
from parofx.passes.fuse_producers import FuseProducers  # isort: skip  (the catalogue lists passes as they are run)
from parofx.passes.normalize import Normalize
from parofx.passes.verify import census, verify_equal, verify_stage

__all__ = [
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
    "capture",
    "census",
    "registry",
    "stage_of",
    "verify_equal",
    "verify_stage",
]
