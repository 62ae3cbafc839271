"""Checks of arguments that several public functions take."""

from __future__ import annotations

import logging

import torch
from torch import nn

from parofx.errors import ConfigError

logger = logging.getLogger("parofx")

#: What weights may be computed and stored in.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float_dtype(dtype: object) -> torch.dtype | None:
    """Return a dtype of float weights, given as such or by its name; `None` and `"auto"` give `None`.

    Raises:
        ConfigError: if it is no dtype, or one that holds no float weights.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype!r}")
    return found


def check_device(device: torch.device | str) -> torch.device:
    """Return a device that can be used.

    Raises:
        ConfigError: if PyTorch knows no such device, or this machine has none.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device must be one that PyTorch knows, such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error
    present = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= present:
        raise ConfigError(
            f"device must be present, got {str(found)!r}: PyTorch {torch.__version__} finds {present} CUDA devices; "
            "use another, or 'cpu'"
        )
    return found


def warn_of_long_windows(seqlen: int, model: nn.Module) -> None:
    """Warn where windows of text are longer than what a model's configuration says that it was made for."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and seqlen > longest:
        logger.warning(
            "windows have %d tokens, and %s was made for %d (max_position_embeddings): what it computes behind may "
            "mean nothing; give a smaller seqlen",
            seqlen,
            type(model).__name__,
            longest,
        )
