"""Quantize a model with GPTQModel's GPTQ and leave its weights as floats.

    pip install gptqmodel
    python benchmarks/peers/gptqmodel_peer.py MODEL OUT --tokens tokens.safetensors

In an environment of its own. Asymmetric codes, all else at the package's defaults but for the data.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Its default on two cores is fewer than its own loader asks for.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from _peer import Clock, arguments, calibration_tokens, leave
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from gptqmodel.utils.model_dequant import dequantize_model
from transformers import AutoModelForCausalLM

#: Codes, an fp16 scale and a zero of 4 bits per group.
_SCALE_AND_ZERO_BITS = 20


def main() -> None:
    """Quantize every linear but the output head."""
    options = arguments(__doc__).parse_args()
    tokens = calibration_tokens(options.tokens)
    config = GPTQConfig(bits=4, group_size=options.group_size, sym=False)
    with tempfile.TemporaryDirectory() as folder:
        model = GPTQModel.load(options.model, config, device="cpu", dtype=torch.float32)
        clock = Clock()
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=8)
        seconds = clock.read()
        packed, plain = Path(folder) / "packed", Path(folder) / "plain"
        model.save(str(packed))
        dequantize_model(packed, plain, target_dtype=torch.float32)
        quantized = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        leave(
            options,
            dict(quantized.named_parameters()),
            name=f"GPTQModel GPTQ, group size {options.group_size}",
            package="gptqmodel",
            bits_per_weight=4 + _SCALE_AND_ZERO_BITS / options.group_size,
            seconds=seconds,
        )


if __name__ == "__main__":
    main()
