"""The folder that a command writes: refused before the work where it could not be written after it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from parofx.errors import CheckpointError


def check_output(output: Path, *, overwrite: bool, read: Iterable[str | Path]) -> None:
    """Check that a checkpoint can be written to `output` without destroying what the run reads.

    Args:
        output: the folder to write.
        overwrite: whether it may hold something, which it then loses.
        read: the model, the texts and the work folder as the user named them; what exists on disk is protected.

    Raises:
        CheckpointError: if `output` is a file, is in use, holds or is one of `read`, or cannot be created.
    """
    try:
        if output.exists() and not output.is_dir():
            raise CheckpointError(f"expected a folder to write to, got the file {output}; choose another folder")
        if output.exists() and not overwrite and any(output.iterdir()):
            raise CheckpointError(f"{output} exists and is not empty: choose another folder, or pass --overwrite")
        for path in map(Path, read):
            if _exists(path) and path.resolve().is_relative_to(output.resolve()):
                raise CheckpointError(
                    f"the output would replace {path}, which this run reads: got -o {output}; choose another folder"
                )
        _try_beside(output)
    except OSError as error:
        raise CheckpointError(f"cannot write to {output}: {error.strerror}; choose another folder") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a hub id need not be a legal path
        return False


def _try_beside(output: Path) -> None:
    """Create and remove a folder where the first missing one of `output`'s path will be."""
    target = Path(os.path.abspath(output))
    while not target.parent.exists():
        target = target.parent
    probe = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.new")
    probe.mkdir()
    probe.rmdir()
