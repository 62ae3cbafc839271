"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without Python around them."""

import os
import subprocess
from pathlib import Path

import pytest

from parofx.cpu_ops import build

DRIVER = Path(__file__).parent / "sanitizer_driver.cpp"
FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{build.SOURCES}")


@pytest.mark.slow
@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_no_kernel_leaves_its_buffers(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    objects = []
    for source in (*build.sources(), build.Source("driver")):
        if source.name == "op":
            continue
        file = DRIVER if source.name == "driver" else build.SOURCES / f"{source.name}.cpp"
        objects.append(str(tmp_path / f"{source.name}.o"))
        command = [*compiler, *build.common_flags(), *source.flags, *FLAGS, "-c", str(file), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = tmp_path / "driver"
    subprocess.run([*compiler, *FLAGS, "-fopenmp", *objects, "-o", str(program)], check=True)

    ran = []
    for isa in ("scalar", "avx2", "avx512", "avx512_bf16", "amx"):
        done = subprocess.run(
            [program, isa, tmp_path / "answers"],
            env={**os.environ, "PAROFX_CPU_ISA": isa},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if "this machine has no" in done.stderr or (not build.is_x86() and isa != "scalar"):
            continue
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"{isa} 0\n"
        ran.append(isa)
    assert "scalar" in ran
