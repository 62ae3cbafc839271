"""Which values the checkpoint tensors of a linear may have, whatever brings them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from parofx import rotation
from parofx.errors import ShapeError


def why_not_valid(tensors: Mapping[str, Tensor], group_size: int, where: str) -> list[str]:
    """Return which values cannot be: numbers that are not finite, channels scaled by 0, pairs that are none.

    Args:
        tensors: any of a linear's checkpoint tensors, by name; those on the meta device hold nothing to check.
        group_size: channels per rotation group.
        where: the module's name, for the messages.
    """
    problems = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            problems.append(f"{where}.{name}: must be finite, got {count} values that are not")
        if name == "channel_scales" and not bool(tensor.all()):
            count = int((tensor == 0).sum())
            problems.append(f"{where}.{name}: must not be 0, got {count} channels that are")
        if name == "pairs":
            try:
                rotation.check_pairs(tensor, group_size, f"{where}.pairs")
            except ShapeError as error:
                problems.append(str(error))
    return problems


def why_not_loadable(held: Mapping[str, Tensor], given: Mapping[str, object], group_size: int, where: str) -> list[str]:
    """Return what is wrong with the values that are about to be loaded into a linear's tensors.

    What is missing or has another shape is not reported: `load_state_dict` does that.
    """
    fitting = {
        # As it will be stored: what is finite in fp32, or not 0, need not be so in fp16.
        name: tensor.detach().to(held[name].dtype)
        for name, tensor in given.items()
        if isinstance(tensor, Tensor) and tensor.shape == held[name].shape
    }
    return why_not_valid(fitting, group_size, where)
