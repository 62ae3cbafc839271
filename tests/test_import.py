"""What importing parofx does and does not do."""

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import networkx
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


def imports_of(path: Path, modules: Collection[str]) -> set[str]:
    """Return the modules of parofx that a file imports while it is being imported."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(modules) | {str(node.module)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found & set(modules)


def packages_of(module: str) -> set[str]:
    """Return the packages that a module lies in: they are imported before it."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def test_any_module_can_be_imported_first():
    """No module needs, to be imported, a module that needs it: whichever comes first finds all others whole."""
    root = Path(parofx.__file__).parent
    files = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = networkx.DiGraph()
    for name, path in files.items():
        needed = imports_of(path, files)
        needed = needed.union(*map(packages_of, needed)) - packages_of(name) - {name}
        graph.add_edges_from((name, other) for other in needed)
    assert graph.has_edge("parofx.passes.calibrate", "parofx.calibration.data_run")
    cycles = [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    assert cycles == []


@pytest.mark.parametrize("package", [parofx, parofx.passes])
def test_unknown_names_are_refused(package):
    with pytest.raises(AttributeError, match=r"module 'parofx(\.passes)?' has no attribute 'quantise'"):
        _ = package.quantise
