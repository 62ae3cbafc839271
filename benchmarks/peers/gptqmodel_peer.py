"""Quantize a model with GPTQModel's GPTQ or ParoQuant and leave its weights as floats.

    pip install gptqmodel
    python benchmarks/peers/gptqmodel_peer.py MODEL OUT --tokens tokens.safetensors --method gptq

In an environment of its own. All is at the package's defaults but for the data, and for GPTQ's codes, which are
asymmetric; its ParoQuant knows symmetric ones only. On a CPU its ParoQuant takes hours, nearly all of them in a loop
over groups; here the same rotations are multiplied as matrices: but for rounding the same, in a seventh of the time.
`--epochs 2` trains its rotations and its weights for fewer than its ten and ten.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Its default on two cores is fewer than its own loader asks for.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import gptqmodel.quantization.paroquant.optimization as paro_optimization
import torch
from _peer import Clock, arguments, calibration_tokens, describe, leave
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTQConfig, ParoConfig
from gptqmodel.utils.model_dequant import dequantize_model
from transformers import AutoModelForCausalLM

#: Codes, an fp16 scale and a zero of 4 bits per group.
_SCALE_AND_ZERO_BITS = 20
#: Of each input channel of a linear: 8 rounds of a 16-bit partner and half a 16-bit angle, and a 16-bit scale.
_ROTATION_BITS = 8 * 16 + 8 * 8 + 16
#: The package's default, of rotations and of weights.
_EPOCHS = 10


def main() -> None:
    """Quantize every linear but the output head."""
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=("gptq", "paroquant"), default="gptq")
    parser.add_argument("--epochs", type=int, help=f"of ParoQuant's two stages each; its default is {_EPOCHS}")
    options = parser.parse_args()
    if options.method == "gptq" and options.epochs is not None:
        parser.error("--epochs is for --method paroquant")
    epochs = options.epochs or _EPOCHS
    tokens = calibration_tokens(options.tokens)
    if options.method == "gptq":
        config = GPTQConfig(bits=4, group_size=options.group_size, sym=False)
    else:
        # What its replay caches are inference tensors otherwise, which its own training then refuses.
        torch.inference_mode = lambda *_, **__: torch.no_grad()
        if options.device == "cpu":
            paro_optimization._apply_rotation = _rotate_by_matrices
        config = ParoConfig(
            bits=4,
            group_size=options.group_size,
            opt_rotation_epochs=epochs,
            opt_finetune_epochs=epochs,
        )
    model = GPTQModel.load(options.model, config, device=options.device, dtype=torch.float32)
    clock = Clock()
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=8)
    seconds = clock.read()
    bits = 4 + _SCALE_AND_ZERO_BITS / options.group_size
    if options.method == "paroquant":
        # Its checkpoints are ones that parofx reads.
        model.save(options.out)
        matrices = [one for name, one in _float_matrices(options.model) if name.startswith("model.layers.")]
        bits += sum(one.shape[1] * _ROTATION_BITS for one in matrices) / sum(one.numel() for one in matrices)
        name = f"GPTQModel ParoQuant, group size {options.group_size}"
        if epochs != _EPOCHS:
            name += f", {epochs} and {epochs} epochs"
        describe(options, name=name, package="gptqmodel", bits_per_weight=bits, seconds=seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        packed, plain = Path(folder) / "packed", Path(folder) / "plain"
        model.save(str(packed))
        dequantize_model(packed, plain, target_dtype=torch.float32)
        quantized = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        leave(
            options,
            dict(quantized.named_parameters()),
            name=f"GPTQModel GPTQ, group size {options.group_size}",
            package="gptqmodel",
            bits_per_weight=bits,
            seconds=seconds,
        )


_rotate_by_rounds = paro_optimization._apply_rotation


def _rotate_by_matrices(
    x: torch.Tensor,
    pairs: torch.Tensor,
    theta: torch.Tensor,
    *,
    scales: torch.Tensor | None,
    group_size: int,
    **_: object,
) -> torch.Tensor:
    """Rotate the package's way, but all groups' identities, and multiply `x` `(M, K)` by what becomes of them."""
    groups = x.shape[-1] // group_size
    identity = torch.eye(group_size, dtype=x.dtype, device=x.device).repeat(1, groups)
    rotation = _rotate_by_rounds(identity, pairs, theta, scales=None, group_size=group_size, fused_rotation=False)
    scaled = x if scales is None else x * scales.view(1, -1)
    by_group = scaled.reshape(-1, groups, group_size).transpose(0, 1)
    return (
        torch.bmm(by_group, rotation.view(group_size, groups, group_size).transpose(0, 1))
        .transpose(0, 1)
        .reshape(x.shape)
    )


def _float_matrices(model: str) -> list[tuple[str, torch.Tensor]]:
    named = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters()
    return [(name, one) for name, one in named if one.dim() == 2]


if __name__ == "__main__":
    main()
