"""Quantize a model with AutoRound and leave its weights as floats.

    pip install auto-round
    python benchmarks/peers/autoround_peer.py MODEL OUT --tokens tokens.safetensors

In an environment of its own. Asymmetric codes, all else at the package's defaults (200 iterations) but for the data.
"""

from __future__ import annotations

import torch
from _peer import Clock, arguments, calibration_tokens, leave
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Codes, an fp16 scale and a zero of 4 bits per group.
_SCALE_AND_ZERO_BITS = 20


def main() -> None:
    """Quantize every linear but the output head."""
    parser = arguments(__doc__)
    parser.add_argument("--iters", type=int, help="of each block; the package's own number without it")
    options = parser.parse_args()
    tokens = calibration_tokens(options.tokens)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=8
    )
    clock = Clock()
    tuning = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        bits=4,
        group_size=options.group_size,
        sym=False,
        dataset=loader,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        iters=options.iters,
        device_map=options.device,
    )
    quantized, _ = tuning.quantize()
    seconds = clock.read()
    head = quantized.get_output_embeddings()
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in quantized.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    iterations = "" if options.iters is None else f", {options.iters} iterations"
    leave(
        options,
        weights,
        name=f"AutoRound, group size {options.group_size}{iterations}",
        package="auto-round",
        bits_per_weight=4 + _SCALE_AND_ZERO_BITS / options.group_size,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
