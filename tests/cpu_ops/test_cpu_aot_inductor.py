"""A lowered model as a package of AOTInductor, loaded by a process that compiles nothing."""

import subprocess
import sys
from pathlib import Path

import graphs
import pytest
import torch
from libraries import needs_library
from safetensors.torch import load_file, save_file

import parofx
from parofx import cpu_ops

pytestmark = needs_library
#: Ways to have the operators registered: with parofx, and with nothing but its shared library.
LOADING = {
    "parofx": "from parofx import cpu_ops; cpu_ops.load()",
    "library": "import torch; torch.ops.load_library(sys.argv[1])",
}
CONSUMER = """
import sys
{load}
import torch
from safetensors.torch import load_file, save_file
fast = torch._inductor.aoti_load_package("model.pt2")
save_file({{name: fast(x) for name, x in load_file("inputs").items()}}, "outputs")
assert ("parofx" in sys.modules) == ("parofx" in {load!r})
"""
#: Two roundings to bf16 apart.
BF16 = 2.0**-7


@pytest.mark.slow
# Raised inside torch, where the exporter copies its own tree specifications.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_a_package_runs_where_the_library_is_loaded(tmp_path: Path) -> None:
    model, x = graphs.Layer().bfloat16().eval(), graphs.rows(5, 64).bfloat16()
    parofx.quantize(model, parofx.ParoConfig(group_size=64), example_inputs=(x,), progress=False)
    inputs = {str(rows): graphs.rows(rows, 64).bfloat16() for rows in (1, 5, 17)}
    save_file(inputs, tmp_path / "inputs")
    with torch.no_grad():
        expected = {name: model(each) for name, each in inputs.items()}
        lowered = parofx.lower(parofx.capture(model, x))
        program = torch.export.export(lowered, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))

    for load in LOADING.values():
        command = [sys.executable, "-c", CONSUMER.format(load=load), str(cpu_ops.describe()["library"])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(load_file(tmp_path / "outputs"), expected, rtol=BF16, atol=BF16)
        (tmp_path / "outputs").unlink()
