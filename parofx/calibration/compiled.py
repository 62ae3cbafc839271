"""Whether calibration's inner loops run in the compiled CPU library."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from parofx import cpu_ops

logger = logging.getLogger("parofx")


def has_loops_for(tensor: Tensor) -> bool:
    """Return whether there are compiled loops for a tensor, building the library at the first call.

    Where it cannot be built for want of a compiler, calibration does without, and says so once.

    Raises:
        BuildFailedError: if there is a compiler and it fails.
        RuntimeError: if the library does not load, or `PAROFX_CPU_ISA` names what this machine lacks.
    """
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    try:
        cpu_ops.load()
    except cpu_ops.BuildUnavailableError as error:
        _warn_once(str(error))
        return False
    return True


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("calibration takes longer without its compiled loops: %s", reason)
