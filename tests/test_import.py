"""What importing parofx does and does not do."""

import subprocess
import sys

import pytest

import parofx

#: On a busy machine; it takes a few milliseconds beyond the standard library.
SECONDS = 1.0

SCRIPT = """
import sys, time
start = time.perf_counter()
import parofx
seconds = time.perf_counter() - start
heavy = {"torch", "triton", "transformers", "datasets", "networkx", "numpy", "safetensors", "rich", "matplotlib"}
print(seconds, *sorted(heavy & set(sys.modules)))
"""


def run(script: str, *options: str) -> list[str]:
    result = subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_is_light():
    seconds, *heavy = run(SCRIPT, "-W", "error")
    assert heavy == []
    assert float(seconds) < SECONDS


def test_quantizing_a_plain_module_imports_neither_our_triton_kernels_nor_transformers():
    script = """
import sys, torch, parofx
model = torch.nn.Sequential(torch.nn.Linear(32, 8)).eval()
config = parofx.ParoConfig(calibration=parofx.CalibrationConfig(steps=1))
parofx.quantize(model, config, example_inputs=torch.randn(2, 32), progress=False)
print(*(name for name in ("parofx.triton_ops", "transformers", "datasets") if name in sys.modules))
"""
    assert run(script) == []


@pytest.mark.parametrize("name", parofx.__all__)
def test_public_names_resolve(name):
    value = getattr(parofx, name)
    assert name in dir(parofx)
    if name != "__version__":
        assert value.__doc__, f"{name} has no docstring"
        assert value.__module__.startswith("parofx."), value.__module__


def test_public_names_stay_what_they_are_when_submodules_are_imported():
    """`parofx.quantize` is a function, whichever modules of the package were imported before."""
    script = """
import importlib, pkgutil, parofx
names = [info.name for info in pkgutil.walk_packages(parofx.__path__, "parofx.") if "triton_ops." not in info.name]
for name in names:
    if not name.startswith(("parofx.integrations.transformers", "parofx.integrations.vllm")):
        importlib.import_module(name)
print(*(name for name in parofx.__all__ if type(getattr(parofx, name)).__name__ == "module"))
"""
    assert run(script) == []


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'parofx' has no attribute 'quantise'"):
        _ = parofx.quantise
