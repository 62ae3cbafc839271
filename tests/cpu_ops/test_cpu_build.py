"""Building, caching and failing to build."""

import fcntl
import io
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from parofx import cpu_ops
from parofx.cpu_ops import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
FAKE_COMPILER = """\
#!/bin/sh
echo "$@" >> "{log}"
sleep {delay}
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fake_compiler(folder: Path, body: str) -> str:
    path = folder / "fake-cxx"
    path.write_text(body)
    path.chmod(0o755)
    return str(path)


def test_importing_builds_nothing(tmp_path: Path) -> None:
    run = python("import parofx.cpu_ops", PAROFX_CACHE=str(tmp_path / "cache"), CXX="/nowhere/cxx")
    assert run.communicate(timeout=120)[1] == ""
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_there_is_one_warning_and_no_provider(tmp_path: Path) -> None:
    code = """
        import warnings
        from parofx import cpu_ops
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [cpu_ops.is_available() for _ in range(3)] == [False] * 3
        assert [w.category for w in caught] == [RuntimeWarning], caught
        assert "install g++ 11 or newer" in str(caught[0].message)
        assert "/nowhere/cxx" in cpu_ops.why_unavailable()
        about = cpu_ops.describe()
        assert about["available"] is False and about["library"] is None and about["isa"] is None
        try:
            cpu_ops.load()
        except cpu_ops.BuildUnavailableError:
            print("done")
    """
    run = python(code, PAROFX_CACHE=str(tmp_path), CXX="/nowhere/cxx")
    output, errors = run.communicate(timeout=120)
    assert output.strip() == "done", errors


def test_asking_again_keeps_nothing_of_who_asked(tmp_path: Path) -> None:
    code = """
        import warnings, weakref
        from parofx import cpu_ops

        warnings.simplefilter("ignore")

        class Held:
            pass

        def ask(how):
            held = Held()
            try:
                how()
            except cpu_ops.BuildUnavailableError:
                pass
            return weakref.ref(held)

        questions = cpu_ops.load, cpu_ops.load, cpu_ops.is_available, cpu_ops.why_unavailable
        print([ask(question)() for question in questions])
    """
    run = python(code, PAROFX_CACHE=str(tmp_path), CXX="/nowhere/cxx")
    output, errors = run.communicate(timeout=120)
    assert output.strip() == str([None] * 4), errors


def test_a_failing_compiler_raises_with_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "#!/bin/sh\necho 'strange flag' >&2\nexit 3\n"))
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildFailedError, match=r"status 3(.|\n)*strange flag"):
        build.build_library()
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


def test_a_compiler_that_cannot_run_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "not a program"))
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildFailedError, match="could not run the compiler"):
        build.build_library()


def test_processes_that_build_at_once_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = fake_compiler(tmp_path, FAKE_COMPILER.format(log=log, delay=0.2))
    code = "from parofx.cpu_ops import build; print(build.build_library())"
    runs = [python(code, CXX=compiler, PAROFX_CACHE=str(tmp_path / "cache")) for _ in range(3)]
    results = [run.communicate(timeout=120) for run in runs]
    paths = {output.strip() for output, _ in results}
    assert len(paths) == 1, results
    assert Path(paths.pop()).exists()
    assert sum("-shared" in line for line in log.read_text().splitlines()) == 1


@pytest.mark.parametrize("at_terminal", [False, True])
def test_who_waits_for_the_compiler_is_told_once(tmp_path: Path, monkeypatch, capsys, caplog, at_terminal) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, FAKE_COMPILER.format(log=tmp_path / "log", delay=0)))
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: at_terminal, raising=False)
    with caplog.at_level("INFO", logger="parofx"):
        build.build_library()
        build.build_library()
    shown = capsys.readouterr()
    told = shown.err.splitlines() if at_terminal else caplog.messages
    assert len(told) == 1, (shown, caplog.messages)
    assert str(tmp_path / "cache") in told[0]
    assert not shown.out
    assert not (caplog.messages if at_terminal else shown.err)


class _Unwritable(io.TextIOBase):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [None, object(), _Unwritable()], ids=["closed", "no stream", "unwritable"])
def test_a_notice_fails_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, stream) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, FAKE_COMPILER.format(log=tmp_path / "log", delay=0)))
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level("INFO", logger="parofx"):
        assert build.build_library().exists()
    assert len(caplog.messages) == 1


def test_who_waits_for_another_process_is_told(tmp_path: Path, caplog) -> None:
    other = (tmp_path / "lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    release = threading.Timer(0.3, other.close)
    with caplog.at_level("INFO", logger="parofx"):
        release.start()
        with build._locked(tmp_path / "lock"):
            assert other.closed
        with build._locked(tmp_path / "lock"):
            pass
    assert len(caplog.messages) == 1
    assert "waiting" in caplog.messages[0]
    assert str(tmp_path) in caplog.messages[0]


def test_a_failure_that_cannot_be_copied_stays_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddError(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} {second}")

    def fail() -> Path:
        raise OddError("no", "library")

    monkeypatch.setattr(cpu_ops, "build_library", fail)
    monkeypatch.setattr(cpu_ops, "_library", None)
    monkeypatch.setattr(cpu_ops, "_failure", None)
    with pytest.raises(OddError):
        cpu_ops.load()
    monkeypatch.delattr(cpu_ops, "build_library")  # it is not called again
    with pytest.raises(RuntimeError, match="OddError: no library"):
        cpu_ops.load()


def test_a_built_library_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/cxx")
    with pytest.raises(build.BuildUnavailableError, match="no C\\+\\+ compiler"):
        build.build_library()
    (tmp_path / build.library_name()).touch()
    assert build.build_library() == tmp_path / build.library_name()


def test_the_name_depends_on_sources_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.library_name()}
    for file in build.SOURCES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert {build.library_name()} == names
    with (tmp_path / "layout.h").open("a") as file:
        file.write("// changed\n")
    names.add(build.library_name())
    monkeypatch.setattr(build, "_COMMON_FLAGS", ("-O0",))
    names.add(build.library_name())
    monkeypatch.setattr("torch.__version__", "0.0")
    names.add(build.library_name())
    assert len(names) == 4


def test_other_platforms_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(build.BuildUnavailableError, match="on Linux only"):
        build.build_library()


@needs_compiler
def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    code = """
        from parofx import cpu_ops
        from parofx.cpu_ops import build
        folder = build.usable_folder(build.cache_folder())
        (folder / build.library_name()).write_bytes(b"not a library")
        print(cpu_ops.why_unavailable())
    """
    output, errors = python(code, PAROFX_CACHE=str(tmp_path)).communicate(timeout=120)
    assert "delete the file" in output, errors


@needs_compiler
@pytest.mark.slow
def test_a_real_build_from_nothing(tmp_path: Path) -> None:
    code = "from parofx import cpu_ops; print(cpu_ops.active_isa())"
    output, errors = python(code, PAROFX_CACHE=str(tmp_path), CXX="g++ -O1").communicate(timeout=300)
    assert output.strip() in ("scalar", "avx2", "avx512", "avx512_bf16", "amx"), errors
