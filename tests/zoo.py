"""Tiny random models of many architectures, built from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 250


@dataclass(frozen=True)
class ZooModel:
    """One architecture: how it is built, its example inputs, and what must become of its linears.

    `quantized` is the number of linears; `kept` counts those that stay float by `FloatReason` name; `group_size` is
    what 128 becomes for this model.
    """

    build: Callable[[], nn.Module]
    quantized: int
    kept: dict[str, int]
    transforms: int
    group_size: int = 128
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": tokens()})


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (batch, length), generator=generator)


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def sound() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tokens()}


def _model(auto: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        # Norm weights away from one and biases away from zero, so that a rewrite that drops one shows; biases are
        # fp16 values, as checkpoints hold them, so that one tolerance serves all stages.
        if parameter.dim() == 1:
            offset = 0.0 if name.endswith("bias") else parameter.data
            parameter.data = (offset + 0.2 * torch.randn(parameter.shape, generator=generator)).half().float()
    return model.eval()


def decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a causal language model of a `model_type`."""

    def build() -> nn.Module:
        config = transformers.AutoConfig.for_model(name, vocab_size=VOCAB, **options)
        return _model(transformers.AutoModelForCausalLM, config)

    return build


def _encoder(name: str, auto: str = "AutoModel", **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return _model(getattr(transformers, auto), transformers.AutoConfig.for_model(name, **options))

    return build


LLAMA_LIKE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ZOO: dict[str, ZooModel] = {
    "llama": ZooModel(decoder("llama", **LLAMA_LIKE), 14, {"OUTPUT_HEAD": 1}, 8),
    "mistral": ZooModel(decoder("mistral", **LLAMA_LIKE, sliding_window=8), 14, {"OUTPUT_HEAD": 1}, 8),
    "qwen3": ZooModel(decoder("qwen3", **LLAMA_LIKE, head_dim=32, tie_word_embeddings=True), 14, {"OUTPUT_HEAD": 1}, 8),
    "qwen2": ZooModel(decoder("qwen2", **LLAMA_LIKE), 14, {"OUTPUT_HEAD": 1}, 8),
    "gemma3": ZooModel(
        decoder("gemma3_text", **LLAMA_LIKE, head_dim=32, sliding_window=8, query_pre_attn_scalar=32),
        14,
        {"OUTPUT_HEAD": 1},
        8,
    ),
    "gpt2": ZooModel(
        decoder("gpt2", n_embd=128, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
        8,
        {"OUTPUT_HEAD": 1},
        8,
    ),
    "opt": ZooModel(
        decoder(
            "opt",
            hidden_size=128,
            ffn_dim=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=128,
        ),
        12,
        {"OUTPUT_HEAD": 1},
        8,
    ),
    "phi": ZooModel(
        decoder(
            "phi",
            **{**LLAMA_LIKE, "num_key_value_heads": 4},
        ),
        12,
        {"OUTPUT_HEAD": 1},
        6,
    ),
    "phi3": ZooModel(decoder("phi3", **LLAMA_LIKE, sliding_window=None), 8, {"OUTPUT_HEAD": 1}, 8),
    "mixtral": ZooModel(
        decoder("mixtral", **LLAMA_LIKE, num_local_experts=8, num_experts_per_tok=2),
        8,
        {"OUTPUT_HEAD": 1, "ROUTER": 2, "WEIGHT_NOT_MATRIX": 4},
        4,
    ),
    "bert": ZooModel(
        _encoder(
            "bert",
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        ),
        13,
        {},
        9,
    ),
    "albert": ZooModel(
        _encoder(
            "albert",
            hidden_size=128,
            embedding_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        ),
        8,
        {},
        6,
        group_size=64,
    ),
    "vit": ZooModel(
        _encoder(
            "vit",
            auto="AutoModelForImageClassification",
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_labels=10,
        ),
        12,
        {"OUT_FEATURES": 1},
        8,
        inputs=pixels,
    ),
    "t5": ZooModel(
        _encoder(
            "t5",
            auto="AutoModelForSeq2SeqLM",
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            vocab_size=VOCAB,
            decoder_start_token_id=0,
        ),
        32,
        {"OUTPUT_HEAD": 1},
        22,
    ),
    # The cross-attention of a layer reads the encoder's output with k and v; k has no bias, q and v have.
    "whisper": ZooModel(
        _encoder(
            "whisper",
            auto="AutoModelForSpeechSeq2Seq",
            d_model=128,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            vocab_size=VOCAB,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        32,
        {"OUTPUT_HEAD": 1},
        22,
        inputs=sound,
    ),
    # 128 divides 256 and not 192: one group size for all.
    "mixed_k": ZooModel(
        decoder("llama", **{**LLAMA_LIKE, "hidden_size": 192}), 14, {"OUTPUT_HEAD": 1}, 8, group_size=64
    ),
    # Nothing divides 344: two down projections stay float.
    "odd_k": ZooModel(
        decoder("llama", **{**LLAMA_LIKE, "intermediate_size": 344}), 12, {"OUTPUT_HEAD": 1, "IN_FEATURES": 2}, 6
    ),
}
