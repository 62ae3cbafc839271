"""Whole transformers models, saved, loaded strictly, and dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from parofx.checkpoint import files, layout
from parofx.errors import CheckpointError, one_per_line
from parofx.integrations.transformers import keys
from parofx.integrations.transformers.architecture import replace_by_architecture
from parofx.integrations.transformers.quantizer import ParoHfQuantizer, mark_quantized, register


def save(model: Any, folder: Path, max_shard_size: int | str) -> None:
    """Write a transformers model that holds `ParoLinear`s."""
    mark_quantized(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def load(folder: Path, architecture: str, dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
    """Load a transformers model as `from_pretrained` does, but refuse any key that is missing, unexpected or misshapen.

    Raises:
        CheckpointError: listing the problems.
    """
    register()
    if AUTO_QUANTIZER_MAPPING[layout.QUANT_METHOD] is not ParoHfQuantizer:
        raise CheckpointError(
            f"another package loads {layout.QUANT_METHOD!r} checkpoints; "
            "call parofx.integrations.transformers.register(force=True) first"
        )
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no architecture {architecture!r}; pass the module to fill"
        )
    files.open_folder(folder)
    with keys.strict_loading():
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map=None if torch.device(device).type == "cpu" else {"": device},
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # Keys that transformers merges or splits while loading are only known to have arrived now.
    problems = [f"{kind}: {item}" for kind, items in info.items() for item in sorted(map(str, items))]
    if problems:
        raise CheckpointError(f"the checkpoint in {folder} does not fit {architecture}:\n{one_per_line(problems)}")
    loaded: nn.Module = model
    return loaded


def dequantize(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Replace every `ParoLinear` by the float linear of the architecture and forget the quantization."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, ParoHfQuantizer):
        return quantizer.dequantize(model, dtype)
    return replace_by_architecture(model, dtype)
