"""Quantize a model with HQQ and leave its weights as floats, for `python -m benchmarks.accuracy --peer`.

    pip install hqq transformers && python benchmarks/peers/hqq_peer.py MODEL OUT

In an environment of its own. HQQ's settings are its defaults at 4 bit and the group size; it uses no data.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Codes, and an fp16 scale and zero per group.
_SCALE_AND_ZERO_BITS = 32


def main() -> None:
    """Quantize every linear but the output head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    head = model.get_output_embeddings()
    start = time.perf_counter()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                packed, meta = Quantizer.quantize(
                    module.weight.data, nbits=4, group_size=options.group_size, axis=1, device="cpu"
                )
                module.weight.copy_(Quantizer.dequantize(packed, meta).view(module.weight.shape))
    seconds = time.perf_counter() - start
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    peer = {
        "name": f"HQQ, group size {options.group_size}",
        "version": importlib.metadata.version("hqq"),
        "bits_per_weight": 4 + _SCALE_AND_ZERO_BITS / options.group_size,
        "seconds": seconds,
    }
    (Path(options.out) / "peer.json").write_text(json.dumps(peer))


if __name__ == "__main__":
    main()
