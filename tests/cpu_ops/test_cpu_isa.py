"""Every instruction set that this machine has, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from libraries import needs_library

from parofx import cpu_ops

pytestmark = needs_library
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "scalar")


def supported() -> tuple[str, ...]:
    """The best ISA and all below it."""
    best = os.environ.get("PAROFX_CPU_ISA") or cpu_ops.active_isa()
    return ISAS[ISAS.index(best) :]


def run_with(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    # Passive waiting, so that threads do not starve each other where cores are few or shared.
    environment = {**os.environ, "PAROFX_CPU_ISA": isa, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("cpu_ops/test_cpu_op.py", "matches or forced or finite or zero_rows"),
        ("calibration/test_column_blocks.py", ""),
        ("calibration/test_dense_rounds.py", ""),
    ],
)
@pytest.mark.parametrize("isa", ISAS)
def test_the_operators_are_right_on(isa: str, file: str, wanted: str) -> None:
    if isa not in supported():
        pytest.skip(f"this machine has no {isa}")
    if file.startswith("calibration") and isa == cpu_ops.active_isa():
        pytest.skip("they run with it in this process")
    tests = str(Path(__file__).parent.parent / file)
    done = run_with(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_an_unknown_isa_is_refused() -> None:
    done = run_with("mmx", "-c", "from parofx import cpu_ops; cpu_ops.load()")
    assert done.returncode == 1
    assert "expected one of" in done.stderr
    assert "got 'mmx'" in done.stderr
