"""Inductor's code for a GPU that is not there: fake CUDA tensors on a build of PyTorch without CUDA.

For a process of its own: it registers a device guard for CUDA and Triton's driver for good. `generate` returns the
Python that Inductor would run; nothing is launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

#: What Inductor asks of an H100.
_H100 = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="fake",
)


class _Driver:
    """What Triton's compiler asks of a driver."""

    binary_ext = "cubin"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def register_guard() -> None:
    """Compile and load the device guard.

    Raises:
        FileNotFoundError: without a C++ compiler.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("a C++ compiler is needed, and none of c++, g++, clang++ is there")
    root = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp()) / "libguard.so"
    source = Path(__file__).with_name("guard.cpp")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
    subprocess.run([compiler, str(source), *flags, "-o", str(library)], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Let PyTorch and Triton believe that there is an H100."""
    torch_answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _H100,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "_lazy_init": None,
        "synchronize": None,
    }
    interface_answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _H100,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "is_bf16_supported": True,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in torch_answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _answering(answer)))
        for name, answer in interface_answers.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(_answering(answer))))
        for name in ("get_device_properties", "current_device"):
            answer = interface_answers[name]
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(_answering(answer))))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        # Patterns are traced on real tensors of the device that is there; before it seems to be CUDA.
        for module in (joint_graph, post_grad):
            stack.enter_context(mock.patch.object(module, "lazy_init", lambda *args, **kwargs: None))
        triton.runtime.driver.set_active(_Driver())
        yield


def generate(gm: GraphModule, inputs: Sequence[Tensor]) -> str:
    """Return the Python that Inductor generates for a graph on fake CUDA inputs."""
    found: list[str] = []

    def stop(self: GraphLowering) -> Any:
        wrapper, _ = self.codegen()
        found.append(wrapper.value)
        return types.SimpleNamespace(call=None, __file__="")

    settings = {"fx_graph_cache": False, "compile_threads": 1}
    with fake_gpu(), config.patch(settings), mock.patch.object(GraphLowering, "compile_to_module", stop):
        with contextlib.suppress(Exception):
            # It fails once it would run what it generated.
            compile_fx.compile_fx(gm, list(inputs))
    (source,) = found
    return source


def _answering(answer: Any) -> Any:
    return lambda *args, **kwargs: answer
