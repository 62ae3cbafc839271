import json
import struct
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from parofx.checkpoint import files
from parofx.errors import CheckpointError


def two_shards(folder: Path) -> dict[str, str]:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3, dtype=torch.float16)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / files.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_open_folder_reads_headers_and_then_tensors(tmp_path):
    two_shards(tmp_path)
    shards = files.open_folder(tmp_path)
    assert {name: (t.dtype, tuple(t.shape), t.is_meta) for name, t in shards.tensors.items()} == {
        "a": (torch.float32, (2,), True),
        "b": (torch.float16, (3,), True),
    }
    read = dict(shards.read("cpu"))
    assert torch.equal(read["a"], torch.zeros(2))
    assert torch.equal(read["b"], torch.ones(3, dtype=torch.float16))


def test_folder_without_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=r"there is neither; other formats are never read"):
        files.open_folder(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, None, ["a"], {"a": 5}])
def test_index_without_weight_map(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="must hold a 'weight_map'"):
        files.open_folder(tmp_path)


def test_index_that_contradicts_the_files_lists_every_key(tmp_path):
    weight_map = two_shards(tmp_path)
    write_index(tmp_path, {"a": "two.safetensors", "c": weight_map["a"]})
    with pytest.raises(CheckpointError, match=r"(?s)a: .* says two.safetensors, one.*b: .*nothing.*c: .*no file"):
        files.open_folder(tmp_path)


def test_missing_and_truncated_shards_are_reported_together(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "one.safetensors").unlink()
    content = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"(?s)one.safetensors is missing.*two.safetensors is truncated"):
        files.open_folder(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in one.safetensors and in two.safetensors"):
        files.open_shards([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_pickled_shard(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        files.open_shards([tmp_path / "model.bin"])


def test_unknown_dtype(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(CheckpointError, match="unknown dtype 'F8_E8M0'"):
        files.open_shards([tmp_path / "a.safetensors"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "expected the file config.json"), ("{", "cannot be read as JSON"), ("[1]", "JSON object, got list")],
)
def test_read_json_refuses(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/folder"])
def test_find_folder_of_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="the local cache gave no repository of that name"):
        files.find_folder(name, revision=None, local_files_only=True)


def test_find_folder_passes_revision_and_offline_mode_to_the_hub(tmp_path, monkeypatch):
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options["revision"], options["local_files_only"]))
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert files.find_folder("owner/model", revision="v1", local_files_only=True) == tmp_path
    assert files.find_folder(tmp_path, revision=None, local_files_only=False) == tmp_path
    assert calls == [("owner/model", "v1", True)]


def test_new_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with files.new_folder(target, overwrite=False) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["a"]
    assert [file.name for file in target.parent.iterdir()] == ["model"]


def test_new_folder_replaces_an_empty_or_an_overwritten_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for content in ("1", "2"):
        with files.new_folder(target, overwrite=content == "2") as folder:
            (folder / content).write_text(content)
    assert [file.name for file in target.iterdir()] == ["2"]
    assert list(tmp_path.iterdir()) == [target]


def test_new_folder_leaves_nothing_behind_on_an_error(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("kept")

    def write() -> None:
        with files.new_folder(target, overwrite=True) as folder:
            (folder / "half").write_text("written")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "old").read_text() == "kept"


def test_new_folder_brings_the_old_one_back_when_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("kept")
    rename = Path.rename

    def failing(self, destination):
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), files.new_folder(target, overwrite=True):
        pass
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "old").read_text() == "kept"


def test_new_folder_refuses_where_none_can_be_created(tmp_path):
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(CheckpointError, match=r"cannot write to .*out: .*(Not a directory|exists); choose another"),
        files.new_folder(tmp_path / "file" / "out", overwrite=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_new_folder_refuses_what_is_taken(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="got the file"), files.new_folder(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(CheckpointError, match="overwrite=True"), files.new_folder(tmp_path, overwrite=False):
        pass
