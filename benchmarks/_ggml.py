"""ggml's matrix product with quantized weights, called in the libraries that `llama-cpp-python` brings.

ggml chooses its kernels when it is compiled: only a build for the machine at hand (`GGML_NATIVE`, which pip's build of
the source has) is a fair peer. `describe` tells what it was compiled for. As llama.cpp does, a weight is laid out by
the first of ggml's own layouts that multiplies it, such as tiles for AMX or rows interleaved for AVX2.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
import weakref
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _tiles

#: `enum ggml_type`. `ggml_quantize_chunk` writes all of them but F32.
TYPES = {"F32": 0, "Q4_0": 2, "Q4_K": 12, "Q6_K": 14}


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Feature(ctypes.Structure):
    """`struct ggml_backend_feature`."""

    _fields_ = (("name", c_char_p), ("value", c_char_p))


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
#: ggml tells of every weight that it lays out anew.
_SILENCE = _LogCallback(lambda level, text, data: None)

#: What the functions return and take, as in ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h.
_FUNCTIONS = {
    "ggml_version": (c_char_p,),
    "ggml_log_set": (None, _LogCallback, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}


@functools.cache
def _ggml() -> ctypes.CDLL:
    """Load ggml, which torch's OpenMP runtime then serves: both name theirs `libgomp.so.1`, and torch came first."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "ggml comes with llama-cpp-python, which is not installed: pip install llama-cpp-python"
        )
    name = {"darwin": "libggml.dylib", "win32": "ggml.dll"}.get(sys.platform, "libggml.so")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name))
    for function, (result, *arguments) in _FUNCTIONS.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    library.ggml_log_set(_SILENCE, None)
    return library


@functools.cache
def _backend() -> int:
    return _ggml().ggml_backend_cpu_init()  # type: ignore[no-any-return]


def _procedure(name: bytes, result: Any, *arguments: Any) -> Any:
    registry = _ggml().ggml_backend_dev_backend_reg(_ggml().ggml_backend_get_device(_backend()))
    address = _ggml().ggml_backend_reg_get_proc_address(registry, name)
    return ctypes.CFUNCTYPE(result, *arguments)(address)


@functools.cache
def why_not() -> str | None:
    """Return what to do for a ggml that works, or None.

    Compiled by GCC 12.2, its AMX kernels end the process: to that compiler `_tile_loadconfig` reads 8 of the 64 bytes,
    and what fills the others is removed as dead.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return "pip install llama-cpp-python"
    command = [sys.executable, "-c", "from benchmarks import _ggml; _ggml.try_out()"]
    if subprocess.run(command, cwd=Path(__file__).parents[1], check=False).returncode == 0:
        return None
    return (
        "it ends the process; compile it anew: CXXFLAGS='-fno-dse -fno-tree-dse' "
        "pip install --force-reinstall --no-cache-dir llama-cpp-python"
    )


def try_out() -> None:
    """Multiply two rows, which AMX does where there is AMX."""
    Linear(Weight(quantize(torch.ones(32, 256), "Q4_0"), "Q4_0", 256), torch.ones(2, 256), 1)()


def describe() -> str:
    """Return ggml's version and the instruction sets it was compiled for."""
    features = _procedure(b"ggml_backend_get_features", POINTER(_Feature), c_void_p)(None)
    names = []
    for feature in features:
        if feature.name is None:
            break
        names.append(feature.name.decode())
    return f"ggml {_ggml().ggml_version().decode()}, compiled for {', '.join(names)}"


def quantize(weight: Tensor, kind: str) -> Tensor:
    """Quantize float `(N, K)` with ggml's own quantizer to uint8 `(N, bytes of a row)`."""
    out_features, in_features = weight.shape
    weight = weight.float().contiguous()
    packed = torch.empty(out_features, _ggml().ggml_row_size(TYPES[kind], in_features), dtype=torch.uint8)
    _ggml().ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), packed.data_ptr(), 0, out_features, in_features, None)
    return packed


class _Context:
    """Tensors without memory, and the buffers that they were given; freed with this object."""

    def __init__(self) -> None:
        ggml = _ggml()
        size = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        self.handle: int = ggml.ggml_init(_InitParams(size, None, True))
        self._buffers: list[int] = []
        weakref.finalize(self, _free, self.handle, self._buffers)

    def tensor(self, kind: str, columns: int, rows: int) -> int:
        return _ggml().ggml_new_tensor_2d(self.handle, TYPES[kind], columns, rows)  # type: ignore[no-any-return]

    def allocate(self, layout: int) -> None:
        """Give all tensors memory of one layout (a buffer type)."""
        self._buffers.append(_ggml().ggml_backend_alloc_ctx_tensors_from_buft(self.handle, layout))

    def borrow(self, tensor: int, memory: Tensor) -> None:
        """Give one tensor a torch tensor's memory."""
        buffer = _ggml().ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
        self._buffers.append(buffer)
        _ggml().ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())


def _free(context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        _ggml().ggml_backend_buffer_free(buffer)
    _ggml().ggml_free(context)


class Weight:
    """A quantized weight in the layout that ggml multiplies fastest."""

    def __init__(self, packed: Tensor, kind: str, in_features: int) -> None:
        self.packed, self.kind, self.in_features = packed, kind, in_features
        ggml = _ggml()
        device = ggml.ggml_backend_get_device(_backend())
        for layout in (*_extra_layouts(device), ggml.ggml_backend_cpu_buffer_type()):
            self.context = _Context()
            self.tensor = self.context.tensor(kind, in_features, packed.shape[0])
            self.context.allocate(layout)
            probe = _Context()
            product = ggml.ggml_mul_mat(probe.handle, self.tensor, probe.tensor("F32", in_features, 1))
            if ggml.ggml_backend_dev_supports_op(device, product):
                break
        self.layout: str = ggml.ggml_backend_buft_name(layout).decode()
        ggml.ggml_backend_tensor_set(self.tensor, packed.data_ptr(), 0, packed.nbytes)

    def clone(self) -> Weight:
        """Return an equal weight in memory of its own."""
        return Weight(self.packed, self.kind, self.in_features)


def _extra_layouts(device: int) -> list[int]:
    layouts = _procedure(b"ggml_backend_dev_get_extra_bufts", POINTER(c_void_p), c_void_p)(device)
    found: list[int] = []
    while (layout := layouts[len(found)]) is not None:
        found.append(layout)
    return found


class Linear:
    """`y = x @ weight.T` for float32 `x (M, K)` that lies where it lies."""

    def __init__(self, weight: Weight, x: Tensor, threads: int) -> None:
        self.weight, self.threads = weight, threads
        self.x = x.float().contiguous()
        self.y = torch.empty(x.shape[0], weight.packed.shape[0])
        self.tiles = weight.layout == "AMX" and x.shape[0] > 1
        self.context = _Context()
        source = self.context.tensor("F32", weight.in_features, x.shape[0])
        self.context.borrow(source, self.x)
        product = _ggml().ggml_mul_mat(self.context.handle, weight.tensor, source)
        self.context.borrow(product, self.y)
        self.graph: int = _ggml().ggml_new_graph(self.context.handle)
        _ggml().ggml_build_forward_expand(self.graph, product)

    def __call__(self) -> Tensor:
        """Compute and return `(M, N)`, the same tensor at every call."""
        if self.tiles:
            _tiles.restore(self.threads)
        _ggml().ggml_backend_cpu_set_n_threads(_backend(), self.threads)
        status = _ggml().ggml_backend_graph_compute(_backend(), self.graph)
        assert status == 0, f"ggml_backend_graph_compute returned {status}"
        return self.y
