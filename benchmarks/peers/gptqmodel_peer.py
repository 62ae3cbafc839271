"""Quantize a model with GPTQModel's GPTQ or its ParoQuant and leave its weights as floats.

    pip install gptqmodel
    python benchmarks/peers/gptqmodel_peer.py MODEL OUT --tokens tokens.safetensors --method paroquant --epochs 2

In an environment of its own. Asymmetric codes, all else at the package's defaults but for the data and the epochs.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import torch
from _peer import Clock, arguments, calibration_tokens, describe, leave
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTQConfig, ParoConfig
from gptqmodel.utils.model_dequant import dequantize_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

#: Codes, an fp16 scale and a zero of 4 bits per group.
_SCALE_AND_ZERO_BITS = 20
#: What a PARO checkpoint holds of a linear.
_STORED = (".qweight", ".qzeros", ".scales", ".theta", ".pairs", ".channel_scales")


def _stored_bits(folder: Path) -> float:
    """Return the bits per weight of a PARO checkpoint, all that it stores for its linears counted."""
    weights = stored = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                if name.endswith(_STORED):
                    tensor = tensors.get_slice(name)
                    size = math.prod(tensor.get_shape())
                    stored += size * {"I32": 32, "F16": 16, "BF16": 16, "I16": 16, "F32": 32}[tensor.get_dtype()]
                    weights += 8 * size if name.endswith(".qweight") else 0
    return stored / weights


def main() -> None:
    """Quantize every linear but the output head."""
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=("gptq", "paroquant"), required=True)
    parser.add_argument("--epochs", type=int, default=10, help="of each of ParoQuant's two stages")
    options = parser.parse_args()
    tokens = calibration_tokens(options.tokens)
    form = {"bits": 4, "group_size": options.group_size, "sym": False}
    train = len(tokens) * 7 // 8
    config = {
        "gptq": lambda: GPTQConfig(**form),
        "paroquant": lambda: ParoConfig(
            **form,
            opt_rotation_epochs=options.epochs,
            opt_finetune_epochs=options.epochs,
            opt_train_samples=train,
            opt_validation_samples=len(tokens) - train,
        ),
    }[options.method]()
    with tempfile.TemporaryDirectory() as folder:
        model = GPTQModel.load(options.model, config, device="cpu", dtype=torch.float32)
        clock = Clock()
        model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=8)
        seconds = clock.read()
        packed = Path(folder) / "packed"
        model.save(str(packed))
        if options.method == "paroquant":
            # A PARO checkpoint, which benchmarks.accuracy reads as it is.
            shutil.copytree(packed, options.out, dirs_exist_ok=True)
            describe(
                options,
                name=f"GPTQModel ParoQuant, {options.epochs} + {options.epochs} epochs",
                package="gptqmodel",
                bits_per_weight=_stored_bits(packed),
                seconds=seconds,
            )
            return
        plain = Path(folder) / "plain"
        dequantize_model(packed, plain, target_dtype=torch.float32)
        float_model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        leave(
            options,
            dict(float_model.named_parameters()),
            name=f"GPTQModel GPTQ, group size {options.group_size}",
            package="gptqmodel",
            bits_per_weight=4 + _SCALE_AND_ZERO_BITS / options.group_size,
            seconds=seconds,
        )


if __name__ == "__main__":
    main()
