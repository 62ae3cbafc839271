"""What several commands share: consoles, the options that name a model, and loading it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from parofx.errors import ConfigError, DataError

if TYPE_CHECKING:
    from parofx.models import LoadedModel

#: Columns of a table that is piped: a file has no width, and cut layer names would be of no use.
_PIPED_WIDTH = 200

#: Results go to standard output, so that they can be piped; everything else to standard error.
console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
errors_console = Console(stderr=True)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]

Source = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a hub id, a .gguf file or a PARO checkpoint.", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


def _go_offline(offline: bool) -> bool:
    if offline:
        # The hub's libraries read it when they are imported, so that it has to come before anything a command does.
        os.environ["HF_HUB_OFFLINE"] = "1"
    return offline


Offline = Annotated[
    bool,
    typer.Option("--offline", callback=_go_offline, help="Use what is in the hub's local cache, ask no network."),
]
Dtype = Annotated[DtypeName, typer.Option(help="Of the float parameters; auto keeps the model's (bfloat16 for GGUF).")]
Device = Annotated[DeviceName, typer.Option(help="Where to run; auto takes a CUDA device if there is one.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that the model's repository brings.")
]


def in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work rather than after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Also write the result to this file.",
        dir_okay=False,
        writable=True,
        callback=in_a_folder,
    ),
]


def load(
    source: str,
    *,
    revision: str | None,
    offline: bool,
    dtype: DtypeName,
    device: DeviceName | Literal["meta"],
    trust_remote_code: bool,
) -> LoadedModel:
    """Load a model as the options say, telling so; on the meta device it comes without its weights."""
    with errors_console.status(f"loading {source} …"):
        import torch
        from transformers.utils import logging

        from parofx.models import LoadedModel, load_model, load_skeleton

        target = "meta" if device == "meta" else find_device(device)
        logging.disable_progress_bar()  # two at a time would overwrite each other
        loaded = (load_skeleton if device == "meta" else load_model)(
            source,
            revision=revision,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            local_files_only=offline,
            trust_remote_code=trust_remote_code,
        )
        return LoadedModel(loaded.model.to(target), loaded.tokenizer)


def check_sources(sources: Iterable[str], split: str = "train") -> None:
    """Read the first document of each source: what is wrong with a name is said before a model is loaded.

    Raises:
        DataError: if a source cannot be read or holds no document.
    """
    from parofx.calibration.sources import load_texts

    for source in sources:
        if not any(not isinstance(one, str) or one.strip() for one in load_texts(source, split=split)):
            raise DataError(f"{source} holds no document; see what a source may be in parofx quantize --help")


def require_tokenizer(loaded: LoadedModel, source: str, reader: str) -> Any:
    """Return a model's tokenizer, which `reader` needs.

    Raises:
        DataError: if it has none.
    """
    if loaded.tokenizer is None:
        raise DataError(
            f"{source} has no tokenizer that can be loaded, and {reader} reads text; expected tokenizer.json and "
            "tokenizer_config.json beside its weights, as the model was published with"
        )
    return loaded.tokenizer


def find_device(device: DeviceName) -> str:
    """Return the device that an option names; under `torchrun` the CUDA device of this process.

    Raises:
        ConfigError: if it is CUDA and there is none.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device; use --device cpu")
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def size(count: float) -> str:
    """Return a number of bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
