"""Providers: who computes a merged set of int4 linears on which device, in which precision.

`lower` asks them in order and takes the first that has no reason not to. Kernel packages register theirs here; the
reference comes last and has none.
"""

from __future__ import annotations

from parofx.cpu_ops.provider import CpuProvider
from parofx.errors import LoweringError, one_per_line
from parofx.providers.aten import AtenProvider
from parofx.providers.base import Provider, SiblingCall
from parofx.providers.fusing import FusedCall, FusingProvider
from parofx.providers.reference import ReferenceProvider
from parofx.providers.triton import TritonProvider

__all__ = ["FusedCall", "FusingProvider", "Provider", "SiblingCall", "choose", "providers", "register"]

_PROVIDERS: list[Provider] = [CpuProvider(), TritonProvider(), AtenProvider(), ReferenceProvider()]


def providers() -> tuple[Provider, ...]:
    """Return the providers in the order they are asked."""
    return tuple(_PROVIDERS)


def register(provider: Provider) -> None:
    """Put a provider before all others; one of the same name is replaced."""
    _PROVIDERS[:] = [provider, *(one for one in _PROVIDERS if one.name != provider.name)]


def choose(call: SiblingCall) -> tuple[Provider, list[tuple[str, str]]]:
    """Return the provider for a call, and why those before it were passed over.

    Raises:
        LoweringError: if no provider serves it, with everyone's reason.
    """
    reasons: list[tuple[str, str]] = []
    for provider in _PROVIDERS:
        reason = provider.why_not(call)
        if reason is None:
            return provider, reasons
        reasons.append((provider.name, reason))
    listed = one_per_line(f"{name}: {reason}" for name, reason in reasons)
    raise LoweringError(f"no provider serves {call.node.name}; compile without the option 'activations':\n{listed}")
