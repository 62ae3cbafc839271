"""What the scripts of this folder share: their arguments, the calibration tokens, and what they leave behind.

It runs in the peer's environment, which has PyTorch and transformers but not parofx.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the float model")
    parser.add_argument("out", help="folder for the model with quantized weights as floats")
    parser.add_argument("--tokens", help="calibration tokens that `benchmarks.accuracy --write-tokens` wrote")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to quantize on")
    return parser


def calibration_tokens(path: str) -> torch.Tensor:
    """Return the calibration tokens, int64 `(samples, seqlen)`."""
    return load_file(path)["input_ids"]


class Clock:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return seconds on the wall and of CPU time."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def leave(
    options: argparse.Namespace,
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    package: str,
    bits_per_weight: float,
    seconds: tuple[float, float],
) -> None:
    """Write the float model with these parameters replaced, its tokenizer, and `peer.json`.

    Raises:
        SystemExit: if a weight is not the model's, or nothing changed.
    """
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    unknown = sorted(set(weights) - set(parameters))
    if unknown:
        raise SystemExit(f"{package} names parameters that the model does not have: {unknown[:5]}")
    changed = 0
    with torch.no_grad():
        for key, weight in weights.items():
            changed += not torch.equal(parameters[key], weight.to(parameters[key]))
            parameters[key].copy_(weight)
    if not changed:
        raise SystemExit(f"{package} left every weight as it was")
    model.save_pretrained(options.out)
    print(f"{changed} parameters changed")
    describe(options, name=name, package=package, bits_per_weight=bits_per_weight, seconds=seconds)


def describe(
    options: argparse.Namespace, *, name: str, package: str, bits_per_weight: float, seconds: tuple[float, float]
) -> None:
    """Write the tokenizer and `peer.json` beside the weights."""
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    peer = {
        "name": name,
        "version": importlib.metadata.version(package),
        "bits_per_weight": bits_per_weight,
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
        # Which calibration text this was, for `benchmarks.accuracy` to compare.
        "tokens": hashlib.sha256(calibration_tokens(options.tokens).numpy().tobytes()).hexdigest()[:16]
        if options.tokens
        else None,
    }
    (Path(options.out) / "peer.json").write_text(json.dumps(peer))
    print(peer)
