"""Models quantized by hand: every linear rounded to nearest under a random rotation, without `parofx.quantize`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from parofx import affine, packing, pairing, rotation
from parofx.nn import ParoLinear


def round_linear(
    weight: Tensor, bias: Tensor | None, rotation_tensors: dict[str, Tensor], group_size: int, bits: int = 4
) -> ParoLinear:
    """Return a `ParoLinear` of the weight `(N, K)`, rounded under the given theta, pairs and channel scales."""
    pairs, theta, channel_scales = (rotation_tensors[name] for name in ("pairs", "theta", "channel_scales"))
    reciprocal = channel_scales.float().reciprocal()
    rotated = rotation.rotate(weight.detach().float(), pairs, theta, reciprocal, group_size)
    scales, zeros = affine.choose_qparams(rotated, bits, group_size)
    codes = affine.quantize(rotated, scales, zeros, bits, group_size)
    qweight, qzeros, packed_scales = packing.pack_linear(codes, scales, zeros, bits=bits)
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": packed_scales, **rotation_tensors}
    if bias is not None:
        tensors["bias"] = bias.detach().half()
    return ParoLinear.from_tensors(tensors)


def random_rotation(in_features: int, group_size: int, krot: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pairs": pairing.make_pairs(in_features, group_size, krot, seed=seed),
        "theta": torch.randn(krot, in_features // 2, generator=generator).half(),
        "channel_scales": (0.5 + torch.rand(1, in_features, generator=generator)).half(),
    }


def round_model(
    model: nn.Module,
    group_size: int | Callable[[str], int] = 32,
    krot: int = 3,
    bits: Callable[[str], int] = lambda name: 4,
) -> nn.Module:
    """Round every linear but the output head, in place; linears with one parent and equal K share a rotation."""
    shared: dict[tuple[str, int, int], dict[str, Tensor]] = {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in list(model.named_modules()):
        if module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        size = group_size(name) if callable(group_size) else group_size
        if weight.shape[1] % size or weight.shape[0] % packing.COLUMNS_PER_RUN[bits(name)]:
            continue
        key = (name.rpartition(".")[0], weight.shape[1], size)
        if key not in shared:
            shared[key] = random_rotation(weight.shape[1], size, krot, seed=len(shared))
        model.set_submodule(name, round_linear(weight, module.bias, shared[key], size, bits(name)))
    return model.eval()
