import json

import pytest
import torch

from parofx.errors import ConfigError
from parofx.triton_ops import architectures, cost_model
from parofx.triton_ops.architectures import ARCHITECTURES
from parofx.triton_ops.tiles import DequantizeTiles, FusedTiles, LinearTiles

CACHED = (cost_model.launch_table, cost_model.plan_layer, cost_model.choose_linear, cost_model.choose_product)


@pytest.fixture(autouse=True)
def no_tuned_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("PAROFX_CACHE", str(tmp_path))
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000])
def test_there_is_a_plan_for_every_layer(tokens, arch):
    for in_features, out_features in ((4096, 4096), (14336, 4096), (96, 8)):
        plan = cost_model.plan_layer(tokens, in_features, out_features, 32, 8, arch)
        if isinstance(plan.linear, FusedTiles):
            plan.linear.check(tokens)
            assert plan.rotation is None
        elif isinstance(plan.linear, LinearTiles):
            assert plan.linear.split_k >= 1
        else:
            assert tokens > 64


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_token_is_rotated_in_the_product_and_many_by_tensor_cores(arch):
    assert cost_model.plan_layer(1, 4096, 4096, 128, 8, arch).placement == "fused"
    # The RTX 4090 issues so many instructions for its bandwidth that shuffles are as good.
    many = cost_model.plan_layer(4096, 4096, 4096, 128, 8, arch).placement
    assert many == ("gather" if arch == "sm_89" else "dense")


def test_split_k_fills_the_card_and_stops_there():
    tiles = LinearTiles(16, 128, 0, False, 4, 4)
    card = architectures.architecture("sm_90")
    assert cost_model.choose_split(1, 4096, 4096, tiles, card) == 8
    assert cost_model.choose_split(1, 4096, 64 * 1024, tiles, card) == 1
    assert cost_model.choose_split(1, 14336, 1024, tiles, card) == 8
    assert cost_model.choose_split(1, 512, 1024, tiles, card) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_there_are_locks_for_every_output_tile(arch):
    from parofx.triton_ops import launch

    for tokens in (1, 4, 8, 16, 17, 64, 65, 256, 257, 5000):
        for out_features in (8, 4096, 151936):
            tiles = cost_model.choose_linear(tokens, 4096, out_features, arch)
            if tiles.split_k > 1:
                needed = -(-tokens // tiles.block_m) * (-(-out_features // tiles.block_n) + 3)
                assert launch.make_locks(out_features, torch.device("cpu")).numel() >= needed


def test_tables_say_where_their_rows_are_from():
    for arch in ARCHITECTURES:
        source = "tuned:NVIDIA H100 80GB HBM3" if arch == "sm_90" else "static"
        assert {row.source for row in cost_model.launch_table(arch)} == {source}


def test_many_tokens_are_multiplied_by_dequantized_weights():
    few, many = (cost_model.choose_product(tokens, 4096, 4096, "sm_90") for tokens in (256, 4096))
    assert isinstance(few, LinearTiles)
    assert isinstance(many, DequantizeTiles)


def test_tuned_rows_come_first():
    tiles = {"block_m": 16, "block_n": 64, "split_k": 2, "swap_ab": False, "num_warps": 4, "num_stages": 2}
    row = {"kernel": "int4_linear", "max_tokens": 1, "K": 4096, "N": 1024, "source": "tuned:card", "tiles": tiles}
    file = cost_model.tuned_table("sm_90")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"arch": "sm_90", "rows": [row]}))
    assert cost_model.choose_linear(1, 4096, 1024, "sm_90") == LinearTiles(**tiles)
    assert cost_model.choose_linear(1, 4096, 2048, "sm_90") != LinearTiles(**tiles)
    assert cost_model.find_row("int4_linear", 1, 4096, 1024, "sm_90").source == "tuned:card"


def test_tiles_that_no_kernel_takes_any_more_are_refused():
    tiles = {"block_n": 256, "slice_tiles": 8, "num_warps": 8, "num_stages": 3}
    row = {"kernel": "rotate_int4_linear", "max_tokens": 2, "K": 128, "N": 8, "source": "tuned:card", "tiles": tiles}
    with pytest.raises(
        ConfigError, match=r"here\.json must be .* must be at most 8, got 8 and 2.*; delete or tune it anew"
    ):
        cost_model.parse_table(json.dumps({"rows": [row]}), "here.json")


@pytest.mark.parametrize("text", ["{", "{}", '{"rows": [{"kernel": "rotate"}]}', "[]"])
def test_a_malformed_table_is_refused(text):
    with pytest.raises(ConfigError, match=r"here\.json must be a launch table of kernels"):
        cost_model.parse_table(text, "here.json")


def test_what_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"architecture must be one of .*'sm_90'.*, got 'sm_70'"):
        cost_model.launch_table("sm_70")
    with pytest.raises(ConfigError, match="no launch parameters of rotate_int4_linear for 5 tokens on sm_90"):
        cost_model.choose_fused(5, 128, 128, "sm_90")
    with pytest.raises(ConfigError, match=r"need compute capability 8\.0 or later, got 7\.5"):
        architectures.nearest(7, 5)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_120"),
    ],
)
def test_other_cards_take_the_nearest_tables(capability, name):
    assert architectures.nearest(*capability) == name


def test_devices_have_tables(monkeypatch):
    assert architectures.architecture_of(torch.device("cpu")) == "sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert architectures.architecture_of(torch.device("cuda", 0)) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert architectures.architecture_of(torch.device("cuda", 0)) == "gfx942"
