"""Documents of files, folders and datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from parofx.calibration.sources import DATASETS, check_document, interleave, load_texts
from parofx.errors import DataError

MESSAGES = [{"role": "user", "content": "why ?"}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n\nstill one\n\n\ntwo\n", ["one\n\nstill one", "two"]),
        ("one\n \n\t\n\n\ntwo", ["one", "two"]),
        ("one\n\nparagraph", ["one\n\nparagraph"]),
        ("\n\n\n\n", []),
    ],
)
def test_text_is_split_at_two_blank_lines(tmp_path: Path, text: str, documents: list[str]) -> None:
    assert list(load_texts(write(tmp_path / "a.md", text))) == documents


def test_jsonl_holds_texts_and_conversations(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "one", "id": 1}), "", json.dumps({"messages": MESSAGES})]
    assert list(load_texts(write(tmp_path / "a.jsonl", "\n".join(lines)))) == ["one", MESSAGES]


def test_parquet_holds_texts_and_conversations(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pa.table({"text": ["one", None], "messages": [None, MESSAGES], "id": [1, 2]})
    parquet.write_table(rows, tmp_path / "a.parquet")
    assert list(load_texts(tmp_path / "a.parquet")) == ["one", MESSAGES]


def test_a_folder_holds_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "second.txt", "two")
    write(tmp_path / "a.jsonl", '{"text": "one"}')
    write(tmp_path / "ignored.png", "?")
    assert list(load_texts(tmp_path)) == ["one", "two"]


def test_interleave_takes_one_of_each_in_turn() -> None:
    assert list(interleave([iter("abc"), iter("x"), iter("12")])) == ["a", "x", "1", "b", "2", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{', r"a.jsonl, line 2, column 2: expected one JSON object a line, got '\{' \("),
        ("a.jsonl", '{"text":' + "x" * 99, r"line 1, column 9: .* got '\{\"text\":x{60}'… \(Expecting value"),
        ("a.jsonl", '   {"text": }', "line 1, column 13: "),
        ("a.jsonl", f'{{"text": "{"x" * 99}" y', r"column 112: .* got …'x{28}\" y' \(Expecting ',' delimiter"),
        ("a.jsonl", '{"text": "a\tb"}', r"column 12: .*a\\tb.*Invalid control character"),
        ("a.jsonl", "[" * 100_000, r"line 1: expected one JSON object a line, got '\[{60}'… \(.*recursion"),
        ("a.jsonl", '{"text": null}', r"got \['text'\], all of them empty"),
        ("a.jsonl", '{"messages": []}', "got an empty list"),
        ("a.jsonl", '{"body": "one"}', r"line 1: expected a field of \('text', 'messages'\), got \['body'\]"),
        ("a.jsonl", "9" * 5000, r"line 1: expected one JSON object a line, got '9{60}'… \("),
        ("a.jsonl", '"one"', "line 1: expected an object with a field"),
        ("a.jsonl", '{"text": 7}', "line 1: expected a string or a list of messages"),
        ("a.csv", "one", "expected a file ending in one of"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(load_texts(write(tmp_path / name, content)))


@pytest.mark.parametrize(("name", "content"), [("a.txt", "one"), ("a.jsonl", '{"text": "one"}\n\u00a0 \n')])
def test_a_mark_of_utf_8_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert list(load_texts(tmp_path / name)) == ["one"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("a.txt", "a.jsonl"):
        documents = load_texts(write(tmp_path / name, '{"text": "one"}'))
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", refuse)
            patched.setattr(Path, "read_text", refuse)
            with pytest.raises(DataError, match=f"{name} cannot be read as .*Permission"):
                list(documents)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="expected UTF-8 text, got the byte 0xff behind 0 others"):
        list(load_texts(tmp_path / "a.txt"))


def test_bytes_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: expected UTF-8 text, got the byte 0xff behind 10 others"):
        list(load_texts(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", [b"", b"PAR1xx", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_broken_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet: "):
        list(load_texts(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="got an empty name"):
        load_texts(name)


def test_parquet_without_documents_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"expected a column of .* got \['body'\]"):
        list(load_texts(tmp_path / "a.parquet"))


def test_text_in_place_of_a_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"got 39000 characters .*; text itself is given in a list: \[text\]"):
        load_texts("the sea is wide and ships sail on it.\n\n" * 1000)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such name")))
    with pytest.raises(DataError, match=r"no such name.*text itself is given in a list: \[text\]"):
        list(load_texts("the sea is wide"))


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "~/missing", "/missing", "missing/", "~no-such-user/a"])
def test_a_missing_path_is_not_taken_for_a_dataset(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list(load_texts(name))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        list(load_texts(tmp_path))


def test_a_dataset_is_streamed_from_the_split_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append((name, config, options))
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_texts("wikitext:wikitext-2-raw-v1")) == ["one"]
    assert list(load_texts("org/data::validation", split="test")) == ["one"]
    assert calls == [
        ("wikitext", "wikitext-2-raw-v1", {"split": "train", "streaming": True}),
        ("org/data", None, {"split": "validation", "streaming": True}),
    ]


def test_the_names_of_papers_and_several_sources_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append((name, config, options["split"]))
        return [{"text": f"{name} {index}"} for index in range(2)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    notes = write(tmp_path / "notes.txt", "mine")
    found = list(load_texts(f"wikitext2+{notes}+c4"))
    assert found == ["Salesforce/wikitext 0", "mine", "allenai/c4 0", "Salesforce/wikitext 1", "allenai/c4 1"]
    for name in DATASETS:
        list(load_texts(name))
    assert {call[2] for call in calls} == {"train", "validation"}
    assert all("/" in call[0] for call in calls)
    assert calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
    together = write(tmp_path / "a+b.txt", "one file")
    assert list(load_texts(together)) == ["one file"]


def test_one_of_several_sources_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'allenai/c4:en' is no file or folder.*ConnectionError: no network"):
        list(load_texts("c4+pile"))
    with pytest.raises(DataError, match=r"no such file or folder: missing\.txt"):
        list(load_texts("c4+missing.txt"))


def test_a_dataset_that_cannot_be_read_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"ConnectionError: no network.*pass the file"):
        list(load_texts("wikitext"))


def test_a_row_of_a_dataset_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "one"}, {"label": 1}])
    with pytest.raises(DataError, match="dataset 'glue', row 2: expected a field"):
        list(load_texts("glue"))


@pytest.mark.parametrize(("package", "source"), [("datasets", "wikitext"), ("pyarrow.parquet", "a.parquet")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, source: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", "")
    with pytest.raises(DataError, match=r"pip install 'parofx\[transformers\]'"):
        list(load_texts(source))


@pytest.mark.parametrize("value", [7, [], ["text"], [{"content": "no role"}]])
def test_what_is_no_document_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="here: expected a string or a list of messages"):
        check_document(value, "here")
