import pytest
import torch
from rounded import random_rotation, round_linear, round_model
from torch import nn

from parofx.checkpoint import layout
from parofx.errors import CheckpointError
from parofx.nn import ROTATION_NAMES, TENSOR_NAMES, ParoLinear


class Siblings(nn.Module):
    """Two linears that share their rotation, one on its own, and a float one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = random_rotation(64, 32, 2, seed=0)
        self.a = round_linear(torch.randn(16, 64), None, shared, 32)
        self.b = round_linear(torch.randn(24, 64), torch.randn(24), shared, 32)
        self.c = round_linear(torch.randn(8, 64), None, random_rotation(64, 64, 2, seed=1), 64)
        self.head = nn.Linear(8, 4)


def test_describe_lists_what_differs():
    assert layout.describe(Siblings()) == {
        "quant_method": "paroquant",
        "bits": 4,
        "group_size": 32,
        "krot": 2,
        "modules_to_not_convert": ["head"],
        "group_sizes": {"c": 64},
    }
    mixed = Siblings()
    mixed.c = round_linear(torch.randn(8, 64), None, random_rotation(64, 64, 3, seed=1), 64)
    assert (layout.describe(mixed)["krot"], layout.describe(mixed)["module_krots"]) == (2, {"c": 3})
    assert "group_sizes" not in layout.describe(round_model(nn.Sequential(nn.Linear(64, 8))))


def test_describe_refuses():
    with pytest.raises(CheckpointError, match=r"call parofx.quantize first"):
        layout.describe(nn.Sequential(nn.Linear(64, 8)))
    with pytest.raises(CheckpointError, match="itself a ParoLinear; wrap it"):
        layout.describe(Siblings().a)


def test_exported_tensors_have_memory_of_their_own():
    model = Siblings()
    both = torch.stack([model.a.scales, model.a.scales])
    model.a.scales = both[0]  # a slice of a larger buffer
    state = layout.exported_state_dict(model)
    packed = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed.values()}) == len(packed)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in packed.values())
    assert all(
        torch.equal(tensor, value) for tensor, value in zip(state.values(), model.state_dict().values(), strict=True)
    )


def test_share_rotations_joins_equal_bytes_only():
    model = Siblings()
    for name in ROTATION_NAMES:
        setattr(model.b, name, getattr(model.b, name).clone())
    # -0.0 equals 0.0 in value, not in bytes.
    model.a.theta[0, 0], model.b.theta[0, 0] = 0.0, -0.0
    layout.share_rotations([model.a, model.b, model.c])
    assert model.a.pairs is model.b.pairs
    assert model.a.channel_scales is model.b.channel_scales
    assert model.a.theta is not model.b.theta
    assert model.a.pairs is not model.c.pairs


def test_find_quantized_groups_by_module_and_keeps_what_does_not_belong():
    tensors = {f"x.y.{name}": torch.empty(0) for name in (*TENSOR_NAMES, "weight")} | {"z.scales": torch.empty(0)}
    assert {name: set(found) for name, found in layout.find_quantized(tensors).items()} == {
        "x.y": {*TENSOR_NAMES, "weight"}
    }


def test_find_quantized_refuses():
    with pytest.raises(CheckpointError, match=r"named '<module>.qweight'"):
        layout.find_quantized({"x.weight": torch.empty(0)})
    with pytest.raises(CheckpointError, match=r"named '<module>.qweight'"):
        layout.find_quantized({"qweight": torch.empty(0)})
    fused = {"mlp.experts.0.gate_proj.qweight", "mlp.experts.gate_up_weight_theta", "mlp.experts.down_weight_pairs"}
    with pytest.raises(CheckpointError, match=r"(?s)fused mixture-of-experts.*down_weight_pairs.*gate_up_weight_theta"):
        layout.find_quantized(dict.fromkeys(fused, torch.empty(0)))


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        ({"quant_method": "paroquant", "zero_point": True}, []),
        (
            None,
            [
                "config.json must hold a 'quantization_config' object, got None; "
                "of a float model parofx.quantize and parofx.save_pretrained make a checkpoint"
            ],
        ),
        ({"quant_method": "awq"}, ["quant_method must be 'paroquant', got 'awq'"]),
        ({"quant_method": "paroquant", "bits": 2}, ["bits must be one of (3, 4, 8), got 2"]),
        (
            {"quant_method": "paroquant", "module_bits": 3},
            ["module_bits must map module names to bits, got 3"],
        ),
        (
            {"quant_method": "paroquant", "group_sizes": [1]},
            ["group_sizes must map module names to group sizes, got [1]"],
        ),
    ],
)
def test_why_not_readable(config, reasons):
    assert layout.why_not_readable(config) == reasons


def quantized() -> layout.Quantized:
    return {name: dict(linear.state_dict()) for name, linear in layout.paro_linears(Siblings()).items()}


def test_group_sizes_and_krot_come_from_the_tensors_and_may_not_be_contradicted():
    assert layout.why_not_quantized(quantized(), {"group_size": 32, "krot": 2, "group_sizes": {"c": 64}}) == []
    listed = {"group_size": 32, "krot": 3, "group_sizes": {"c": 64}, "module_krots": {"a": 2, "b": 2, "c": 2}}
    assert layout.why_not_quantized(quantized(), listed) == []
    assert layout.why_not_quantized(quantized(), {}) == []
    assert layout.why_not_quantized(quantized(), {"group_size": 64, "krot": 8, "group_sizes": {"d": 32}}) == [
        "d: in group_sizes, but not quantized",
        "a: quantization_config says group_size 64, the tensors say 32",
        "a: quantization_config says krot 8, the tensors say 2",
        "b: quantization_config says group_size 64, the tensors say 32",
        "b: quantization_config says krot 8, the tensors say 2",
        "c: quantization_config says krot 8, the tensors say 2",
    ]


def test_bits_come_from_the_tensors_and_may_not_be_contradicted():
    wide = dict(ParoLinear(64, 32, group_size=32, krot=2, bias=False, bits=8).state_dict())
    modules = quantized() | {"wide": wide}
    assert layout.why_not_quantized(modules, {"bits": 4, "module_bits": {"wide": 8}}) == []
    assert layout.why_not_quantized({"wide": wide}, {"bits": 8}) == []
    assert layout.why_not_quantized(modules, {"bits": 4, "module_bits": {"a": 3, "d": 8}}) == [
        "d: in module_bits, but not quantized",
        "a: quantization_config says bits 3, the tensors say 4",
        "wide: quantization_config says bits 4, the tensors say 8",
    ]


def test_a_correction_of_another_rank_than_stated_is_named():
    linear = ParoLinear(64, 32, group_size=32, krot=2, bias=False, compensation_rank=3)
    modules = {"more": dict(linear.state_dict())}
    assert layout.why_not_quantized(modules, {"compensation_rank": 3}) == []
    assert layout.why_not_quantized(modules, {"compensation_rank": 9, "module_ranks": {"more": 3}}) == []
    for highest in (2, 4):
        assert layout.why_not_quantized(modules, {"compensation_rank": highest}) == [
            f"more: quantization_config says compensation_rank {highest}, the tensors say 3"
        ]
    lost = {"more": {key: one for key, one in modules["more"].items() if not key.startswith("compensation_")}}
    assert layout.why_not_quantized(lost, {"compensation_rank": 3}) == [
        "more: quantization_config says compensation_rank 3, the tensors say 0"
    ]


def test_a_rank_that_is_none_is_refused():
    for rank in ("2", -1, None):
        problems = layout.why_not_readable({"quant_method": "paroquant", "compensation_rank": rank})
        assert problems == [f"compensation_rank must be an integer of at least 0, got {rank!r}"]


def test_every_contradictory_module_is_named():
    tensors = quantized()
    del tensors["a"]["theta"]
    tensors["b"]["scales"] = tensors["b"]["scales"].float()
    tensors["c"]["qzeros"] = tensors["c"]["qzeros"][:, :0]
    problems = layout.why_not_quantized(tensors, {})
    assert [problem.partition(":")[0] for problem in problems] == ["a", "b.scales", "c"]
    assert "missing ['theta']" in problems[0]
    assert "expected torch.float16" in problems[1]


def test_impossible_values():
    tensors = quantized()
    assert layout.why_not_valid(tensors) == []
    tensors["a"]["theta"] = tensors["a"]["theta"].clone().fill_(float("nan"))
    tensors["b"]["channel_scales"] = tensors["b"]["channel_scales"].clone()
    tensors["b"]["channel_scales"][0, 0] = float("inf")
    tensors["c"]["pairs"] = torch.zeros_like(tensors["c"]["pairs"])
    problems = layout.why_not_valid(tensors)
    assert problems[0].startswith("a.theta: must be finite, got 64 values")
    assert problems[1] == "b.channel_scales: must be finite, got 1 values that are not"
    assert problems[2].startswith("c.pairs: round 0, group 0 must be a permutation of 0..63")
    tensors = quantized()
    tensors["a"]["channel_scales"] = tensors["a"]["channel_scales"].clone()
    tensors["a"]["channel_scales"][0, :3] = 0
    assert layout.why_not_valid(tensors) == ["a.channel_scales: weights are divided by them, got 3 zeros"]


def test_a_shared_module_is_listed_under_each_name():
    linear = Siblings().a
    assert list(layout.paro_linears(nn.ModuleList([linear, linear]))) == ["0", "1"]
    assert isinstance(linear, ParoLinear)
