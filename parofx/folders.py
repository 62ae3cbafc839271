"""Folders of the user's: where caches lie, and what `~` stands for."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """Return a path with its `~` or `~name` replaced; as it is where there is no such home, unlike `Path`'s."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Return the folder for what is built and tuned: `PAROFX_CACHE`, or `parofx` in the user's cache folder.

    For users without a home it is the one among the temporary files that `usable_folder` may choose.
    """
    if chosen := os.environ.get("PAROFX_CACHE"):
        return Path(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "parofx"
    home = expand_user("~")
    return home / ".cache" / "parofx" if home.is_absolute() else _temporary_folder()


def usable_folder(wanted: Path) -> Path:
    """Return `wanted` if this user can write there, else a private folder among the temporary files."""
    with contextlib.suppress(OSError):
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            if wanted.name != _private_name() or _is_private(wanted):
                return wanted
    with contextlib.suppress(OSError):
        shared = _temporary_folder()
        shared.mkdir(mode=0o700, exist_ok=True)
        if _is_private(shared):
            return shared
    return Path(tempfile.mkdtemp(prefix="parofx-"))


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / _private_name()


def _private_name() -> str:
    return f"parofx-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Tell whether a folder is ours alone; any user may have made one among the temporary files before us."""
    state = folder.lstat()
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077
