"""Tensors computed from others once, while those stay as they are.

The cache is keyed by the identity of the first source and dies with it; an entry is used only while every source has
the same storage and version as when it was made. Graphs compiled for prefill and decode share packed weights this way.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_Value = TypeVar("_Value")
_lock = threading.RLock()
_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class State:
    """Which tensor this is and what it held: identity, address and in-place version."""

    reference: weakref.ref[Tensor]
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> State:
        """Return the present state of a tensor."""
        return cls(weakref.ref(tensor), tensor.data_ptr(), _version(tensor))

    def holds_for(self, tensor: Tensor) -> bool:
        """Say whether `tensor` is the one noted, unchanged."""
        return self.reference() is tensor and self.address == tensor.data_ptr() and self.version == _version(tensor)

    def alive(self) -> bool:
        """Say whether the tensor still exists."""
        return self.reference() is not None

    def current(self) -> bool:
        """Say whether the tensor still exists, unchanged."""
        tensor = self.reference()
        return tensor is not None and self.holds_for(tensor)


def unchanged(states: Sequence[State], tensors: Sequence[Tensor]) -> bool:
    """Say whether tensors are the ones noted, in order and unchanged."""
    return len(states) == len(tensors) and all(
        state.holds_for(tensor) for state, tensor in zip(states, tensors, strict=True)
    )


def derived(kind: object, sources: Sequence[Tensor], make: Callable[[], _Value]) -> _Value:
    """Return `make()`, or what it returned earlier for the same `kind` and unchanged sources.

    Args:
        kind: hashable; what is made and with which options.
        sources: the tensors it is made from, at least one.
        make: computes the value; it must not keep the sources alive.
    """
    with _lock:
        if sources[0] not in _cache:
            _cache[sources[0]] = {}
        entries: dict[Any, tuple[tuple[State, ...], _Value]] = _cache[sources[0]]
        known = entries.get(kind)
        if known is not None and unchanged(known[0], sources):
            return known[1]
        value = make()
        for stale in [key for key, (states, _) in entries.items() if not all(state.current() for state in states)]:
            del entries[stale]
        entries[kind] = (tuple(State.of(source) for source in sources), value)
        return value


def _version(tensor: Tensor) -> int:
    # Inference tensors count no versions and cannot be written in place outside of inference mode.
    return 0 if tensor.is_inference() else tensor._version
