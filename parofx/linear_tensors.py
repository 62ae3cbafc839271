"""The tensors of one quantized linear in a checkpoint: names, dtypes, shapes, and which values cannot be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parofx import packing, rotation
from parofx.errors import ShapeError

#: The tensors of a quantized module, in checkpoint order; `bias` may follow.
TENSOR_NAMES = ("qweight", "qzeros", "scales", "theta", "pairs", "channel_scales")
#: The halves of a low-rank correction, which a module may have besides.
COMPENSATION_NAMES = ("compensation_down", "compensation_up")
#: The tensors that siblings sharing one transform hold in common.
ROTATION_NAMES = ("theta", "pairs", "channel_scales")


def tensor_specs(
    in_features: int, out_features: int, group_size: int, krot: int, *, bias: bool, bits: int = 4, rank: int = 0
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return name → (dtype, shape) of the checkpoint tensors of one linear."""
    groups, words = in_features // group_size, packing.words_per_row(out_features, bits)
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int32, (in_features, words)),
        "qzeros": (torch.int32, (groups, words)),
        "scales": (torch.float16, (groups, out_features)),
        "theta": (torch.float16, (krot, in_features // 2)),
        "pairs": (torch.int16, (krot, in_features)),
        "channel_scales": (torch.float16, (1, in_features)),
    }
    if bias:
        specs["bias"] = (torch.float16, (out_features,))
    if rank:
        specs["compensation_down"] = (torch.float16, (rank, in_features))
        specs["compensation_up"] = (torch.float16, (rank, out_features))
    return specs


def check_tensors(tensors: Mapping[str, Tensor], where: str = "ParoLinear") -> None:
    """Check names, dtypes and shapes of the checkpoint tensors of one linear, against one another.

    Raises:
        ShapeError: listing every problem.
    """
    compensation = COMPENSATION_NAMES if any(name in tensors for name in COMPENSATION_NAMES) else ()
    missing = [name for name in (*TENSOR_NAMES, *compensation) if name not in tensors]
    unexpected = sorted(set(tensors) - {*TENSOR_NAMES, *COMPENSATION_NAMES, "bias"})
    if missing or unexpected:
        expected = [*TENSOR_NAMES, "[bias]", *(f"[{name}]" for name in COMPENSATION_NAMES)]
        raise ShapeError(f"{where}: expected {expected}, missing {missing}, unexpected {unexpected}")
    packing.check_packed_shapes(tensors["qweight"], tensors["qzeros"], tensors["scales"])
    groups, out_features = tensors["scales"].shape
    in_features, krot = tensors["qweight"].shape[0], tensors["pairs"].shape[0]
    group_size = in_features // groups
    if group_size % 2 or group_size < 2:
        raise ShapeError(f"{where}: group_size (rows of qweight over rows of scales) must be even, got {group_size}")
    bits = packing.packed_bits(tensors["qweight"], tensors["scales"])
    specs = tensor_specs(
        in_features, out_features, group_size, krot, bias="bias" in tensors, bits=bits, rank=compensation_rank(tensors)
    )
    for name, (dtype, shape) in specs.items():
        found = tensors[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ShapeError(
                f"{where}.{name}: expected {dtype} {shape}, got {found.dtype} {tuple(found.shape)} "
                f"(in_features {in_features}, out_features {out_features}, bits {bits}, group_size {group_size}, "
                f"krot {krot})"
            )
    if not tensors["pairs"].is_meta:
        rotation.check_pairs(tensors["pairs"], group_size, f"{where}.pairs")


def compensation_rank(tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of a linear's correction; 0 without one."""
    return tensors["compensation_down"].shape[0] if "compensation_down" in tensors else 0


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
            zeros = int((tensor == 0).sum())
            problems.append(f"{where}.channel_scales: weights are divided by them, got {zeros} zeros")
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
