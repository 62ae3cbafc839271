"""`parofx doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from parofx.cli.common import console

#: Packages whose versions decide what works.
PACKAGES = (
    "parofx",
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "gguf",
    "datasets",
)


def doctor() -> None:
    """Tell what this machine offers: versions, devices, and the kernels that would run. Paste it into a bug report.

    \b
    parofx doctor
    """  # noqa: D301
    import torch

    table = Table(box=None, show_header=False)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("CPU capability", torch.backends.cpu.get_cpu_capability())
    table.add_row("CUDA", torch.version.cuda or "this PyTorch is built without it")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, compute capability {properties.major}.{properties.minor}")
    table.add_row("providers, as asked", ", ".join(provider.name for provider in _providers()))
    for name, value in _flatten("CPU kernels", _cpu_kernels()):
        table.add_row(name, value)
    console.print(table, highlight=False)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _providers() -> Sequence[Any]:
    from parofx import providers

    return providers.providers()


def _cpu_kernels() -> Mapping[str, Any]:
    from parofx import cpu_ops

    return cpu_ops.describe()


def _flatten(name: str, value: object) -> list[tuple[str, str]]:
    """Return nested mappings as rows, their keys joined."""
    if isinstance(value, Mapping):
        return [row for key, part in value.items() for row in _flatten(f"{name}: {key}", part)]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(str(item) for item in value) or "none")]
    return [(name, str(value))]
