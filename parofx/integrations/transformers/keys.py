"""Which checkpoint key fills which tensor of a transformers model, by transformers' own renaming."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from parofx.checkpoint import layout, skeleton

_strict: ContextVar[bool] = ContextVar("parofx_strict_loading", default=False)


@contextmanager
def strict_loading() -> Iterator[None]:
    """Compare every key while a model loads, not only those of quantized modules."""
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def match(model: nn.Module, found: Mapping[str, Tensor], config: dict[str, Any]) -> tuple[layout.Quantized, list[str]]:
    """Return the quantized modules by the model's names, and what keeps them from being loaded."""
    rename = _Renaming(model)
    state = model.state_dict()
    stored = layout.find_quantized(found)
    quantized = {rename.module(name, state): tensors for name, tensors in stored.items()}
    if len(quantized) < len(stored):
        return quantized, ["transformers merges linears of this architecture that the checkpoint has apart"]
    listed = {
        key: {rename.module(name, state): value for name, value in (config.get(key) or {}).items()}
        for key in layout.PER_MODULE
    }
    problems = layout.why_not_quantized(quantized, config | listed)
    modules = dict(model.named_modules(remove_duplicate=False))
    if not _strict.get() and any(name in modules for name in quantized):
        # A checkpoint may hold heads that this class has not: transformers lists their keys as unexpected.
        quantized = {name: tensors for name, tensors in quantized.items() if name in modules}
    problems = problems or skeleton.why_not_placed(model, quantized)
    expected = skeleton.expected_tensors(model, quantized)
    renamed = {rename(key, expected): tensor for key, tensor in found.items()}
    keys = {f"{name}.{key}" for name, tensors in quantized.items() for key in tensors}
    problems += [f"{key}: transformers renames it while loading" for key in sorted(keys - set(renamed))]
    if _strict.get() and not rename.converted:
        problems += _why_keys_differ(model, expected, renamed)
    return quantized, problems


def _why_keys_differ(model: Any, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Compare keys under the model's own rules: ties, and keys it declares optional."""
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["(?!)"]))
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    return skeleton.why_keys_differ(
        {key: tensor for key, tensor in expected.items() if key in found or not optional.search(key)},
        {key: tensor for key, tensor in found.items() if key in expected or not ignored.search(key)},
        ties(model),
    )


class _Renaming:
    """transformers' map from checkpoint keys to the model's; `converted` once a key met one that merges or splits."""

    def __init__(self, model: Any) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.converted = False

    def __call__(self, key: str, state: Mapping[str, Tensor]) -> str:
        renamed, converter = rename_source_key(key, self._renamings, self._converters, self._prefix, state)
        self.converted |= converter is not None
        name: str = renamed
        return name

    def module(self, name: str, state: Mapping[str, Tensor]) -> str:
        """Return the model's name of a module, by the name its float weight would get."""
        return self(f"{name}.weight", state).removesuffix(".weight")


def ties(model: Any) -> list[set[str]]:
    """Return the groups of parameters that the model ties to one another."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return list(groups.values())
