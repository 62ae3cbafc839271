import json
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from parofx.calibration.fitting import FittedTransform
from parofx.calibration.store import CalibrationStore, fingerprint, pack_fit, unpack_fits
from parofx.errors import DataError


def fitted(seed: int = 0, linears: int = 2, *, feedback: bool = False) -> FittedTransform:
    generator = torch.Generator().manual_seed(seed)
    grids = [(torch.rand(8, 1, generator=generator), torch.ones(8, 1)) for _ in range(linears)]
    return FittedTransform(
        torch.arange(32, dtype=torch.int16).repeat(2, 1),
        torch.randn(2, 16, generator=generator).half(),
        torch.rand(1, 32, generator=generator).half(),
        tuple(grids),
        tuple(0.1 * (index + 1) for index in range(linears)),
        3.0,
        1 / 3,
        codes=tuple(torch.arange(256, dtype=torch.uint8).view(8, 32) for _ in range(linears)) if feedback else None,
        nearest_errors=(0.7,) * linears if feedback else None,
        damping=0.1 if feedback else None,
        joins_rows=feedback,
    )


def same(one: FittedTransform, other: FittedTransform) -> bool:
    flat = [
        (f.pairs, f.theta, f.channel_scales, *(part for grid in f.grids for part in grid), *(f.codes or ()))
        for f in (one, other)
    ]
    tensors = len(flat[0]) == len(flat[1]) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*flat, strict=True)
    )
    rest = [(f.errors, f.loss_before, f.loss_after, f.nearest_errors, f.damping, f.joins_rows) for f in (one, other)]
    return tensors and rest[0] == rest[1]


def test_fits_come_back_bit_for_bit(tmp_path):
    store = CalibrationStore(tmp_path, "a", resume=True)
    fits = {"layers.0.q": fitted(0), "odd|name": fitted(1, linears=1), "codes": fitted(2, feedback=True)}
    packed = {key: one for name, fit in fits.items() for key, one in pack_fit(name, fit).items()}
    store.save_segment(0, packed, [{"stage": 1.5}])
    tensors, notes = store.load_segment(0)
    assert notes == [{"stage": 1.5}]
    loaded = unpack_fits(tensors)
    assert loaded.keys() == fits.keys()
    assert all(same(loaded[name], fits[name]) for name in fits)


def test_fits_go_where_the_model_is():
    moved = replace(fitted(feedback=True), corrections=((torch.ones(8, 1), torch.ones(1, 32)),) * 2).to("meta")
    tensors = [*pytree.tree_leaves(list(vars(moved).values()))]
    assert {one.device.type for one in tensors if isinstance(one, torch.Tensor)} == {"meta"}
    assert sum(isinstance(one, torch.Tensor) for one in tensors) == 3 + 2 * 2 + 2 + 2 * 2
    assert fitted().to("cpu").codes is None


def test_a_segment_without_transforms(tmp_path):
    store = CalibrationStore(tmp_path, "a", resume=True)
    store.save_segment(0, {})
    assert store.load_segment(0) == ({}, None)


def test_borders_come_back_with_their_kinds(tmp_path):
    store = CalibrationStore(tmp_path, "a", resume=True)
    whole = torch.randn(4, 6)
    borders = [
        {"hidden": whole[:, 1:3], "again": whole[:, 1:3], "mask": None, "size": 6, "scale": 0.5, "flag": True},
        {"hidden": torch.zeros(0, 2, dtype=torch.bfloat16), "mask": torch.tensor([True])},
    ]
    assert store.borders() == []
    store.save_borders(2, [])
    store.save_borders(3, borders)
    assert store.borders() == [2, 3]
    store.keep_borders(3)
    assert store.borders() == [3]
    loaded = CalibrationStore(tmp_path, "a", resume=True).load_borders(3)
    assert len(loaded) == 2
    for one, other in zip(loaded, borders, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                assert one[name].dtype == value.dtype
                assert one[name].device == value.device
                assert torch.equal(one[name], value)
            else:
                assert one[name] == value
                assert type(one[name]) is type(value)


@pytest.mark.parametrize(("digest", "resume", "kept"), [("a", True, True), ("b", True, False), ("a", False, False)])
def test_only_results_of_the_same_run_are_used(tmp_path, caplog, digest, resume, kept):
    store = CalibrationStore(tmp_path, "a", resume=True)
    store.save_segment(0, pack_fit("x", fitted()))
    store.save_borders(0, [{}])
    (tmp_path / "segment-001.safetensors.tmp").write_bytes(b"half a file, left by a kill")
    again = CalibrationStore(tmp_path, digest, resume=resume)
    assert again.borders() == ([0] if kept else [])
    assert (tmp_path / "segment-000.safetensors").exists() == kept
    assert json.loads((tmp_path / "run.json").read_text())["fingerprint"] == digest
    assert ("holds a run with other options, weights or data: starting over" in caplog.text) == (digest == "b")


@pytest.mark.parametrize("name", ["border-001-0", "segment-000", "segment-001"])
@pytest.mark.parametrize("how", ["truncated", "missing", "foreign"])
def test_a_damaged_folder_is_named(tmp_path, name, how):
    store = CalibrationStore(tmp_path, "a", resume=True)
    for index in range(2):
        store.save_segment(index, pack_fit("x", fitted(index)))
        store.save_borders(index, [{"hidden": torch.ones(3)}])
        store.keep_borders(index)
    path = tmp_path / f"{name}.safetensors"
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"no tensors")

    def resume():
        again = CalibrationStore(tmp_path, "a", resume=True)
        (last,) = again.borders()
        return [again.load_segment(index) for index in range(last + 1)], again.load_borders(last)

    if (name, how) == ("border-001-0", "missing"):
        assert store.borders() == []
    else:
        with pytest.raises(DataError, match=rf"work_dir .* is damaged \({name}\.safetensors.*resume=False"):
            resume()


def test_a_file_is_no_work_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"work_dir must be a folder that can be written to, got .*file"):
        CalibrationStore(tmp_path / "file", "a", resume=True)


def test_an_unreadable_header_starts_over(tmp_path):
    store = CalibrationStore(tmp_path, "a", resume=True)
    store.save_borders(0, [{}])
    (tmp_path / "run.json").write_text("{")
    assert CalibrationStore(tmp_path, "a", resume=True).borders() == []


def test_processes_have_borders_of_their_own_in_one_folder(tmp_path):
    with pytest.raises(DataError, match=r"one folder that all processes see: process 1 does not find the run"):
        CalibrationStore(tmp_path, "a", resume=True, process=1)
    first = CalibrationStore(tmp_path, "a", resume=True)
    second = CalibrationStore(tmp_path, "a", resume=True, process=1)
    first.save_borders(0, [{"hidden": torch.zeros(3)}])
    second.save_borders(0, [{"hidden": torch.ones(3)}])
    second.save_borders(1, [])
    first.keep_borders(1)
    assert (first.borders(), second.borders()) == ([], [0, 1])
    assert second.load_borders(0)[0]["hidden"].sum() == 3


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "segment-thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"work_dir must be empty or hold an earlier run: .* no run\.json"):
        CalibrationStore(tmp_path, "a", resume=False)
    assert (tmp_path / "segment-thesis.txt").exists()


def test_the_fingerprint_tells_runs_apart():
    weight, batch = torch.arange(6.0), {"ids": torch.tensor([[1, 2]]), "use_cache": False, "extra": [1, None]}

    def digest(options=None, name="w", tensor=weight, data=batch) -> str:
        return fingerprint(options or {"steps": 1}, [(name, tensor)], [data])

    assert digest() == digest(data=dict(reversed(batch.items()))), "the order of a mapping says nothing"
    assert digest() == digest(tensor=weight.repeat(2, 1).t()[:, 0]), "strides say nothing"
    others = [
        digest(options={"steps": 2}),
        digest(name="v"),
        digest(tensor=weight + 1),
        digest(tensor=weight.to(torch.bfloat16)),
        digest(tensor=weight.reshape(2, 3)),
        digest(tensor=weight[:0]),
        digest(data=batch | {"ids": torch.tensor([[1, 3]])}),
        digest(data=batch | {"use_cache": True}),
        digest(data=batch | {"extra": [1, 2]}),
    ]
    assert len({digest(), *others}) == 1 + len(others)
