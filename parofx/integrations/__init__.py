"""Bridges to other libraries. Importing this imports none of them.

`register()` lets transformers know PARO checkpoints as soon as transformers' quantizers are imported: at once if they
already are, else by a finder that lets that one module load as always and registers right after.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Register parofx with transformers, now or when it is imported; further calls change nothing."""
    if _QUANTIZERS in sys.modules:
        importlib.import_module(_QUANTIZERS)  # waits, should another thread be importing it
        _register_with_transformers()
    elif not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())


def is_transformers_model(model: nn.Module) -> bool:
    """Tell whether `model` is a `PreTrainedModel`, without importing transformers."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _register_with_transformers() -> None:
    try:
        # Its import registers, also where that import is what brought transformers' quantizers in.
        importlib.import_module("parofx.integrations.transformers")
    except ImportError as error:
        warnings.warn(
            f"parofx could not register with transformers, PARO checkpoints will not load there: {error}", stacklevel=2
        )


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Find `transformers.quantizers.auto` where the other finders do, and register after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        for finder in sys.meta_path:
            if not isinstance(finder, _PostImportFinder) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _PostImportLoader(spec.loader)
                    return spec
        return None


class _PostImportLoader(importlib.abc.Loader):
    """Load as `loader` does, then register; a failed import stays the failure it was."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PostImportFinder)]
        # Introspection (`inspect.getsource`, pickling by spec) should see the loader it would see without us.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        _register_with_transformers()
