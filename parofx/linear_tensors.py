"""The tensors of one quantized linear in a checkpoint: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parofx import packing, rotation
from parofx.errors import ShapeError

#: The tensors of a quantized module, in checkpoint order; `bias` may follow.
TENSOR_NAMES = ("qweight", "qzeros", "scales", "theta", "pairs", "channel_scales")
#: The tensors that siblings sharing one transform hold in common.
ROTATION_NAMES = ("theta", "pairs", "channel_scales")


def tensor_specs(
    in_features: int, out_features: int, group_size: int, krot: int, *, bias: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return name → (dtype, shape) of the checkpoint tensors of one linear."""
    groups, words = in_features // group_size, out_features // packing.CODES_PER_WORD
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
    return specs


def check_tensors(tensors: Mapping[str, Tensor], where: str = "ParoLinear") -> None:
    """Check names, dtypes and shapes of the checkpoint tensors of one linear, against one another.

    Raises:
        ShapeError: listing every problem.
    """
    missing = [name for name in TENSOR_NAMES if name not in tensors]
    unexpected = sorted(set(tensors) - {*TENSOR_NAMES, "bias"})
    if missing or unexpected:
        raise ShapeError(f"{where}: expected {[*TENSOR_NAMES, '[bias]']}, missing {missing}, unexpected {unexpected}")
    packing.check_packed_shapes(tensors["qweight"], tensors["qzeros"], tensors["scales"])
    groups, out_features = tensors["scales"].shape
    in_features, krot = tensors["qweight"].shape[0], tensors["pairs"].shape[0]
    group_size = in_features // groups
    if group_size % 2 or group_size < 2:
        raise ShapeError(f"{where}: group_size (rows of qweight over rows of scales) must be even, got {group_size}")
    specs = tensor_specs(in_features, out_features, group_size, krot, bias="bias" in tensors)
    for name, (dtype, shape) in specs.items():
        found = tensors[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ShapeError(
                f"{where}.{name}: expected {dtype} {shape}, got {found.dtype} {tuple(found.shape)} "
                f"(in_features {in_features}, out_features {out_features}, group_size {group_size}, krot {krot})"
            )
    if not tensors["pairs"].is_meta:
        rotation.check_pairs(tensors["pairs"], group_size, f"{where}.pairs")
