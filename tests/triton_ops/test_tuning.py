"""Tuning with a clock of our own; the kernels run on a GPU or under the interpreter."""

import itertools

import pytest
import torch

from parofx.errors import ConfigError
from parofx.triton_ops import cost_model

SHAPES = [(1, 256, 64), (17, 256, 64)]
CACHED = (cost_model.launch_table, cost_model.plan_layer, cost_model.choose_linear, cost_model.choose_product)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path))
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.mark.gpu
def test_the_fastest_candidate_is_kept_and_used(device):
    from parofx.triton_ops import tuning

    times = itertools.count(100, -1)

    def clock(call):
        assert call().shape in ((1, 64), (17, 64))
        return next(times)

    shapes = [tuning.Shape(*shape) for shape in SHAPES]
    rows = tuning.tune(shapes, device, "tuned:a card", clock)
    assert [row.kernel for row in rows] == ["int4_linear", "rotate_int4_linear", "int4_linear"]
    file = tuning.write_rows(rows, "sm_90")
    assert file == cost_model.tuned_table("sm_90")
    *_, slowest_timed_last = tuning.candidates(shapes[1], fused=False)
    assert cost_model.choose_linear(17, 256, 64, "sm_90") == slowest_timed_last
    assert cost_model.find_row("int4_linear", 1, 256, 64, "sm_90").source == "tuned:a card"
    assert cost_model.find_row("int4_linear", 1, 256, 128, "sm_90").source != "tuned:a card"


@pytest.mark.gpu
def test_what_does_not_run_is_passed_over(device):
    from parofx.triton_ops import tuning

    def broken(call):
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(ConfigError, match=r"no candidate of int4_linear runs on .*: out of resource: shared memory"):
        tuning.tune([tuning.Shape(*SHAPES[0])], device, "tuned:a card", broken)


def test_rows_are_merged_by_shape():
    pytest.importorskip("triton")
    from parofx.triton_ops import tuning

    def row(tokens, block_m):
        tiles = {"block_m": block_m, "block_n": 64, "split_k": 1, "swap_ab": False, "num_warps": 4, "num_stages": 7}
        return cost_model.Row("int4_linear", tokens, 256, 64, "tuned:a card", tiles)

    assert cost_model.choose_product(16, 256, 64, "sm_90").num_stages != 7  # asked before, so that it is cached
    tuning.write_rows([row(16, 16), row(1, 16)], "sm_90")
    assert cost_model.choose_product(16, 256, 64, "sm_90").num_stages == 7
    tuning.write_rows([row(16, 32)], "sm_90")
    tuned = [one for one in cost_model.launch_table("sm_90") if one.source == "tuned:a card"]
    assert [(one.max_tokens, one.tiles["block_m"]) for one in tuned] == [(1, 16), (16, 32)]


def test_tuning_needs_a_gpu():
    pytest.importorskip("triton")
    from parofx.triton_ops import tuning

    with pytest.raises(ConfigError, match="tuning needs a CUDA device, got cpu"):
        tuning.tune_device([tuning.Shape(1, 128, 8)], torch.device("cpu"))
