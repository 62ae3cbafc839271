"""Where text comes from: text, JSONL and Parquet files, folders of them, and the datasets of the Hugging Face hub.

A document is a string, or a conversation: a list of `{"role": …, "content": …}` messages, to be rendered by the
tokenizer's chat template.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from parofx.errors import DataError
from parofx.folders import expand_user

Conversation: TypeAlias = list[dict[str, str]]
Document: TypeAlias = str | Conversation

#: Fields of a JSONL or Parquet row that hold a document, in the order they are looked for.
DOCUMENT_FIELDS = ("text", "messages")
#: Short names → hub datasets. The Pile's validation set and RedPajama's sample are mirrors; the originals are gone.
DATASETS = {
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "c4": "allenai/c4:en",
    "redpajama": "liang2kl/RedPajama-Data-1T-Sample-Backup",
    "pile": "mit-han-lab/pile-val-backup::validation",
}
#: Characters of a wrong line that an error shows, and half as many before the place.
_EXCERPT = 60
#: Two blank lines: the border between two documents of one text file.
_DOCUMENT_BORDER = re.compile(r"\n[ \t]*\n[ \t]*\n\s*")


def load_texts(source: str | Path, *, split: str = "train") -> Iterator[Document]:
    """Yield the documents of a source, reading no further than they are asked for.

    | source | documents |
    |-|-|
    | `notes.txt`, `README.md`, `.rst` | the parts between two or more blank lines; else the file |
    | `chat.jsonl` | the `text` or the `messages` of each line |
    | `part.parquet` | the `text` or the `messages` of each row |
    | a folder | those of all such files in it and below, in the order of their paths |
    | `wikitext:wikitext-2-raw-v1` | rows of a hub dataset, streamed: `name`, `name:config` or `name:config:split` |
    | `wikitext2`, `c4`, `redpajama`, `pile` | the datasets that papers on quantization mean by these names |
    | `wikitext2+c4+redpajama` | one document of each in turn |

    Args:
        source: a path or a dataset id. What exists on disk is a path.
        split: of a hub dataset whose id names none.

    Raises:
        DataError: if nothing is there, or a row holds no document; the message says where.
    """
    if not str(source).strip():
        raise DataError("a source must be a file, a folder or a dataset id, got an empty name")
    path = expand_user(source)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # the system takes no name that is so long
        raise DataError(
            f"a source must be a file, a folder or a dataset id, got {len(str(source))} characters "
            f"({error.strerror}); text itself is given in a list: [text]"
        ) from error
    if is_folder:
        return _load_folder(path)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            raise DataError(f"{path}: expected a file ending in one of {sorted(_READERS)}, got {path.suffix!r}")
        return reader(path)
    names = str(source).split("+")
    if len(names) > 1 and all(names):
        return interleave(load_texts(name, split=split) for name in names)
    if reader is not None or path.is_absolute() or str(source).startswith((".", "~")) or str(source).endswith(os.sep):
        raise DataError(f"no such file or folder: {path}")
    return _load_dataset(DATASETS.get(str(source), str(source)), split)


def interleave(sources: Iterable[Iterator[Document]]) -> Iterator[Document]:
    """Yield one document of each source in turn until all are used up, so that the first does not crowd out others."""
    waiting = list(sources)
    while waiting:
        remaining = []
        for documents in waiting:
            for document in documents:
                yield document
                remaining.append(documents)
                break
        waiting = remaining


def _load_folder(folder: Path) -> Iterator[Document]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in _READERS)
    if not files:
        raise DataError(f"{folder}: expected at least one file ending in one of {sorted(_READERS)}, found none")
    return (document for path in files for document in _READERS[path.suffix.lower()](path))


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got {_wrong_byte(error)}") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def _load_plain(path: Path) -> Iterator[Document]:
    with _reading(path, "text"):
        text = path.read_text(encoding="utf-8-sig")
    for part in _DOCUMENT_BORDER.split(text):
        if part.strip():
            yield part.strip("\n")


def _wrong_byte(error: UnicodeDecodeError) -> str:
    return f"the byte 0x{error.object[error.start]:02x} behind {error.start} others"


def _load_jsonl(path: Path) -> Iterator[Document]:
    with _reading(path, "JSON lines"), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig").rstrip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: expected UTF-8 text, got {_wrong_byte(error)}") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}, column {error.pos + 1}: expected one JSON object a line, got "
                    f"{_excerpt(text, error.pos)} ({error.msg})"
                ) from error
            except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
                got = f"{_excerpt(text, 0)} ({error})"
                raise DataError(f"{where}: expected one JSON object a line, got {got}") from error
            yield _document(row, where)


def _excerpt(text: str, place: int) -> str:
    """Quote what is around a place, so that characters which cannot be seen are."""
    begin, end = max(0, place - _EXCERPT // 2), place + _EXCERPT
    return f"{'…' if begin else ''}{text[begin:end]!r}{'…' if end < len(text) else ''}"


def _load_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'parofx[transformers]'") from error
    number = 0
    with _reading(path, "Parquet"), parquet.ParquetFile(path) as file:
        columns = [name for name in DOCUMENT_FIELDS if name in file.schema_arrow.names]
        if not columns:
            raise DataError(f"{path}: expected a column of {DOCUMENT_FIELDS}, got {file.schema_arrow.names}")
        for table in file.iter_batches(batch_size=256, columns=columns):
            for row in table.to_pylist():
                number += 1
                yield _document(row, f"{path}, row {number}")


def _load_dataset(name: str, split: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file or folder, and reading it as a hub dataset needs datasets: "
            "pip install 'parofx[transformers]'"
        ) from error
    identifier, _, rest = name.partition(":")
    config, _, named_split = rest.partition(":")
    try:
        rows = datasets.load_dataset(identifier, config or None, split=named_split or split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _document(row, f"dataset {name!r}, row {number}")
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise errors of their own
        raise DataError(
            f"{name!r} is no file or folder, and it could not be read as a hub dataset "
            f"({type(error).__name__}: {error}). Check the name (name, name:config or name:config:split) and the "
            "network, or download the text and pass the file; text itself is given in a list: [text]"
        ) from error


def _document(row: Any, where: str) -> Document:
    if isinstance(row, Mapping):
        for field in DOCUMENT_FIELDS:
            value = row.get(field)
            if value is not None:
                return check_document(value, where)
        empty = ", all of them empty" if any(field in row for field in DOCUMENT_FIELDS) else ""
        raise DataError(f"{where}: expected a field of {DOCUMENT_FIELDS}, got {sorted(row)}{empty}")
    raise DataError(f"{where}: expected an object with a field of {DOCUMENT_FIELDS}, got {type(row).__name__}")


def check_document(value: object, where: str) -> Document:
    """Return `value` as a document.

    Raises:
        DataError: if it is neither a string nor a conversation, naming `where`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "role" in item for item in value):
        return [dict(item) for item in value]
    got = "an empty list" if value == [] else type(value).__name__
    raise DataError(f"{where}: expected a string or a list of messages with 'role' and 'content', got {got}")


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _load_plain,
    ".md": _load_plain,
    ".rst": _load_plain,
    ".jsonl": _load_jsonl,
    ".ndjson": _load_jsonl,
    ".parquet": _load_parquet,
}
