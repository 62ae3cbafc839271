"""`ParoLinear`: a linear layer in the rotated form of a PARO checkpoint, 4 bits a weight or 3 or 8."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parofx import kernel_layouts, linear_tensors, packing, rotation
from parofx.config import Activations
from parofx.cpu_ops import packed_linear as _packed_linear  # noqa: F401  (registers its layout)
from parofx.errors import LoweringError, ShapeError
from parofx.linear_tensors import COMPENSATION_NAMES, ROTATION_NAMES, TENSOR_NAMES, check_tensors, tensor_specs
from parofx.ops import stated

__all__ = ["CHECKPOINT", "ROTATION_NAMES", "TENSOR_NAMES", "ParoLinear", "check_tensors", "tensor_specs"]


#: What kernels read as the checkpoint has it.
_IN_EVERY_LAYOUT = ("bias", *COMPENSATION_NAMES)

#: The layout that is no kernel's.
CHECKPOINT = "checkpoint"

#: Held while a module changes its layout.
_lock = threading.RLock()


class ParoLinear(nn.Module):
    """Compute `y = ROT(x ⊙ channel_scales) @ Wq + bias` with `Wq = (q − z)·scales`.

    The tensors are the checkpoint's, and `state_dict` holds exactly these:

    | tensor | dtype | shape |
    |-|-|-|
    | `qweight` | int32 | `(K, bits·N/32)` |
    | `qzeros` | int32 | `(K/g, bits·N/32)` |
    | `scales` | fp16 | `(K/g, N)` |
    | `theta` | fp16 | `(krot, K/2)` |
    | `pairs` | int16 | `(krot, K)` |
    | `channel_scales` | fp16 | `(1, K)` |
    | `bias` (optional) | fp16 | `(N,)` |
    | `compensation_down` (optional) | fp16 | `(r, K)` |
    | `compensation_up` (optional) | fp16 | `(r, N)` |

    The last two are a low-rank correction: the module multiplies rotated activations by `Wq + downᵀ @ up`.

    The module owns one copy of them, as buffers in either of two layouts: the checkpoint's, or from the first forward
    on that of the device's kernels, where there are such (`layout` tells). `state_dict` and `checkpoint_tensors`
    convert; reading or setting one of the six by name brings the checkpoint's layout back until the next forward.
    `.to(dtype)` moves devices and leaves the dtypes alone; the output has the dtype of the input.

    Args:
        in_features: K.
        out_features: N, a multiple of 8 (32 for 3 bits, 4 for 8 bits).
        group_size: input channels that share a scale and a rotation group; divides K.
        krot: rotation rounds.
        bias: whether there is a bias.
        bits: width of a weight: 3, 4 or 8.
        compensation_rank: r, 0 for no correction.
        device: of the buffers; `"meta"` allocates nothing.

    Raises:
        ConfigError: if words do not hold codes of so many bits.
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
    #: What forwards outside of compiled graphs multiply; `parofx.set_eager_activations` sets it.
    eager_activations: Activations = "float"
    #: Name of the layout; None until the next forward decides.
    _layout: str | None = None
    #: While packed: the siblings that held the same rotation before.
    _lineage: kernel_layouts.Lineage | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int,
        krot: int,
        bias: bool,
        bits: int = 4,
        compensation_rank: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        packing.check_packable(bits)
        columns = packing.COLUMNS_PER_RUN[bits]
        if group_size < 2 or group_size % 2 or in_features % group_size or out_features % columns:
            raise ShapeError(
                f"group_size must be even and divide in_features, {columns} must divide out_features: got group_size "
                f"{group_size}, in_features {in_features}, out_features {out_features}, bits {bits}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.compensation_rank = compensation_rank
        self.group_size = group_size
        self.krot = krot
        for name, (dtype, shape) in self._specs(bias=bias).items():
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
            tensors: `TENSOR_NAMES`, and where there are such `bias` and both halves of a correction, with the
                checkpoint's dtypes and shapes.

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
            bits=packing.packed_bits(tensors["qweight"], tensors["scales"]),
            compensation_rank=linear_tensors.compensation_rank(tensors),
            device="meta",
        )
        for name, tensor in tensors.items():
            setattr(module, name, tensor)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Return `(…, N)` for `x (…, K)`, in `x`'s dtype.

        Raises:
            LoweringError: if `eager_activations` asks for what the kernels do not do for `x`.
        """
        layout = self._settle()
        # Not by attribute, which Dynamo would trace through `__getattr__` for every buffer.
        buffers: dict[str, Any] = self._buffers
        if layout != CHECKPOINT:
            kernels = kernel_layouts.by_name(layout)
            return kernels.linear(x, buffers, buffers["bias"], self.group_size, self.bits, self.eager_activations)
        if self.eager_activations != "float" and not torch.compiler.is_compiling():
            raise LoweringError(
                f"{self.eager_activations} activations need kernels, and there are none for group_size "
                f"{self.group_size} on {buffers['qweight'].device} here; call "
                "parofx.set_eager_activations(model, 'float') first"
            )
        result: Tensor = torch.ops.parofx.rotate_int4_linear(
            x,
            buffers["pairs"],
            buffers["theta"],
            buffers["channel_scales"],
            buffers["qweight"],
            buffers["qzeros"],
            buffers["scales"],
            buffers["bias"],
            self.group_size,
            *stated(self.bits, buffers.get("compensation_down"), buffers.get("compensation_up")),
        )
        return result

    @property
    def layout(self) -> str:
        """The layout the tensors are in: `"checkpoint"`, or the name of a kernel's."""
        return self._layout or CHECKPOINT

    def pack_(self) -> ParoLinear:
        """Bring the tensors into the layout of the device's kernels, if there are any, as the first forward does.

        Raises:
            ShapeError: if `pairs` holds anything but permutations.
        """
        self._settle()
        return self

    def unpack_(self) -> ParoLinear:
        """Bring the tensors into the checkpoint's layout, until the next forward or `pack_`."""
        with _lock:
            if self.layout != CHECKPOINT:
                tensors = self.checkpoint_tensors()
                if self._lineage is not None:
                    tensors |= self._lineage.join({name: tensors[name] for name in ROTATION_NAMES})
                self._hold(tensors, None)
            self._layout = None
        return self

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors by name, without changing the layout.

        In the checkpoint's layout they are the module's own, otherwise fresh ones.
        """
        tensors = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        if self.layout == CHECKPOINT:
            return tensors
        with torch.no_grad(), torch.inference_mode(False), torch._C._DisableAutocast():
            unpacked = kernel_layouts.by_name(self.layout).unpack(tensors, self.group_size, self.bits)
        return unpacked | {name: tensors[name] for name in _IN_EVERY_LAYOUT if name in tensors}

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight `(N, K)` that this module multiplies by, in the unrotated space."""
        work = rotation.compute_dtype(dtype)
        tensors = self.checkpoint_tensors()
        rotated = packing.dequantize_linear(tensors["qweight"], tensors["qzeros"], tensors["scales"], work)
        if self.compensation_rank:
            rotated += tensors["compensation_up"].to(work).t() @ tensors["compensation_down"].to(work)
        reciprocal = tensors["channel_scales"].to(work).reciprocal()
        pairs, theta = tensors["pairs"], tensors["theta"]
        return rotation.inverse_rotate(rotated, pairs, theta, reciprocal, self.group_size).to(dtype)

    def packed_bytes(self) -> int:
        """Return the bytes of the checkpoint's tensors."""
        has_bias = self._buffers["bias"] is not None
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._specs(bias=has_bias).values())

    def extra_repr(self) -> str:
        """Show sizes and format, as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}, krot={self.krot}"
            + (f", compensation_rank={self.compensation_rank}" if self.compensation_rank else "")
        )

    def _specs(self, *, bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        sizes = (self.in_features, self.out_features, self.group_size, self.krot)
        return tensor_specs(*sizes, bias=bias, bits=self.bits, rank=self.compensation_rank)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _settle(self) -> str:
        """Return the layout, chosen and packed first if need be; Dynamo runs this once, while it traces."""
        if self._layout is not None:
            return self._layout
        with _lock:
            if self._layout is None:
                buffers: dict[str, Any] = self._buffers
                if any(type(buffer) is not Tensor for buffer in buffers.values() if buffer is not None):
                    return CHECKPOINT  # an exporter's tensors hold nothing to pack: decided once there are real ones
                layout = kernel_layouts.choose(buffers["qweight"].device, self.group_size)
                if layout is None:
                    self._layout = CHECKPOINT
                else:
                    with torch.no_grad(), torch.inference_mode(False), torch._C._DisableAutocast():
                        packed = layout.pack(buffers, self.group_size, self.bits)
                    self._lineage = kernel_layouts.Lineage.of(buffers["theta"])
                    kept = {name: buffers[name] for name in _IN_EVERY_LAYOUT if name in buffers}
                    self._hold(packed | kept, layout.name)
            return self._layout or CHECKPOINT

    def _hold(self, buffers: Mapping[str, Tensor | None], layout: str | None) -> None:
        """Replace all buffers, by a new dictionary: who iterates over the old one is not disturbed."""
        self._buffers = {**buffers, "bias": buffers.get("bias")}
        # Kernels' buffers are in no state_dict under their own names.
        self._non_persistent_buffers_set = set() if layout is None else set(buffers) - set(_IN_EVERY_LAYOUT)
        self._layout = layout

    def __getattr__(self, name: str) -> Any:
        if name in TENSOR_NAMES and self.layout != CHECKPOINT:
            if torch.compiler.is_compiling():
                return self.checkpoint_tensors()[name]  # a trace must leave the module as it is
            self.unpack_()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TENSOR_NAMES:
            self.unpack_()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ParoLinear:
        with _lock:
            probe = min((buffer for buffer in self._buffers.values() if buffer is not None), key=Tensor.numel)
            if _moved(fn, probe) is not probe:
                # To another device, or to memory that holds something else: kernels' tensors are made anew there.
                self.unpack_()
            for name, buffer in self._buffers.items():
                if buffer is not None:
                    self._buffers[name] = _moved(fn, buffer)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.layout == CHECKPOINT:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in self.checkpoint_tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        with _lock:
            layout, lineage = self.layout, self._lineage
            held: dict[str, Any] = self._buffers
            assign = local_metadata.get("assign_to_params_buffers", False)
            self.unpack_()
            tensors = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
            given = {name: state_dict.get(prefix + name) for name in tensors}
            problems = linear_tensors.why_not_loadable(
                tensors, given, self.group_size, prefix.rstrip(".") or "ParoLinear"
            )
            if problems:
                error_msgs += problems
            else:
                # Siblings hold the same tensors: what is loaded here must not be written into theirs.
                self._buffers |= {name: tensors[name].clone() for name in ROTATION_NAMES}
                rest = (strict, missing_keys, unexpected_keys, error_msgs)
                super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
                for name in ROTATION_NAMES:
                    self._buffers[name] = kernel_layouts.succeed(tensors[name], self.get_buffer(name))
            if layout == CHECKPOINT:
                return
            if lineage is not None:
                lineage.loaded({name: self.get_buffer(name) for name in ROTATION_NAMES})
            # In the same layout and memory: compiled graphs need no second look, and slices stay slices.
            self.pack_()
            if self.layout == layout and not assign:
                for name in kernel_layouts.by_name(layout).weight_buffers:
                    held[name].copy_(self._buffers[name])
                    self._buffers[name] = held[name]


def _moved(fn: Callable[..., Any], buffer: Tensor) -> Tensor:
    # Casts convert floating tensors only: shown as integers, a buffer moves and keeps its dtype.
    shown = buffer.view(torch.int16) if buffer.dtype == torch.float16 else buffer
    moved: Tensor = fn(shown)
    # A tensor that stays is the same object, which siblings may share.
    return buffer if moved is shown else moved.view(buffer.dtype)
