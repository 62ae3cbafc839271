"""What importing parofx does and does not do."""

import os
import subprocess
import sys

import pytest

import parofx
import parofx.passes

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="importing torch once for each module would take minutes")
def test_every_module_can_be_imported_first():
    """Each is imported in a fork of one process that holds what parofx depends on, but nothing of parofx."""
    script = """
import importlib.util, os, pathlib, traceback
import networkx, rich, safetensors.torch, torch._inductor.compile_fx, torch.export, typer
root = pathlib.Path(importlib.util.find_spec("parofx").origin).parent
files = [path.relative_to(root.parent).with_suffix("") for path in sorted(root.rglob("*.py"))]
names = [".".join(file.parts).removesuffix(".__init__") for file in files]
for name in names:
    if name.startswith(("parofx.integrations.", "parofx.triton_ops.", "parofx.plots")):
        continue  # they need packages that need not be there
    child = os.fork()
    if child == 0:
        code = 0
        try:
            __import__(name)
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(name, flush=True)
"""
    assert run(script) == []


@pytest.mark.parametrize("package", [parofx, parofx.passes])
def test_unknown_names_are_refused(package):
    with pytest.raises(AttributeError, match=r"module 'parofx(\.passes)?' has no attribute 'quantise'"):
        _ = package.quantise
