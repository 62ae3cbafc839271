"""4-bit linears of other libraries, given the codes that parofx gets. None of them rotates anything.

A peer prepares weights once per layer and returns a call on `x (M, K)`. What is not installed is listed with the pip
line that installs it; `pip install -r benchmarks/requirements-peers.txt` installs all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _ggml

#: `layer()`: computes one layer's output from the input that was bound when it was made.
Call = Callable[[], Any]


@dataclass(frozen=True)
class Codes:
    """A quantized weight: codes and zeros uint8 `(K, N)` and `(G, N)`, scales fp16 `(G, N)`."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_size: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return `(K, N)`."""
        spread = [each.repeat_interleave(self.group_size, 0) for each in (self.zeros, self.scales)]
        return ((self.codes.to(dtype) - spread[0].to(dtype)) * spread[1].to(dtype)).contiguous()


@dataclass(frozen=True)
class Peer:
    """How to make a layer: `prepare(codes)` gives the packed weight, `bind(packed, x, threads)` a call."""

    name: str
    package: str | None
    pip: str
    prepare: Callable[[Codes], Any]
    bind: Callable[[Any, Tensor, int], Call]
    clone: Callable[[Any], Any]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    #: Returns what to do where being installed is not enough, or None.
    why_not: Callable[[], str | None] | None = None

    def missing(self) -> str | None:
        """Return the pip line of what is not installed, or None."""
        if self.why_not is not None:
            return self.why_not()
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return self.pip


def _bf16_linear(weight: Tensor, x: Tensor, threads: int) -> Call:
    x = x.to(torch.bfloat16)
    return lambda: F.linear(x, weight)


def _aten_pack(weight: Codes) -> tuple[Tensor, Tensor, int]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.t().contiguous().int(), 1)
    scales, zeros = weight.scales.float(), weight.zeros.float()
    both = torch.stack((scales, (8 - zeros) * scales), -1).bfloat16().contiguous()
    return packed, both, weight.group_size


def _aten_linear(weight: tuple[Tensor, Tensor, int], x: Tensor, threads: int) -> Call:
    packed, both, group_size = weight
    x = x.to(torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, both)


def _nibbles(rows: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the low half."""
    if rows.shape[-1] % 2:
        rows = np.concatenate((rows, np.zeros_like(rows[..., :1])), -1)
    return np.ascontiguousarray(rows[..., 0::2] | (rows[..., 1::2] << 4))


def _onnx_model(weight: Codes) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    in_features, out_features = weight.codes.shape
    groups = in_features // weight.group_size
    blocks = weight.codes.t().reshape(out_features, groups, weight.group_size).numpy()
    constants = {
        "B": _nibbles(blocks),
        "scales": weight.scales.t().float().contiguous().numpy().reshape(-1),
        "zero_points": _nibbles(weight.zeros.t().contiguous().numpy()).reshape(-1),
    }
    node = helper.make_node(
        "MatMulNBits", ["A", *constants], ["Y"], domain="com.microsoft",
        K=in_features, N=out_features, bits=4, block_size=weight.group_size, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", in_features])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", out_features])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@cache
def _onnx_threads(threads: int) -> None:
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _onnx_linear(model: bytes, x: Tensor, threads: int) -> Call:
    import onnxruntime

    _onnx_threads(threads)
    options = onnxruntime.SessionOptions()
    # All layers share a pool, as those of one model do.
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("A", x.float().numpy())
    binding.bind_output("Y", "cpu")

    def call() -> Any:
        session.run_with_iobinding(binding)
        return binding

    return call


def _openvino_model(weight: Codes) -> Any:
    import openvino
    from openvino import opset13 as ops

    in_features, out_features = weight.codes.shape
    groups = in_features // weight.group_size
    half = openvino.Type.f16

    def u4(values: np.ndarray, shape: list[int]) -> Any:
        packed = _nibbles(values)  # the tensor does not keep it alive
        tensor = openvino.Tensor(packed, openvino.Shape(shape), openvino.Type.u4)
        return ops.convert(ops.constant(tensor, shared_memory=False), half)

    codes = u4(weight.codes.t().reshape(-1, weight.group_size).numpy(), [out_features, groups, weight.group_size])
    zeros = u4(weight.zeros.t().contiguous().reshape(1, -1).numpy(), [out_features, groups, 1])
    scales = ops.constant(weight.scales.t().contiguous().numpy().reshape(out_features, groups, 1))
    dense = ops.multiply(ops.subtract(codes, zeros), scales)
    dense = ops.convert(ops.reshape(dense, [out_features, in_features], False), openvino.Type.f32)
    x = ops.parameter([-1, in_features], openvino.Type.f32)
    return openvino.Model([ops.matmul(x, dense, False, True)], [x])


def _openvino_linear(model: Any, x: Tensor, threads: int) -> Call:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.float().contiguous().numpy()))

    def call() -> Any:
        request.infer()
        return request

    return call


def _ggml_weight(weight: Codes, kind: str) -> _ggml.Weight:
    """Quantize anew: its blocks of 32 have 6-bit scales and minima (Q4_K) or no zero points (Q4_0)."""
    return _ggml.Weight(_ggml.quantize(weight.dense(torch.float32).t(), kind), kind, weight.codes.shape[0])


def output_of(result: Any) -> Tensor:
    """Return what a call computed, as a tensor."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "copy_outputs_to_cpu"):
        return torch.from_numpy(result.copy_outputs_to_cpu()[0])
    return torch.from_numpy(result.get_output_tensor().data.copy())


def _same(value: Any) -> Any:
    return value


PEERS = (
    Peer(
        "torch bf16", None, "", lambda w: w.dense(torch.float32).t().contiguous().bfloat16(), _bf16_linear, torch.clone
    ),
    Peer("aten int4pack", None, "", _aten_pack, _aten_linear, lambda w: (w[0].clone(), w[1].clone(), w[2])),
    Peer("onnxruntime int8", "onnxruntime", "pip install onnx onnxruntime", _onnx_model, _onnx_linear, _same),
    Peer("openvino u4", "openvino", "pip install openvino", _openvino_model, _openvino_linear, lambda m: m.clone()),
    *(
        Peer(
            f"ggml {kind}",
            None,
            "",
            partial(_ggml_weight, kind=kind),
            _ggml.Linear,
            _ggml.Weight.clone,
            why_not=_ggml.why_not,
        )
        for kind in ("Q4_0", "Q4_K")
    ),
)
