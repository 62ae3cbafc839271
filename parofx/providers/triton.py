"""The Triton kernels as a provider: int4 linears on CUDA, and producers that rotate their input."""

from __future__ import annotations

import importlib.util

import torch
from torch.fx import Node

from parofx.errors import ConfigError
from parofx.providers.base import SiblingCall
from parofx.providers.fusing import FusedCall

_DTYPES = (torch.float16, torch.bfloat16)


class TritonProvider:
    """Serves fp16 and bf16 on CUDA; what it needs of `parofx.triton_ops` is imported once it does.

    Args:
        arch: lower for this architecture, whatever the device; by default for the device of the call, if it is there.
    """

    name = "triton"

    def __init__(self, arch: str | None = None) -> None:
        self.arch = arch

    def why_not(self, call: SiblingCall) -> str | None:
        """Return why the Triton kernels do not serve a call, or None."""
        if self.arch is None and call.device.type != "cuda":
            return f"device {call.device.type} is not cuda"
        if call.dtype not in _DTYPES:
            return f"{call.dtype} is not one of {_DTYPES}"
        if call.bits != 4:
            return f"weights have {call.bits} bits; the kernels know 4"
        if call.corrections:
            return "weights have low-rank corrections, which the kernels do not add"
        if call.activations != "float":
            return f"activations are {call.activations}; the kernels multiply them as they are"
        if not call.is_bound():
            return "the packed tensors are not known when the graph is lowered"
        return _why_not_sizes(call) or (_why_not_here(call.device) if self.arch is None else None)

    def why_not_fuse(self, call: SiblingCall, launches: int) -> str | None:
        """Return why a call's producer should not rotate, or None: what the cost model says.

        Where the number of rows is dynamic, the operator decides when it knows them.
        """
        from parofx.triton_ops.architectures import architecture_of
        from parofx.triton_ops.producer_cost import why_not_in_producer

        if call.rows is None:
            return "the number of rows is dynamic; the operator places the rotation when it knows them"
        return why_not_in_producer(
            max(call.rows, 1),
            call.in_features,
            sum(call.out_features),
            call.group_size,
            _krot(call, 0),
            self.arch or architecture_of(call.device),
            rotations=len(call.rotations),
            launches=launches,
        )

    def emit(self, call: SiblingCall) -> list[Node]:
        """Insert one operator on packed tensors, and slices of its output."""
        from parofx.triton_ops import emission

        return emission.emit(call)

    def emit_fused(self, fused: FusedCall) -> tuple[list[Node], Node | None]:
        """Insert the producer's operator, and that of the linears behind it."""
        from parofx.triton_ops import emission

        return emission.emit_fused(fused)


def _why_not_sizes(call: SiblingCall) -> str | None:
    from parofx.triton_ops.layout import GROUP_SIZES
    from parofx.triton_ops.siblings import MAX_ROTATIONS

    if call.group_size not in GROUP_SIZES:
        return f"group_size {call.group_size} is not one of {GROUP_SIZES}"
    if len(call.rotations) > MAX_ROTATIONS:
        return f"{len(call.rotations)} rotations are more than {MAX_ROTATIONS}"
    if len({_krot(call, index) for index in range(len(call.rotations))}) > 1:
        return "the siblings' rotations have different numbers of rounds"
    return None


def _why_not_here(device: torch.device) -> str | None:
    from parofx.triton_ops.architectures import architecture_of

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    try:
        architecture_of(device)
    except ConfigError as error:
        return str(error)
    return None


def _krot(call: SiblingCall, index: int) -> int:
    _, theta, _ = call.rotations[index]
    return call.tensor(theta).shape[0]
