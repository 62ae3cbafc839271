"""How kernels arrange the tensors of a `ParoLinear`: one to one with the checkpoint's, and back.

A `ParoLinear` owns one copy of its weight. Where the kernels of its device want another order of the bytes, it holds
them in that order and gives the checkpoint's back on request, bit for bit. A layout says where it serves and converts
both ways; only a layout that loses nothing can be one.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from parofx.config import Activations

#: Tensors that several modules may hold, by role and content.
_shared: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()
#: Tensor → what was loaded in its place; siblings that hold it still will take the same.
_successors: WeakIdKeyDictionary = WeakIdKeyDictionary()
#: Angles → the lineage of the linears that hold them.
_lineages: WeakIdKeyDictionary = WeakIdKeyDictionary()
_LAYOUTS: dict[str, KernelLayout] = {}


class KernelLayout(Protocol):
    """One arrangement of a linear's tensors, named as a `ParoLinear` registers them."""

    name: str
    #: The buffers in place of the checkpoint's six tensors.
    buffers: tuple[str, ...]
    #: Those of the weight, which no other module holds; the rest may be shared between siblings.
    weight_buffers: tuple[str, ...]

    def why_not(self, device: torch.device, group_size: int) -> str | None:
        """Return why linears on a device are not held in this layout, or None."""
        ...

    def pack(self, tensors: Mapping[str, Tensor], group_size: int, bits: int) -> dict[str, Tensor]:
        """Return `buffers` of a checkpoint's tensors."""
        ...

    def unpack(self, packed: Mapping[str, Tensor], group_size: int, bits: int) -> dict[str, Tensor]:
        """Invert `pack`: fresh tensors, equal to the last bit."""
        ...

    def linear(
        self,
        x: Tensor,
        packed: Mapping[str, Tensor],
        bias: Tensor | None,
        group_size: int,
        bits: int,
        eager_activations: Activations = "float",
    ) -> Tensor:
        """Return `(…, N)` for `x (…, K)`; differentiable in `x`, and one operator call where a graph is traced.

        `packed` also holds `compensation_down` and `compensation_up` where there is a correction to add.

        Outside of graphs `eager_activations` `"int8"` quantizes rotated activations per (row, group).

        Raises:
            LoweringError: if activations cannot be quantized here.
        """
        ...


def register(layout: KernelLayout) -> None:
    """Add a layout, asked after those before it; one of the same name is replaced."""
    _LAYOUTS[layout.name] = layout


def by_name(name: str) -> KernelLayout:
    """Return a registered layout."""
    return _LAYOUTS[name]


def choose(device: torch.device, group_size: int) -> KernelLayout | None:
    """Return the layout for a linear on a device, or None where the checkpoint's is as good as any."""
    return next((layout for layout in _LAYOUTS.values() if layout.why_not(device, group_size) is None), None)


def share(role: str, tensor: Tensor) -> Tensor:
    """Return an equal tensor of the same role that is alive already, or else this one.

    Siblings have one rotation: converted one by one, they find one another's tensors here. Equal means dtype, shape,
    device and bytes, now: one that was written since is not taken. For packed tensors, which nobody is handed to write.
    """
    content = _bytes(tensor)
    digest = hashlib.sha256(content.numpy().tobytes()).digest()
    key = (role, tensor.dtype, tuple(tensor.shape), tensor.device, digest)
    found = _shared.get(key)
    if found is None or not torch.equal(_bytes(found), content):
        _shared[key] = found = tensor
    return found


class Lineage:
    """What linears that held one rotation have in common while they hold it packed.

    Unpacked they hold one again. A copied linear has a lineage of its own, which its copied siblings share: equal bytes
    alone join no two models, for a tensor that one of them hands out may be written.
    """

    def __init__(self) -> None:
        self._unpacked: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._successor: weakref.ref[Lineage] | None = None
        self._digest = b""

    def __reduce__(self) -> tuple[type[Lineage], tuple[()]]:
        return Lineage, ()

    @staticmethod
    def of(theta: Tensor) -> Lineage:
        """Return the lineage of those that hold a tensor of angles."""
        if theta not in _lineages:
            _lineages[theta] = Lineage()
        found: Lineage = _lineages[theta]
        return found

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return equal tensors that another of the lineage was handed, where they are alive, or else these."""
        joined = {}
        for name, tensor in tensors.items():
            held = self._unpacked.get(name)
            if held is None or held.device != tensor.device or not torch.equal(held, tensor):
                self._unpacked[name] = held = tensor
            joined[name] = held
        return joined

    def loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """Note what was loaded in place of the rotation: who loads equal bytes stays in one lineage."""
        digest = hashlib.sha256(b"".join(_bytes(tensor).numpy().tobytes() for tensor in tensors.values())).digest()
        known = None if self._successor is None else self._successor()
        if known is None or known._digest != digest:
            known = Lineage()
            known._digest, self._successor = digest, weakref.ref(known)
        _lineages[tensors["theta"]] = known


def succeed(old: Tensor, new: Tensor) -> Tensor:
    """Return the tensor that took the place of `old` in a sibling if it equals `new`, or else `new`.

    So linears that held one tensor hold one again after equal values were loaded into each, and no others do.
    """
    known: Tensor | None = _successors.get(old)  # type: ignore[no-untyped-call]
    if known is not None and known.device == new.device and torch.equal(known, new):
        return known
    if not new.is_meta:
        _successors[old] = new
    return new


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)
