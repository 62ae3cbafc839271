"""Folders of the user's."""

import os
import stat
from pathlib import Path

import pytest

from parofx.folders import cache_folder, expand_user, usable_folder


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("PAROFX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", fail)


def test_an_unwritable_cache_falls_back_to_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()  # a file where the folder should be: unwritable even for root
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = usable_folder(blocked / "cache")
    assert folder == tmp_path / f"parofx-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    folder.chmod(0o777)  # as if another user had made it
    other = usable_folder(blocked / "cache")
    assert other != folder
    assert stat.S_IMODE(other.stat().st_mode) == 0o700

    folder.rmdir()
    folder.symlink_to(other)
    assert usable_folder(blocked / "cache") not in (folder, other)


def test_the_cache_is_private(tmp_path: Path) -> None:
    folder = usable_folder(tmp_path / "new")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAROFX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "parofx"
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_who_has_no_home_gets_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_home(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wanted = cache_folder()
    assert wanted.parent == tmp_path
    assert usable_folder(wanted) == wanted
    wanted.chmod(0o777)  # as if another user had made it
    assert usable_folder(wanted) != wanted


def test_a_usable_folder_needs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", fail)
    assert usable_folder(tmp_path) == tmp_path


def test_a_home_that_is_not_there_leaves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_user("~/x") == Path.home() / "x"
    assert expand_user("~no-such-user/x") == Path("~no-such-user/x")
    without_home(monkeypatch)
    assert expand_user("~/x") == Path("~/x")
