"""Loading never holds the float weights of quantized linears: the peak of resident memory tells."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from parofx.checkpoint import save_pretrained
from parofx.nn import ParoLinear

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WIDTH, LINEARS = 4096, 5
PACKED_BYTES = LINEARS * WIDTH * WIDTH // 2
FLOAT_BYTES = LINEARS * WIDTH * WIDTH * 2  # in 16 bit, the smallest that a float weight could be


#: Prints by how much the peak of resident memory rose; a process of its own has no freed memory to reuse.
SCRIPT = """
import pathlib, sys
import torch, transformers
import parofx
from parofx.nn import ParoLinear

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

load = {load}
load(sys.argv[2], dtype=torch.float32)  # what a first load imports is not what it loads
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
model = load(sys.argv[1], dtype=torch.float32)
for buffer in model.buffers():
    buffer.view(torch.uint8).max()  # files are mapped: a page counts once it is read
print(resident("VmHWM") - before, isinstance(model.model.layers[0].mlp.up_proj, ParoLinear))
"""


def packed_llama(width: int = WIDTH) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 128,
        num_key_value_heads=1,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            linear = ParoLinear(module.in_features, module.out_features, group_size=128, krot=2, bias=False)
            model.set_submodule(name, linear)
    state = model.state_dict()
    floats = {key: torch.ones(tensor.shape) for key, tensor in state.items() if tensor.is_meta}
    model.load_state_dict(floats, strict=False, assign=True)
    return model


@pytest.mark.parametrize("load", ["parofx.load_pretrained", "transformers.AutoModelForCausalLM.from_pretrained"])
def test_peak_memory(tmp_path, load):
    save_pretrained(packed_llama(), tmp_path / "model")
    save_pretrained(packed_llama(128), tmp_path / "small")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        SCRIPT.format(load=load),
        str(tmp_path / "model"),
        str(tmp_path / "small"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, quantized = done.stdout.split()
    assert quantized == "True"
    # The kernels' layout is made from the mapped file, whose pages stay while any tensor of it is in use.
    assert PACKED_BYTES / 2 < int(growth) < 2.5 * PACKED_BYTES < FLOAT_BYTES
