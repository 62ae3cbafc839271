"""Loading never holds the float weights of quantized linears: the peak of resident memory tells."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from parofx.checkpoint import load_pretrained, save_pretrained
from parofx.nn import ParoLinear

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WIDTH, LINEARS = 4096, 5
PACKED_BYTES = LINEARS * WIDTH * WIDTH // 2
FLOAT_BYTES = LINEARS * WIDTH * WIDTH * 2  # in 16 bit, the smallest that a float weight could be


def resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def packed_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=32,
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


@pytest.mark.parametrize("load", [load_pretrained, transformers.AutoModelForCausalLM.from_pretrained])
def test_peak_memory(tmp_path, load):
    save_pretrained(packed_llama(), tmp_path / "model")
    try:
        CLEAR.write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("the kernel does not let the peak be reset")
    before = resident("VmRSS")
    model = load(tmp_path / "model", dtype=torch.float32)
    for buffer in model.buffers():
        buffer.sum()  # files are mapped: a page counts once it is read
    growth = resident("VmHWM") - before
    assert isinstance(model.model.layers[0].mlp.up_proj, ParoLinear)
    assert PACKED_BYTES / 2 < growth < 2 * PACKED_BYTES < FLOAT_BYTES
