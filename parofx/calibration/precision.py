"""The precision of fp32 matrix products, as a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch


@contextlib.contextmanager
def product_precision(kind: Literal["fast", "exact"]) -> Iterator[None]:
    """Multiply fp32 matrices with bf16 (CPU) or TF32 (CUDA) factors, or with fp32 ones whatever the user has set.

    Sums are fp32 either way.
    """
    fast = kind == "fast"
    # torch's own types leave out that of mkldnn.
    chosen: tuple[tuple[Any, str], ...] = (
        (torch.backends.mkldnn.matmul, "bf16"),  # type: ignore[attr-defined]
        (torch.backends.cuda.matmul, "tf32"),
    )
    before = [backend.fp32_precision for backend, _ in chosen]
    try:
        for backend, precision in chosen:
            backend.fp32_precision = precision if fast else "ieee"
        yield
    finally:
        for (backend, _), precision in zip(chosen, before, strict=True):
            backend.fp32_precision = precision
