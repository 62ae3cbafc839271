"""A decoder layer at decode launches no kernel whose only job is a rotation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: Kernels whose only job is a rotation.
ROTATIONS = {"rotate", "rotate_dense", "rotation_matrices"}
COMPILERS = ("c++", "g++", "clang++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is launched, so not for interpreters"
    ),
]


@pytest.fixture(scope="module")
def layers() -> dict[str, dict[str, int]]:
    """Kernels per layer by `"<model> <tokens> before|after"`; printed, with `-s`, as they are asserted."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("decoder_layer.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    for name, kernels in found.items():
        print(f"{name}: {sum(kernels.values())} kernels, {kernels}")
    return found


@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3_text"])
def test_one_token_has_no_rotation_kernel(layers: dict[str, dict[str, int]], model: str) -> None:
    before, after = layers[f"{model} 1 before"], layers[f"{model} 1 after"]
    assert before["rotate"] == before["int4_linear"] == 4
    assert not ROTATIONS & set(after)
    assert sum(after.values()) == sum(before.values()) - 4


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_sixteen_tokens_rotate_apart_only_behind_attention(layers: dict[str, dict[str, int]], model: str) -> None:
    before, after = layers[f"{model} 16 before"], layers[f"{model} 16 after"]
    assert before["rotate"] == before["int4_linear"] == 4
    assert {name: count for name, count in after.items() if name in ROTATIONS} == {"rotate": 1}
    assert (after["rmsnorm_rotate"], after["silu_mul_rotate"], after["int4_linear"]) == (2, 1, 4)
    # Two norms and a product were Inductor's kernels; they are the producers now.
    assert after["inductor"] == before["inductor"] - 3
