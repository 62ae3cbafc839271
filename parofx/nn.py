"""`ParoLinear`: a linear layer in the rotated, 4-bit form of a PARO checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parofx import ops as _ops  # noqa: F401  (registers torch.ops.parofx)
from parofx import packing, rotation
from parofx.errors import ShapeError

#: The tensors of a quantized module, in checkpoint order; `bias` may follow.
TENSOR_NAMES = ("qweight", "qzeros", "scales", "theta", "pairs", "channel_scales")
#: The tensors that siblings sharing one transform hold in common.
ROTATION_NAMES = ("theta", "pairs", "channel_scales")


class ParoLinear(nn.Module):
    """Compute `y = ROT(x ⊙ channel_scales) @ Wq + bias` with `Wq = (q − z)·scales`.

    The buffers are the checkpoint's tensors, and `state_dict` holds exactly these:

    | buffer | dtype | shape |
    |-|-|-|
    | `qweight` | int32 | `(K, N/8)` |
    | `qzeros` | int32 | `(K/g, N/8)` |
    | `scales` | fp16 | `(K/g, N)` |
    | `theta` | fp16 | `(krot, K/2)` |
    | `pairs` | int16 | `(krot, K)` |
    | `channel_scales` | fp16 | `(1, K)` |
    | `bias` (optional) | fp16 | `(N,)` |

    `.to(dtype)` moves devices and leaves these dtypes alone; the output has the dtype of the input.

    Args:
        in_features: K.
        out_features: N, a multiple of 8.
        group_size: input channels that share a scale and a rotation group; divides K.
        krot: rotation rounds.
        bias: whether there is a bias.
        device: of the buffers; `"meta"` allocates nothing.

    Raises:
        ShapeError: if the sizes do not fit together.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    theta: Tensor
    pairs: Tensor
    channel_scales: Tensor
    bias: Tensor | None
    #: There is no float weight; model code that asks for its dtype first tests whether it is a tensor.
    weight: None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int,
        krot: int,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size < 2 or group_size % 2 or in_features % group_size or out_features % packing.CODES_PER_WORD:
            raise ShapeError(
                f"group_size must be even and divide in_features, {packing.CODES_PER_WORD} must divide out_features: "
                f"got group_size {group_size}, in_features {in_features}, out_features {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.krot = krot
        for name, (dtype, shape) in tensor_specs(in_features, out_features, group_size, krot, bias=bias).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        if not bias:
            self.register_buffer("bias", None)
        if self.qweight.device.type != "meta":
            # A rotation that is one: every round pairs neighbours by angle 0.
            self.pairs.copy_(torch.arange(in_features, device=device).remainder(group_size).to(torch.int16))
            self.channel_scales.fill_(1.0)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ParoLinear:
        """Build a module around checkpoint tensors, without copying them.

        Args:
            tensors: `TENSOR_NAMES`, and `bias` if there is one, with the checkpoint's dtypes and shapes.

        Raises:
            ShapeError: listing what is missing, unexpected or contradictory.
        """
        check_tensors(tensors)
        groups, out_features = tensors["scales"].shape
        in_features = tensors["qweight"].shape[0]
        module = cls(
            in_features,
            out_features,
            group_size=in_features // groups,
            krot=tensors["pairs"].shape[0],
            bias="bias" in tensors,
            device="meta",
        )
        for name, tensor in tensors.items():
            setattr(module, name, tensor)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Return `(…, N)` for `x (…, K)`, in `x`'s dtype."""
        result: Tensor = torch.ops.parofx.rotate_int4_linear(
            x,
            self.pairs,
            self.theta,
            self.channel_scales,
            self.qweight,
            self.qzeros,
            self.scales,
            self.bias,
            self.group_size,
        )
        return result

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `(N, K)` that this module multiplies by, in the unrotated space."""
        work = rotation.compute_dtype(dtype)
        rotated = packing.dequantize_linear(self.qweight, self.qzeros, self.scales, work)
        reciprocal = self.channel_scales.to(work).reciprocal()
        return rotation.inverse_rotate(rotated, self.pairs, self.theta, reciprocal, self.group_size).to(dtype)

    def packed_bytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def extra_repr(self) -> str:
        """Show sizes and format, as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits=4, group_size={self.group_size}, krot={self.krot}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ParoLinear:
        # Casts convert floating tensors only: shown as integers, a buffer moves and keeps its dtype.
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            shown = buffer.view(torch.int16) if buffer.dtype == torch.float16 else buffer
            moved = fn(shown)
            if moved is not shown:  # else the tensor object stays, which siblings may share
                self._buffers[name] = moved.view(buffer.dtype)
        return self


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
