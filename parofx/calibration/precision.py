"""The precision of matrix products: of fp32 ones as a context, and of 16-bit ones on CPUs that are slow at them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor


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


@functools.cache
def multiplies_16_bit(device: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Tell whether a type of device has fast products of a 16-bit dtype.

    An x86 CPU emulates those of bf16 without AVX-512, and those of fp16 without AVX512-FP16.
    """
    if device != "cpu":
        return True
    # There is no public question for it.
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    asked = getattr(torch.ops.mkldnn, name, None)
    return asked is None or bool(asked())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + b` in the dtype of `x (…, K)`, from fp32 factors where 16-bit products would be emulated.

    On such a CPU that is six times as fast. Sums are fp32 either way. What autocast is on for is left to it.
    """
    device = x.device.type
    emulated = x.dtype in (torch.bfloat16, torch.float16) and not multiplies_16_bit(device, x.dtype)
    if not emulated or weight.dtype != x.dtype or torch.is_autocast_enabled(device):
        return torch.nn.functional.linear(x, weight, bias)
    with product_precision("exact"):
        wide = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def autocast_while_training(device: str, dtype: torch.dtype, *, enabled: bool) -> torch.autocast:
    """Return a context of bf16 products for a model of a dtype, if a type of device is fast at them.

    A model in fp16 has them in any case: its gradients would vanish in fp16.
    """
    worthwhile = multiplies_16_bit(device) or dtype == torch.float16
    return torch.autocast(device, torch.bfloat16, enabled=enabled and worthwhile)
