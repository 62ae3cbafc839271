"""The `paroquant` quantizer and its configuration.

transformers builds the float architecture on the meta device, the quantizer replaces what the checkpoint's headers
show as quantized, and transformers fills the rest: no float weight of a quantized linear ever exists.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from parofx import integrations, kept_float
from parofx.checkpoint import files, layout, skeleton
from parofx.errors import CheckpointError, ConfigError, one_per_line
from parofx.integrations.transformers import keys
from parofx.integrations.transformers.architecture import replace_by_architecture


class ParoQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a PARO checkpoint.

    Args:
        bits: width of a weight, where `module_bits` says nothing else.
        group_size: input channels per scale and rotation group, where `group_sizes` says nothing else.
        krot: rotation rounds, where `module_krots` says nothing else.
        modules_to_not_convert: linears left float; informative, since the tensors tell.
        group_sizes: module name → group size, for the modules whose group size is another.
        module_bits: module name → bits, for the modules whose weights have another width.
        compensation_rank: highest rank of the modules' low-rank corrections, where there are such.
        module_krots: module name → krot, for the modules with more or fewer rounds.
        module_ranks: module name → rank, for the modules whose corrections have another one, 0 for none.
        other: what other writers add, kept as it is.

    Raises:
        ConfigError: if the configuration is not one of a PARO checkpoint that parofx reads.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        krot: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        group_sizes: dict[str, int] | None = None,
        module_bits: dict[str, int] | None = None,
        compensation_rank: int | None = None,
        module_krots: dict[str, int] | None = None,
        module_ranks: dict[str, int] | None = None,
        quant_method: str = layout.QUANT_METHOD,
        **other: Any,
    ) -> None:
        self.quant_method = quant_method
        self.bits = bits
        self.group_size = group_size
        self.krot = krot
        self.modules_to_not_convert = modules_to_not_convert
        self.group_sizes = group_sizes
        self.module_bits = module_bits
        self.compensation_rank = compensation_rank
        self.module_krots = module_krots
        self.module_ranks = module_ranks
        self.__dict__.update(other)
        problems = layout.why_not_readable(self.to_dict())
        if problems:
            raise ConfigError(f"invalid quantization_config:\n{one_per_line(problems)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the options that are set, as JSON-serializable values."""
        return {key: value for key, value in copy.deepcopy(self.__dict__).items() if value is not None}


class ParoHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads PARO checkpoints: any group size, fp32, bf16 or fp16 around untouched quantization tensors."""

    def __init__(self, quantization_config: ParoQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._tensor_names: frozenset[str] = frozenset()
        if not self.pre_quantized:
            raise ConfigError(
                "transformers cannot quantize to PARO while loading; load the float model, then parofx.quantize(model)"
            )

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: `ParoLinear.forward` is one operator call."""
        return True

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes the checkpoint's own layout."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes: tensors that siblings share once for each of them."""
        return layout.exported_state_dict(model), {}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return None, no cast, for quantization tensors, also where a model keeps modules in fp32."""
        if converter.target_patterns[0] in self._tensor_names:
            return None
        new_dtype: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new_dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        shards = files.open_shards(checkpoint_files or [])
        quantized, problems = keys.match(model, shards.tensors, self.quantization_config.to_dict())
        if problems:
            where = f" in {Path(checkpoint_files[0]).parent}" if checkpoint_files else ""
            raise CheckpointError(f"the checkpoint{where} cannot be loaded:\n{one_per_line(problems)}")
        skeleton.place(model, quantized)
        for linear in layout.paro_linears(model).values():
            # Some architectures initialize `child.weight` whatever it is; one marked as initialized is left alone.
            placeholder: Any = torch.empty(0)
            placeholder._is_hf_initialized = True
            linear.__dict__["weight"] = placeholder
        self._tensor_names = frozenset(f"{name}.{key}" for name, tensors in quantized.items() for key in tensors)
        _drop_ties(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        linears = layout.paro_linears(model)
        for linear in linears.values():
            linear.__dict__.pop("weight", None)
        linears = {name: linear for name, linear in linears.items() if not linear.qweight.is_meta}
        problems = layout.why_not_valid({name: linear.state_dict() for name, linear in linears.items()})
        if problems:
            raise CheckpointError(f"the checkpoint holds impossible values:\n{one_per_line(problems)}")
        layout.share_rotations(linears.values())
        layout.pack(linears.values())
        kept_float.mark(model)
        return model

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace every `ParoLinear` by the float linear of the architecture; see `parofx.dequantize`."""
        model = replace_by_architecture(model, dtype)
        self.remove_quantization_config(model)
        return model

    def remove_quantization_config(self, model: nn.Module) -> None:
        """Forget that the model was quantized."""
        super().remove_quantization_config(model)
        for module in _pretrained_models(model):
            module.config.__dict__.pop("_is_quantized", None)


def register(*, force: bool = False) -> None:
    """Make transformers load `paroquant` checkpoints with parofx; a second call changes nothing.

    If another package has registered that name, it stays and a warning says so, unless `force` is true.
    """
    present = (
        AUTO_QUANTIZER_MAPPING.get(layout.QUANT_METHOD),
        AUTO_QUANTIZATION_CONFIG_MAPPING.get(layout.QUANT_METHOD),
    )
    if present == (ParoHfQuantizer, ParoQuantizationConfig):
        return
    foreign = next((one for one in present if one not in (None, ParoHfQuantizer, ParoQuantizationConfig)), None)
    if foreign is not None and not force:
        warnings.warn(
            f"transformers loads {layout.QUANT_METHOD!r} checkpoints with {foreign.__module__}.{foreign.__qualname__}, "
            "which was registered before parofx and stays; "
            "call parofx.integrations.transformers.register(force=True) to use parofx",
            stacklevel=2,
        )
        return
    AUTO_QUANTIZER_MAPPING[layout.QUANT_METHOD] = ParoHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[layout.QUANT_METHOD] = ParoQuantizationConfig


def mark_quantized(model: nn.Module) -> None:
    """Tell transformers that `model` now holds `ParoLinear`s, as `from_pretrained` would have.

    Sets the configuration, read off the modules, and the quantizer, so that `model.save_pretrained`, `generate` and
    `model.dequantize` do the right thing.

    Raises:
        CheckpointError: if the model holds no `ParoLinear`.
    """
    quantizer: Any = ParoHfQuantizer(ParoQuantizationConfig(**layout.describe(model)))
    marked: Any = model
    marked.hf_quantizer = quantizer
    marked.is_quantized = True
    marked.quantization_method = layout.QUANT_METHOD
    marked.config.quantization_config = quantizer.quantization_config
    _drop_ties(model)
    for module in _pretrained_models(model):
        module.config._is_quantized = True


def _drop_ties(model: Any) -> None:
    """Forget ties to weights that are quantized now: an embedding table goes on without its output head."""
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = model.all_tied_weights_keys
    kept = {target: source for target, source in ties.items() if target in present and source in present}
    if ties and not kept:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = kept


def _pretrained_models(model: nn.Module) -> Iterator[Any]:
    return filter(integrations.is_transformers_model, model.modules())
