"""Folders and safetensors files: found, opened and checked without reading a weight."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parofx.errors import CheckpointError, one_per_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Shards:
    """What the headers of a checkpoint's files say: per tensor, a meta tensor and the file that holds it."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path]

    def read(self, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in its stored dtype, on `device`, file by file."""
        for file in dict.fromkeys(self.files.values()):
            with _opened(file, device) as handle:
                for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    yield name, handle.get_tensor(name)


def find_folder(directory: str | Path, *, revision: str | None, local_files_only: bool) -> Path:
    """Return `directory` if it is a folder, else the folder of the hub repository of that name.

    Raises:
        CheckpointError: if it is neither, or the hub (the local cache, with `local_files_only`) does not have it.
    """
    folder = Path(directory)
    if folder.is_dir():
        return folder
    try:
        downloaded: str = snapshot_download(
            str(directory),
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        where = "the local cache" if local_files_only else "the hub"
        raise CheckpointError(
            f"expected a folder or a repository id, got {str(directory)!r}: there is no such folder, and {where} "
            f"gave no repository of that name: {error}"
        ) from error
    return Path(downloaded)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: if the file is absent or holds no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"expected the file {file.name} in {file.parent}, there is none") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def open_folder(folder: Path) -> Shards:
    """Read the headers of all safetensors files of a checkpoint.

    Raises:
        CheckpointError: if a file is missing, truncated or not listed, or there is none.
    """
    index_file = folder / INDEX_FILE
    if not index_file.exists():
        if not (folder / WEIGHTS_FILE).exists():
            raise CheckpointError(
                f"expected {WEIGHTS_FILE} or {INDEX_FILE} in {folder}, there is neither; other formats are never read"
            )
        return open_shards([folder / WEIGHTS_FILE])
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_file} must hold a 'weight_map' from tensor names to files")
    shards = open_shards([folder / name for name in dict.fromkeys(weight_map.values())])
    problems = [
        f"{name}: {INDEX_FILE} says {weight_map.get(name, 'nothing')}, "
        f"{shards.files[name].name if name in shards.files else 'no file'} holds it"
        for name in sorted({*weight_map, *shards.files})
        if name not in shards.files or weight_map.get(name) != shards.files[name].name
    ]
    if problems:
        raise CheckpointError(f"index and files of {folder} contradict each other:\n{one_per_line(problems)}")
    return shards


def open_shards(files: Iterable[str | Path]) -> Shards:
    """Read the headers of safetensors files.

    Raises:
        CheckpointError: listing files that are missing or unreadable, and tensors that occur twice.
    """
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    problems = []
    for file in map(Path, files):
        try:
            with _opened(file, "cpu") as handle:
                for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    if name in where:
                        problems.append(f"{name} is in {where[name].name} and in {file.name}")
                    part = handle.get_slice(name)
                    tensors[name] = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")
                    where[name] = file
        except CheckpointError as error:
            problems.append(str(error))
        except KeyError as error:
            problems.append(f"{file.name} holds a tensor of the unknown dtype {error}")
    if problems:
        raise CheckpointError(f"the checkpoint cannot be opened:\n{one_per_line(problems)}")
    return Shards(tensors, where)


@contextmanager
def _opened(file: Path, device: torch.device | str) -> Iterator[Any]:
    """Open one file; what safetensors and the system raise becomes a `CheckpointError`."""
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no safetensors file; other formats are never read")
    try:
        with safe_open(str(file), framework="pt", device=str(device)) as handle:
            yield handle
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `target` when the block ends, and vanishes when it raises.

    Raises:
        CheckpointError: if `target` is a file, a folder that holds something and `overwrite` is false, or a folder that
            cannot be created.
    """
    target = target.absolute()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"expected a folder to write to, got the file {target}")
    if not overwrite and target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty; choose another folder or pass overwrite=True")
    token = uuid.uuid4().hex[:8]
    fresh = target.with_name(f".{target.name}.{token}.new")
    stale = target.with_name(f".{target.name}.{token}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write to {target}: {error.strerror}; choose another folder") from error
    try:
        yield fresh
        if target.exists():
            target.rename(stale)
        try:
            fresh.rename(target)
        except OSError:
            if stale.exists():
                stale.rename(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(stale, ignore_errors=True)
