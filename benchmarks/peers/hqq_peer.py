"""Quantize a model with HQQ and leave its weights as floats, for `python -m benchmarks.accuracy --peer`.

    pip install hqq transformers && python benchmarks/peers/hqq_peer.py MODEL OUT

In an environment of its own. HQQ's settings are its defaults at 4 bit and the group size; it uses no data.
"""

from __future__ import annotations

import torch
from _peer import Clock, arguments, leave
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM

#: Codes, and an fp16 scale and zero per group.
_SCALE_AND_ZERO_BITS = 32


def main() -> None:
    """Quantize every linear but the output head."""
    options = arguments(__doc__).parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    head = model.get_output_embeddings()
    weights = {}
    clock = Clock()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                packed, meta = Quantizer.quantize(
                    module.weight.data, nbits=4, group_size=options.group_size, axis=1, device=options.device
                )
                weights[f"{name}.weight"] = Quantizer.dequantize(packed, meta).view(module.weight.shape)
    leave(
        options,
        weights,
        name=f"HQQ, group size {options.group_size}",
        package="hqq",
        bits_per_weight=4 + _SCALE_AND_ZERO_BITS / options.group_size,
        seconds=clock.read(),
    )


if __name__ == "__main__":
    main()
