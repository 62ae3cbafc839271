"""What a calibration run keeps on disk, so that a killed one goes on at the block it was in.

A work folder holds `run.json` (a fingerprint of options, weights and data), one `segment-NNN.safetensors` per finished
segment with its fitted tensors, and `border-NNN-P.safetensors`: the values that cross into the segment behind it, of
the data that process P holds. Each file is written under a temporary name and renamed, so a kill leaves the last
complete state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parofx.calibration.fitting import FittedTransform
from parofx.errors import DataError

logger = logging.getLogger(__name__)

_FORMAT = 3


class CalibrationStore:
    """The work folder of one run.

    Args:
        folder: created if missing.
        fingerprint: identifies options, weights and data; results of another fingerprint are not used.
        resume: use what is there; otherwise start over.
        process: which of several this is. All but the first must find the folder as that has left it.

    Raises:
        DataError: if the folder cannot be made, or holds other files than those of a run.
    """

    def __init__(self, folder: str | Path, fingerprint: str, *, resume: bool, process: int = 0) -> None:
        self._folder = Path(folder)
        self._process = process
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"work_dir must be a folder that can be written to, got {folder}: {error}") from error
        header = {"format": _FORMAT, "fingerprint": fingerprint}
        found = self._read_header()
        if process and found != header:
            raise DataError(
                f"work_dir must be one folder that all processes see: process {process} does not find the run of the "
                f"first one in {self._folder}; choose a shared folder, or leave it out"
            )
        if not resume or found != header:
            if resume and found is not None:
                logger.warning(
                    "%s holds a run with other options, weights or data: starting over in its place", self._folder
                )
            self._clear()
            _write_atomically(self._folder / "run.json", json.dumps(header).encode())

    def borders(self) -> list[int]:
        """Return the segments behind which this process has a border on disk."""
        return sorted(
            int(path.name.split("-")[1]) for path in self._folder.glob(f"border-*-{self._process}.safetensors")
        )

    def load_segment(self, index: int) -> tuple[dict[str, Tensor], Any]:
        """Return the fitted tensors of a finished segment, and what was noted with them.

        Raises:
            DataError: if the folder is damaged; so does `load_borders`.
        """
        with _opened(self._segment(index)) as file:
            notes = json.loads(file.metadata()["notes"])
            return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 (not a mapping)

    def save_segment(self, index: int, tensors: Mapping[str, Tensor], notes: Any = None) -> None:
        """Write a finished segment's fitted tensors; it counts once a border at or behind it is written.

        `notes` are JSON-serializable.
        """
        _save(tensors, self._segment(index), {"notes": json.dumps(notes)})

    def save_borders(self, index: int, borders: Sequence[Mapping[str, Any]]) -> None:
        """Write the values behind segment `index`; a later run may start there."""
        flat: dict[str, Tensor] = {}
        plain: list[dict[str, Any]] = []
        devices: dict[str, str] = {}
        for batch, border in enumerate(borders):
            tensors_here = {name: value for name, value in border.items() if isinstance(value, Tensor)}
            flat |= {f"{batch}/{name}": value for name, value in tensors_here.items()}
            devices |= {f"{batch}/{name}": str(value.device) for name, value in tensors_here.items()}
            plain.append({name: value for name, value in border.items() if name not in tensors_here})
        _save(flat, self._border(index), {"values": json.dumps({"plain": plain, "devices": devices})})

    def keep_borders(self, index: int) -> None:
        """Remove this process's values behind other segments than `index`."""
        for other in self.borders():
            if other != index:
                self._border(other).unlink()

    def load_borders(self, index: int) -> list[dict[str, Any]]:
        """Return the values behind segment `index`, per batch, on the devices they were on."""
        with _opened(self._border(index)) as file:
            values = json.loads(file.metadata()["values"])
            borders: list[dict[str, Any]] = values["plain"]
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                batch, _, name = key.partition("/")
                borders[int(batch)][name] = file.get_tensor(key).to(values["devices"][key])
        return borders

    def _segment(self, index: int) -> Path:
        return self._folder / f"segment-{index:03d}.safetensors"

    def _border(self, index: int) -> Path:
        return self._folder / f"border-{index:03d}-{self._process}.safetensors"

    def _read_header(self) -> Any:
        path = self._folder / "run.json"
        if not path.exists():
            if any(self._folder.iterdir()):
                raise DataError(
                    f"work_dir must be empty or hold an earlier run: {self._folder} has other files and no run.json; "
                    "choose another folder"
                )
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            return None

    def _clear(self) -> None:
        for path in [*self._folder.glob("segment-*.safetensors*"), *self._folder.glob("border*.safetensors*")]:
            path.unlink()


def fingerprint(options: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], data: Iterable[Any]) -> str:
    """Return a digest of options, named tensors and data (nested mappings, lists, tensors and plain values)."""
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        _digest_value(digest, tensor)
    for item in data:
        _digest_value(digest, item)
    return digest.hexdigest()


def pack_fit(name: str, fitted: FittedTransform) -> dict[str, Tensor]:
    """Return a fitted transform as named tensors, `name|…`."""
    tensors = {"pairs": fitted.pairs, "theta": fitted.theta, "channel_scales": fitted.channel_scales}
    tensors["losses"] = torch.tensor([fitted.loss_before, fitted.loss_after], dtype=torch.float64)
    tensors["errors"] = torch.tensor(fitted.errors, dtype=torch.float64)
    for index, (scales, zeros) in enumerate(fitted.grids):
        tensors |= {f"scales{index}": scales, f"zeros{index}": zeros}
    tensors |= {f"codes{index}": codes for index, codes in enumerate(fitted.codes or ())}
    if fitted.nearest_errors is not None:
        tensors["nearest_errors"] = torch.tensor(fitted.nearest_errors, dtype=torch.float64)
    if fitted.damping is not None:
        tensors["damping"] = torch.tensor(fitted.damping, dtype=torch.float64)
    for index, (up, down) in enumerate(fitted.corrections or ()):
        tensors |= {f"up{index}": up, f"down{index}": down}
    if fitted.uncorrected_errors is not None:
        tensors["uncorrected_errors"] = torch.tensor(fitted.uncorrected_errors, dtype=torch.float64)
    if fitted.joins_rows:
        tensors["joins_rows"] = torch.tensor(True)
    return {f"{name}|{key}": tensor for key, tensor in tensors.items()}


def unpack_fits(tensors: Mapping[str, Tensor]) -> dict[str, FittedTransform]:
    """Return the transforms that `pack_fit` named."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        grouped.setdefault(name, {})[key] = tensor
    return {name: _unpack_fit(parts) for name, parts in grouped.items()}


def _unpack_fit(parts: Mapping[str, Tensor]) -> FittedTransform:
    before, after = parts["losses"].tolist()
    grids = tuple((parts[f"scales{index}"], parts[f"zeros{index}"]) for index in range(len(parts["errors"])))
    rotation = (parts["pairs"], parts["theta"], parts["channel_scales"])
    found: dict[str, Any] = {}
    if "codes0" in parts:
        found["codes"] = tuple(parts[f"codes{index}"] for index in range(len(grids)))
    if "up0" in parts:
        found["corrections"] = tuple((parts[f"up{index}"], parts[f"down{index}"]) for index in range(len(grids)))
    found |= {name: tuple(parts[name].tolist()) for name in ("nearest_errors", "uncorrected_errors") if name in parts}
    if "damping" in parts:
        found["damping"] = parts["damping"].item()
    found["joins_rows"] = "joins_rows" in parts
    return FittedTransform(*rotation, grids, tuple(parts["errors"].tolist()), before, after, **found)


def _digest_value(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            _digest_value(digest, value[key])
    else:
        digest.update(repr(value).encode())


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    # Safetensors refuses tensors that share memory; what crosses a border may be views of one tensor.
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(separate, str(temporary), metadata)
    os.replace(temporary, path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"work_dir {path.parent} is damaged ({path.name}: {error}): delete it, or start over with resume=False"
        ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
