"""Quantize a model with llm-compressor's GPTQ or AWQ and leave its weights as floats.

    pip install llmcompressor
    python benchmarks/peers/llmcompressor_peer.py MODEL OUT --tokens tokens.safetensors --method gptq

In an environment of its own. Asymmetric codes, all else at the package's defaults. AWQ's scales also change norms.
"""

from __future__ import annotations

import torch
from _peer import Clock, arguments, calibration_tokens, leave
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM

#: Codes, an fp16 scale and a zero of 4 bits per group.
_SCALE_AND_ZERO_BITS = 20


def main() -> None:
    """Quantize every linear but the output head."""
    parser = arguments(__doc__)
    parser.add_argument("--method", choices=("gptq", "awq"), required=True)
    options = parser.parse_args()
    tokens = calibration_tokens(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=4, strategy="group", group_size=options.group_size, symmetric=False),
    )
    groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe = {
        "gptq": lambda: [GPTQModifier(**groups)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**groups)],
    }[options.method]()
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # AWQ pins what it caches, whatever the device
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    clock = Clock()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    seconds = clock.read()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    known = {name for name, _ in AutoModelForCausalLM.from_config(model.config).named_parameters()}
    weights = {name: weight for name, weight in weights.items() if name in known}
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            scale, zero = module.weight_scale, module.weight_zero_point
            weights[f"{name}.weight"] = fake_quantize(
                module.weight.detach(), scale, zero, module.quantization_scheme.weights
            )
    leave(
        options,
        weights,
        name=f"llm-compressor {options.method.upper()}, group size {options.group_size}",
        package="llmcompressor",
        bits_per_weight=4 + _SCALE_AND_ZERO_BITS / options.group_size,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
