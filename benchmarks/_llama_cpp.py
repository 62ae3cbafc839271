"""A language model of a known shape with random weights, as a GGUF file of 4-bit blocks, run by llama.cpp."""

from __future__ import annotations

import ctypes
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _ggml

#: GGUF's name of the architecture, by configuration class.
_ARCHITECTURES = {"Qwen3Config": "qwen3", "LlamaConfig": "llama"}
#: Rows that are quantized of a large table; the rest repeats them.
_DISTINCT_ROWS = 4096


class Model:
    """One model in one context, which holds a prompt and what is decoded behind it.

    Layers share their random values, but not their memory. As `llama-quantize` has it, the embedding table that is
    also the output head is Q6_K.

    Args:
        shape: configuration class and its arguments.
        kind: ggml's type of the linears' weights.
        length: tokens that the cache holds.
        threads: for prefill and decoding alike.
    """

    def __init__(self, shape: tuple[str, Mapping[str, Any]], kind: str, length: int, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            _write(path, *shape, kind)
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if self.model is None:
            raise RuntimeError(f"llama.cpp loads no {kind} model of the shape of {shape[0]}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary: int = shape[1]["vocab_size"]
        self.mib: float = llama_cpp.llama_model_size(self.model) / 2**20

    def round(self, prompt: list[int], tokens: int) -> list[float]:
        """Return the seconds of a prefill, and of each of the tokens that are decoded behind it."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        times = [time.perf_counter()]
        ids = prompt
        for _ in range(tokens):
            memory = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it
            status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(memory, len(ids)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
            ids = [int(logits.argmax())]
            times.append(time.perf_counter())
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def _write(path: Path, config: str, sizes: Mapping[str, Any], kind: str) -> None:
    """Write a GGUF file without a tokenizer."""
    import gguf

    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    queries, keys = heads * sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[config])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    linears = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if config == "Qwen3Config":
        norms |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), sizes["head_dim"])
    add = _adder(writer)
    packed = {name: _random(*shape, kind) for name, shape in linears.items()}
    for layer in range(sizes["num_hidden_layers"]):
        for name, weight in packed.items():
            add(f"blk.{layer}.{name}.weight", weight, kind)
        for name, size in norms.items():
            add(f"blk.{layer}.{name}.weight", np.ones(size, np.float32), "F32")
    add("output_norm.weight", np.ones(hidden, np.float32), "F32")
    add("token_embd.weight", _random(sizes["vocab_size"], hidden, "Q6_K"), "Q6_K")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adder(writer: Any) -> Callable[[str, np.ndarray, str], None]:
    import gguf

    def add(name: str, values: np.ndarray, kind: str) -> None:
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])

    return add


def _random(out_features: int, in_features: int, kind: str) -> np.ndarray:
    distinct = min(out_features, _DISTINCT_ROWS)
    packed = _ggml.quantize(torch.randn(distinct, in_features) * 0.02, kind).numpy()
    return np.resize(packed, (out_features, packed.shape[1]))
