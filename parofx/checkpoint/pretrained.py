"""`save_pretrained` and `load_pretrained`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from parofx import integrations, kept_float
from parofx.checkpoint import files, layout, skeleton
from parofx.checks import check_device, check_float_dtype
from parofx.errors import CheckpointError, ConfigError, one_per_line
from parofx.unwrapping import plain_module


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a model that holds `ParoLinear`s as a PARO checkpoint.

    A transformers model is written with its configuration, generation configuration and all that `AutoModel…` needs;
    any other module with a `config.json` that holds the quantization alone. The folder appears under its name only
    once it is whole: on an error nothing is left behind.

    Args:
        model: a transformers model or any module; of a compiled one the module behind it is written.
        directory: where to; must not exist or be empty.
        tokenizer: saved beside the model, chat template included, by its own `save_pretrained`.
        max_shard_size: bytes per file, a number or such as `"5GB"`.
        overwrite: replace what `directory` holds.

    Raises:
        CheckpointError: if the model holds no `ParoLinear`, or `directory` is not free.
        ConfigError: if `max_shard_size` is no size, or `tokenizer` cannot be saved.
    """
    _check_shard_size(max_shard_size)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise ConfigError(f"tokenizer must have save_pretrained, as those of transformers do, got {tokenizer!r}")
    model = plain_module(model)
    config = layout.describe(model)
    with files.new_folder(Path(directory), overwrite=overwrite) as folder:
        try:
            if integrations.is_transformers_model(model):
                from parofx.integrations import transformers

                transformers.save(model, folder, max_shard_size)
            else:
                _save_module(model, folder, config, max_shard_size)
        except SafetensorError as error:
            raise CheckpointError(f"the weights could not be written to {directory}: {error}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def load_pretrained(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a PARO checkpoint; the float weights of its quantized linears never exist.

    Names, shapes and dtypes are checked both ways from the files' headers, before a weight is read. Rotation tensors
    that hold equal bytes become one tensor, so that siblings share again.

    Args:
        directory: a folder, or the id of a hub repository.
        model: a skeleton to fill, on any device (`meta` costs no memory), changed only once everything is read.
            Without it the folder must hold a transformers model.
        dtype: of all tensors but those of quantization, or its name; the stored one by default, or `"auto"`.
        device: where the model will be.
        revision: branch, tag or commit of the hub repository.
        local_files_only: read the hub's local cache, never the network.

    Returns:
        The model in eval mode, or `model` itself, filled.

    Raises:
        CheckpointError: listing everything that is missing, unexpected, misshapen or contradictory.
        ConfigError: if `model`, `dtype` or `device` is none.
    """
    dtype, device = check_float_dtype(dtype), check_device(device)
    if model is not None and not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module to fill, got {type(model).__name__}")
    folder = files.find_folder(directory, revision=revision, local_files_only=local_files_only)
    config = files.read_json(folder / files.CONFIG_FILE)
    quantization: Any = config.get("quantization_config")
    _raise_if(layout.why_not_readable(quantization), folder)
    if model is not None:
        return _fill_module(model, folder, quantization, dtype, device)
    if not config.get("architectures"):
        raise CheckpointError(
            f"{folder / files.CONFIG_FILE} names no transformers architecture; pass the module to fill as model="
        )
    from parofx.integrations import transformers

    return transformers.load(folder, config["architectures"][0], dtype, device)


def _check_shard_size(size: int | str) -> None:
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([KMGT])B\s*", size, re.IGNORECASE | re.ASCII)
        valid = found is not None and float(found[1]) * 1000 ** (1 + "KMGT".index(found[2].upper())) >= 1
    else:
        valid = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not valid:
        raise ConfigError(
            f'max_shard_size must be a number of bytes, or one with KB, MB, GB or TB such as "5GB", got {size!r}'
        )


def _save_module(model: nn.Module, folder: Path, config: dict[str, Any], max_shard_size: int | str) -> None:
    state: dict[str, Tensor] = model.state_dict()
    linears = layout.paro_linears(model)
    for first, *others in skeleton.ties_by_identity(model.state_dict(keep_vars=True)):
        # Tied float tensors are written once; a quantization tensor is written for each of its modules.
        if first.rpartition(".")[0] not in linears:
            for other in others:
                del state[other]
    on_meta = [key for key, tensor in state.items() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"tensors on the meta device hold nothing to save:\n{one_per_line(on_meta)}")
    save_torch_state_dict(layout.separated(state, state), folder, max_shard_size=max_shard_size)
    (folder / files.CONFIG_FILE).write_text(json.dumps({"quantization_config": config}, indent=2) + "\n")


def _fill_module(
    model: nn.Module, folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> nn.Module:
    shards = files.open_folder(folder)
    quantized = layout.find_quantized(shards.tensors)
    problems = layout.why_not_quantized(quantized, config) or skeleton.why_not_placed(model, quantized)
    expected = skeleton.expected_tensors(model, quantized)
    ties = skeleton.ties_by_identity(expected)
    problems += skeleton.why_keys_differ(expected, shards.tensors, ties)
    problems += [
        f"{key}: a buffer that no checkpoint holds, on the meta device; build the skeleton's buffers on a real one"
        for key, buffer in model.named_buffers()
        if buffer.is_meta and key not in expected and key.rpartition(".")[0] not in quantized
    ]
    _raise_if(problems, folder)

    state = dict(shards.read(device))
    _raise_if(layout.why_not_valid(layout.find_quantized(state)), folder)
    quantized_keys = {f"{name}.{key}" for name, tensors in quantized.items() for key in tensors}
    for key in state.keys() - quantized_keys:
        if dtype is not None and state[key].is_floating_point():
            state[key] = state[key].to(dtype)
    for tied in ties:
        first = next(key for key in tied if key in state)
        tensor = state[first]
        if isinstance(expected[first], nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=expected[first].requires_grad)
        state |= dict.fromkeys(tied, tensor)

    skeleton.place(model, quantized)
    model.load_state_dict(state, assign=True)
    model.to(device)
    linears = layout.paro_linears(model).values()
    layout.share_rotations(linears)
    layout.pack(linears)
    kept_float.mark(model)
    return model


def _raise_if(problems: list[str], folder: Path) -> None:
    if problems:
        raise CheckpointError(f"the checkpoint in {folder} cannot be loaded:\n{one_per_line(problems)}")
