"""Loading a model to quantize or run: a folder, a hub id, a GGUF file, or a PARO checkpoint."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from parofx.checkpoint import files, layout
from parofx.errors import CheckpointError
from parofx.folders import expand_user

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model in eval mode and its tokenizer; `None` where it has none."""

    model: nn.Module
    tokenizer: Any | None


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: a `transformers` folder, a hub id, a `.gguf` file (its weights are dequantized, and the model can be
            saved as any other), or a PARO checkpoint.
        revision: branch, tag or commit of a hub id.
        dtype: of the floating parameters; `None` keeps the source's, and is bf16 for GGUF.
        local_files_only: use what the hub cache holds, ask no network.
        trust_remote_code: run the Python code that a model's repository brings. Off unless you have read that code.

    Raises:
        CheckpointError: if nothing is found, or the model needs something that is off or missing.
    """
    path = expand_user(source)
    if path.suffix.lower() == ".gguf":
        return _load_gguf(path, dtype or torch.bfloat16)
    local = path.is_dir()
    if not local and (path.is_absolute() or path.exists() or str(source).startswith((".", "~"))):
        raise CheckpointError(f"no model there: {path} is no folder with a config.json and no .gguf file")
    if local and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json: expected a model saved by transformers or by parofx")
    if local and is_paro_checkpoint(path):
        import parofx

        return LoadedModel(parofx.load_pretrained(path, dtype=dtype).eval(), _load_tokenizer(path))
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    try:
        model = _auto_class(source, options).from_pretrained(
            str(path if local else source), dtype=dtype or "auto", use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if local and isinstance(error, SafetensorError):
            files.open_shards(sorted(path.glob("*.safetensors")))  # names the files that are broken
        raise CheckpointError(
            f"could not load {str(source)!r}: {error}\n"
            "Expected a folder, a .gguf file, or a hub id with safetensors weights. Without a network, download the "
            "model elsewhere and pass the folder"
        ) from error
    return LoadedModel(model.eval(), _load_tokenizer(path if local else source, **options))


def load_skeleton(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Build a model without its weights, on the meta device, and load its tokenizer; the arguments are `load_model`'s.

    Only configuration and tokenizer are read, or downloaded.

    Raises:
        CheckpointError: if nothing is found, or it is a PARO checkpoint, which there is nothing left to do for.
    """
    path = expand_user(source)
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    if path.is_dir() and is_paro_checkpoint(path):
        raise CheckpointError(f"{path} is a PARO checkpoint: expected a float model to plan for")
    gguf = path.suffix.lower() == ".gguf"
    if gguf:
        options = {"gguf_file": path.name}
    where = str(path.parent if gguf else path if path.is_dir() else source)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(where, **options)
        # As loading the weights would choose it.
        dtype = dtype or (torch.bfloat16 if gguf else getattr(config, "dtype", None)) or torch.float32
        auto = AutoModelForCausalLM if gguf else _auto_class(where, options)
        with torch.device("meta"):
            if hasattr(auto, "from_config"):
                model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            else:
                model = auto._from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, struct.error) as error:
        raise CheckpointError(
            f"could not read the configuration of {str(source)!r}: {error}\n"
            "Expected a folder, a .gguf file, or a hub id"
        ) from error
    return LoadedModel(model.eval(), _load_tokenizer(where, **options))


def is_paro_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder's `config.json` says `quant_method: paroquant`."""
    config = Path(folder) / files.CONFIG_FILE
    quantization = files.read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == layout.QUANT_METHOD


def example_inputs(model: nn.Module, *, seqlen: int = 16) -> dict[str, Tensor]:
    """Return inputs of the right names and shapes for a `transformers` model, as its configuration describes them.

    They are a batch of two: a capture takes a size of one for a constant.

    Raises:
        CheckpointError: if the model's main input is neither tokens nor pixels.
    """
    name = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    if name == "input_ids":
        inputs = {name: torch.arange(2 * seqlen, device=device).view(2, -1) % config.get_text_config().vocab_size}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs[name].clone()
        return inputs
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        dtype = next(model.parameters()).dtype
        return {name: torch.zeros(2, config.num_channels, height, width, device=device, dtype=dtype)}
    raise CheckpointError(
        f"{type(model).__name__} takes {name!r}: example inputs are known for 'input_ids' and 'pixel_values'; "
        "call parofx.explain(model, *inputs) from Python"
    )


def _load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    if not path.is_file():
        raise CheckpointError(f"no such GGUF file: {path}")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (OSError, ValueError, KeyError, IndexError, ImportError, struct.error) as error:
        raise CheckpointError(
            f"could not load {path}: {type(error).__name__}: {error}. Is the file whole? Reading GGUF needs a model "
            "family that transformers converts, and gguf and accelerate: pip install 'parofx[transformers]'"
        ) from error
    return LoadedModel(model.eval(), tokenizer)


def _auto_class(source: str | Path, options: dict[str, Any]) -> Any:
    """Return the class that the model's configuration names; for code of its own, the causal language model."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(source), **options)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _load_tokenizer(source: str | Path, **options: Any) -> Any | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        broken = any(Path(source).glob("tokenizer*"))
        logger.log(logging.WARNING if broken else logging.INFO, "no tokenizer at %s: %s", source, error)
        return None
