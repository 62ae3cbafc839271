"""Compile the CPU kernels at first use, once per user.

`build_library()` returns the path of a shared library. It lies in a cache folder under a name that hashes whatever
could change it: sources, flags, machine, torch version. Processes that build at once wait for the first one. A
finished library appears by renaming, so no process ever sees half of one.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from parofx.folders import cache_folder, usable_folder

SOURCES = Path(__file__).parent / "csrc"
TIMEOUT_SECONDS = 300

logger = logging.getLogger("parofx")


class BuildUnavailableError(RuntimeError):
    """The kernels cannot be built here: no compiler, or a platform they do not support."""


class BuildFailedError(RuntimeError):
    """The compiler ran and failed; the message holds its output."""


@dataclass(frozen=True)
class Source:
    """One translation unit and the flags that only it gets."""

    name: str
    flags: tuple[str, ...] = ()


_COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-unused-parameter")
# gcc's own AVX512 header reads variables it calls undefined on purpose.
_VECTOR_FLAGS = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
_AVX2_FLAGS = (*_VECTOR_FLAGS, "-mavx2", "-mfma", "-mf16c")
_AVX512_FLAGS = (
    *_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"
)  # fmt: skip
_PORTABLE_SOURCES = (Source("op"), Source("linear"), Source("calibration"), Source("dispatch"), Source("scalar"))
_X86_SOURCES = (
    Source("avx512_bf16", (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16")),
    Source("amx", (*_AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8")),
    Source("avx512", _AVX512_FLAGS),
    Source("avx2", _AVX2_FLAGS),
)


def is_x86() -> bool:
    """Return whether this is a 64-bit x86 machine, which gets the vector kernels."""
    return platform.machine().lower() in ("x86_64", "amd64")


def sources() -> tuple[Source, ...]:
    """Return this machine's translation units, the slowest to compile first."""
    return (*_X86_SOURCES, *_PORTABLE_SOURCES) if is_x86() else _PORTABLE_SOURCES


def common_flags() -> list[str]:
    """Return the flags of every translation unit."""
    include = Path(torch.__file__).parent / "include"
    return [*_COMMON_FLAGS, *(["-DPAROFX_X86"] if is_x86() else []), "-isystem", str(include)]


def find_compiler() -> list[str] | None:
    """Return the C++ compiler as a command (`CXX`, else `g++` or `c++`), or None if there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    found = next((name for name in ("g++", "c++") if shutil.which(name)), None)
    return [found] if found else None


def find_openmp() -> Path:
    """Return the OpenMP runtime that torch itself has loaded; a second one would halve the speed.

    Raises:
        BuildUnavailableError: if torch came without one.
    """
    home = Path(torch.__file__).parent
    candidates = [*_loaded_openmp(), *home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    inside = [path for path in candidates if home.parent in path.parents]
    if candidates:
        return (inside or candidates)[0]
    raise BuildUnavailableError(
        f"expected an OpenMP runtime (libgomp or libiomp5) loaded by torch, found none under {home}; "
        "install torch from PyPI"
    )


def library_name() -> str:
    """Return the library's file name, which hashes what it is made from but no compiler, as a built one needs none."""
    digest = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), find_openmp().name, *common_flags()):
        digest.update(part.encode() + b"\0")
    for source in sources():
        digest.update(repr(source).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    return f"parofx_cpu_{digest.hexdigest()[:20]}.so"


def build_library() -> Path:
    """Return the path of the kernels' library, compiling it if no cache holds it.

    Raises:
        BuildUnavailableError: without a compiler, or on an unsupported platform.
        BuildFailedError: if the compiler fails.
    """
    if sys.platform != "linux":
        raise BuildUnavailableError(f"the CPU kernels are built on Linux only, this is {sys.platform}")
    name = library_name()
    folder = usable_folder(cache_folder())
    target = folder / name
    if target.exists():
        return target
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or "g++"
        raise BuildUnavailableError(
            f"no C++ compiler ('{wanted}' is not on PATH); install g++ 11 or newer, or point CXX at a compiler"
        )
    with _locked(folder / f"{name}.lock"):
        if not target.exists():
            _announce(f"compiling parofx's CPU kernels into {folder}, once; this takes about a minute")
            _compile(compiler, target)
    return target


def _announce(message: str) -> None:
    """Tell who waits at a terminal why; logs have it at the level of information."""
    # What stands in for a standard error stream need not know whether it is a terminal, nor be there at all.
    with contextlib.suppress(Exception):
        if sys.stderr.isatty():
            sys.stderr.write(f"{message}\n")
            return
    logger.info(message)


def _compile(compiler: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        work = Path(folder)

        def compile_one(source: Source) -> str:
            output = work / f"{source.name}.o"
            file = SOURCES / f"{source.name}.cpp"
            _run([*compiler, *common_flags(), *source.flags, "-c", str(file), "-o", str(output)])
            return str(output)

        with ThreadPoolExecutor(max(1, min(len(sources()), len(os.sched_getaffinity(0))))) as pool:
            objects = list(pool.map(compile_one, sources()))
        torch_lib = Path(torch.__file__).parent / "lib"
        library = work / target.name
        # Not -fopenmp here: it would add the system's OpenMP runtime to torch's.
        _run([
            *compiler, "-shared", *objects, "-o", str(library), str(find_openmp()), f"-L{torch_lib}", "-ltorch_cpu",
            "-Wl,--no-undefined",
        ])  # fmt: skip
        library.replace(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailedError(f"could not run the compiler: {error}\n  {shlex.join(command)}") from error
    if done.returncode:
        raise BuildFailedError(
            f"the compiler failed with status {done.returncode}; g++ 11 or newer is needed (set CXX to choose one, "
            "or to 'none' to do without the kernels)\n"
            f"  {shlex.join(command)}\n{done.stdout}{done.stderr}"
        )


def _loaded_openmp() -> list[Path]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(Path(path) for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on every platform that can import this module

    with path.open("w") as file:
        # Some network file systems cannot lock; two builds then race, and either result is good.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _announce(f"waiting for the process that compiles parofx's CPU kernels into {path.parent}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
