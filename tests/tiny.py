"""A tiny language model with a tokenizer, saved as any other: what loading, evaluation and the CLI are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

WORDS = ("the", "sea", "is", "wide", "and", "ships", "sail", "on", "it", ".", "user", "assistant", "why", "?")
SPECIAL = ("<s>", "</s>", "<unk>")
VOCAB = len(SPECIAL) + len(WORDS)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
TEXT = "the sea is wide and ships sail on it . "


def tokenizer(*, starts: bool = False, chat: bool = True) -> Any:
    """Return a word tokenizer; `starts` says whether it begins a text with its start token."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    if starts:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    result = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        result.chat_template = CHAT_TEMPLATE
    return result


def model(seed: int = 0, **options: Any) -> Any:
    """Return a two-layer Llama of 14 linears with random weights, in eval mode."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": VOCAB, "num_key_value_heads": 1, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**(sizes | options))
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    return transformers.LlamaForCausalLM(config).eval()


def save(folder: Path, **options: Any) -> Path:
    """Write the model and its tokenizer."""
    model(**options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
