"""The precision of matrix products: of fp32 ones as a context, and of 16-bit ones on CPUs that are slow at them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Rows from which on converting a weight takes less time than emulated products do.
_MANY_ROWS = 16
#: The node of a captured graph that `attention` stands for.
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


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


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x Wᵀ + b` in the dtype of the input x `(…, K)`, from fp32 factors where 16-bit ones would be emulated.

    On such a CPU that is six times as fast for many rows; a few are left to PyTorch, and so is what autocast is on for.
    Sums are fp32 either way.
    """
    device, dtype = input.device.type, input.dtype
    emulated = dtype in (torch.bfloat16, torch.float16) and not multiplies_16_bit(device, dtype)
    alike = weight.dtype == dtype and (bias is None or bias.dtype == dtype)
    few = input.shape[:-1].numel() < _MANY_ROWS
    if not emulated or not alike or few or torch.is_autocast_enabled(device):
        return torch.nn.functional.linear(input, weight, bias)
    with product_precision("exact"):
        wide = torch.nn.functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """Attend as `scaled_dot_product_attention` does, where gradients are wanted in fp32 if 16 bits would be emulated.

    On such a CPU PyTorch has a fast forward for 16 bits, and a backward that takes ten times as long as that of fp32.
    """
    given = (query, key, value)
    device, dtype = query.device.type, query.dtype
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    emulated = dtype in (torch.bfloat16, torch.float16) and not multiplies_16_bit(device, dtype)
    if not trained or not emulated or torch.is_autocast_enabled(device):
        unchanged: Tensor = ATTENTION(*given, attn_mask, *rest, **options)
        return unchanged
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with product_precision("exact"):
        wide: Tensor = ATTENTION(*(one.float() for one in given), attn_mask, *rest, **options)
    return wide.to(dtype)


class _UnemulatedLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Subclasses of Tensor have products of their own, and so have compiled graphs.
        if func is torch.nn.functional.linear and not types and not torch.compiler.is_compiling():
            func = linear
        return func(*args, **(kwargs or {}))


def unemulated_linears(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `torch.nn.functional.linear`, wherever the model calls it, is `linear` of this module.

    A compiled model is left as it is: it would be compiled anew.
    """
    # Of `torch.compile(module)` and of `module.compile()`.
    compiled = any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in model.modules())
    return contextlib.nullcontext() if compiled else _UnemulatedLinears()


def autocast_while_training(device: str, dtype: torch.dtype, *, enabled: bool) -> torch.autocast:
    """Return a context of bf16 products for a model of a dtype, if a type of device is fast at them.

    A model in fp16 has them in any case: its gradients would vanish in fp16.
    """
    worthwhile = multiplies_16_bit(device) or dtype == torch.float16
    return torch.autocast(device, torch.bfloat16, enabled=enabled and worthwhile)
