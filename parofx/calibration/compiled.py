"""Whether calibration's inner loops run in the compiled CPU library."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from parofx import cpu_ops

logger = logging.getLogger("parofx")


def has_loops_for(tensor: Tensor) -> bool:
    """Return whether there are compiled loops for a tensor, building the library at the first call."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    reason = cpu_ops.why_unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("calibration takes longer without its compiled loops: %s", reason)
