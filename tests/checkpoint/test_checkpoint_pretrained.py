import copy
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy_writer import dense_weight, forward, random_linear
from rounded import round_model
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file
from torch import nn

from parofx.checkpoint import load_pretrained, pretrained, save_pretrained
from parofx.errors import CheckpointError, ConfigError
from parofx.nn import ParoLinear, tensor_specs

#: fp32 against fp64: a few ulp per term of sums over K = 64 terms.
FP32_TOLERANCE = 1e-5


class Net(nn.Module):
    """A little of everything: siblings, a head tied to the embedding, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.q = nn.Linear(64, 16)
        self.k = nn.Linear(64, 24, bias=False)
        self.out = nn.Linear(40, 64)
        self.head = nn.Linear(64, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("mask", torch.ones(40), persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.out(torch.cat((self.q(x), self.k(x)), -1) * self.mask) + self.counts.sum())

    def get_output_embeddings(self):
        return self.head


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def quantized_net() -> nn.Module:
    return round_model(net(), group_size=lambda name: 8 if name == "out" else 32)


TOKENS = torch.arange(10)[None]


@pytest.fixture
def saved(tmp_path):
    model = quantized_net()
    save_pretrained(model, tmp_path / "model")
    return model, tmp_path / "model"


def edit(folder, change) -> None:
    """Rewrite the checkpoint's tensors by `change(tensors)`."""
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    (folder / "model.safetensors").unlink()  # the tensors above are views of it
    save_torch_file(tensors, folder / "model.safetensors")


def test_round_trip_is_exact(saved):
    model, folder = saved
    skeleton = net(seed=1)
    loaded = load_pretrained(folder, model=skeleton)
    assert loaded is skeleton
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.head.weight is loaded.embed.weight
    assert isinstance(loaded.embed.weight, nn.Parameter)
    assert loaded.q.theta is loaded.k.theta
    assert loaded.q.pairs is loaded.k.pairs
    assert loaded.q.group_size == 32
    assert loaded.out.group_size == 8


def test_files_hold_the_public_layout(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    for name, linear in (("q", model.q), ("k", model.k), ("out", model.out)):
        sizes = (linear.in_features, linear.out_features, linear.group_size, linear.krot)
        for key, (dtype, shape) in tensor_specs(*sizes, bias=linear.bias is not None).items():
            assert (tensors[f"{name}.{key}"].dtype, tuple(tensors.pop(f"{name}.{key}").shape)) == (dtype, shape)
    assert set(tensors) == {"embed.weight", "counts"}
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "quantization_config": {
            "quant_method": "paroquant",
            "bits": 4,
            "group_size": 32,
            "krot": 3,
            "modules_to_not_convert": ["head"],
            "group_sizes": {"out": 8},
        }
    }


def test_other_widths_are_listed_and_round_trip(tmp_path):
    model = round_model(net(), group_size=lambda name: 32 if name != "out" else 8, bits={"q": 4, "k": 8, "out": 3}.get)
    assert [linear.bits for linear in (model.q, model.k, model.out)] == [4, 8, 3]
    halves = {f"compensation_{half}": torch.randn(2, size).half() for half, size in (("down", 64), ("up", 24))}
    model.k = ParoLinear.from_tensors(dict(model.k.state_dict()) | halves)
    save_pretrained(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 4, "plain 4-bit modules stay as any reader expects them"
    assert config["module_bits"] == {"k": 8, "out": 3}
    assert (config["compensation_rank"], config["module_ranks"]) == (2, {"q": 0, "out": 0})
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert [tuple(tensors[f"{name}.qweight"].shape) for name in ("q", "k", "out")] == [(64, 2), (64, 6), (40, 6)]
    loaded = load_pretrained(tmp_path / "model", model=net(seed=1))
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert "bits=3" in repr(loaded.out)
    assert (loaded.k.compensation_rank, loaded.out.compensation_rank) == (2, 0)
    assert loaded.out.packed_bytes() == sum(t.nbytes for t in loaded.out.state_dict().values())


def test_sharded_round_trip(tmp_path):
    model = quantized_net()
    save_pretrained(model, tmp_path / "model", max_shard_size=2000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    loaded = load_pretrained(tmp_path / "model", model=net(seed=1))
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_dtype_casts_all_but_quantization_tensors(saved):
    loaded = load_pretrained(saved[1], model=net(), dtype=torch.bfloat16)
    assert {name: parameter.dtype for name, parameter in loaded.named_parameters()} == {"embed.weight": torch.bfloat16}
    assert loaded.counts.dtype == torch.int64
    specs = tensor_specs(64, 16, 32, 3, bias=True)
    assert {name: t.dtype for name, t in loaded.q.state_dict().items()} == {name: specs[name][0] for name in specs}


def test_a_meta_skeleton_is_filled(saved):
    model, folder = saved
    with torch.device("meta"):
        skeleton = net()
    skeleton.mask = torch.ones(40)
    assert torch.equal(load_pretrained(folder, model=skeleton)(TOKENS), model(TOKENS))


def test_a_quantized_skeleton_is_filled_whatever_its_group_size(saved):
    model, folder = saved
    skeleton = round_model(net(seed=1), group_size=8, krot=2)
    assert torch.equal(load_pretrained(folder, model=skeleton)(TOKENS), model(TOKENS))


def test_shared_modules_stay_shared(tmp_path):
    linear = nn.Linear(32, 32)
    model = round_model(nn.Sequential(linear, nn.ReLU(), nn.Linear(32, 8)), 32)
    shared = nn.ModuleList([model[0], model[0], model[2]])
    save_pretrained(shared, tmp_path / "model")
    fresh = nn.Linear(32, 32)
    loaded = load_pretrained(tmp_path / "model", model=nn.ModuleList([fresh, fresh, nn.Linear(32, 8)]))
    assert loaded[0] is loaded[1]
    x = torch.randn(2, 32)
    assert torch.equal(loaded[1](x), shared[1](x))


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 8, 32]), st.integers(0, 4), st.booleans())
def test_any_sizes_survive(tmp_path_factory, groups, words, group_size, krot, bias):
    folder = tmp_path_factory.mktemp("any") / "model"
    model = nn.Sequential(ParoLinear(groups * group_size, 8 * words, group_size=group_size, krot=krot, bias=bias))
    model[0].qweight.random_(-(2**31), 2**31 - 1)
    save_pretrained(model, folder)
    loaded = load_pretrained(folder, model=nn.Sequential(nn.Linear(groups * group_size, 8 * words, bias=bias)))
    assert repr(loaded[0]) == repr(model[0])
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_checkpoint_of_an_independent_writer(tmp_path):
    rng = np.random.default_rng(0)
    linears = {"0": random_linear(rng, 64, 24, 32, 4, bias=True), "1": random_linear(rng, 24, 8, 6, 4, bias=False)}
    arrays = {f"{name}.{key}": array for name, linear in linears.items() for key, array in linear.items()}
    save_file(arrays, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "paroquant", "bits": 4, "krot": 4, "zero_point": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path, model=nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 8, bias=False)))
    x = rng.normal(size=(5, 64))
    expected = forward(forward(x, linears["0"]), linears["1"])
    np.testing.assert_allclose(model.double()(torch.from_numpy(x)).numpy(), expected, rtol=1e-12, atol=1e-12)
    got = model.float()(torch.from_numpy(x).float()).numpy()
    assert np.linalg.norm(got - expected) < FP32_TOLERANCE * np.linalg.norm(expected)
    np.testing.assert_allclose(
        model[0].dequantized_weight(torch.float64).numpy(), dense_weight(linears["0"]), atol=1e-9
    )


def test_one_error_lists_every_key(saved):
    _, folder = saved

    def change(tensors):
        del tensors["counts"], tensors["q.theta"]
        tensors["extra"] = torch.zeros(1)
        tensors["embed.weight"] = torch.zeros(9, 64)
        tensors["k.pairs"] = tensors["k.pairs"].int()

    edit(folder, change)
    skeleton = net(seed=1)
    before = copy.deepcopy(skeleton.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder, model=skeleton)
    for line in (
        r"q: expected .*missing \['theta'\]",
        r"k.pairs: expected torch.int16 .*got torch.int32",
        "counts: missing",
        "extra: unexpected",
        r"embed.weight: expected \(10, 64\), got \(9, 64\)",
    ):
        assert re.search(f"  - {line}", str(caught.value)), str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in skeleton.state_dict().items())


def test_modules_that_do_not_fit(saved):
    _, folder = saved
    skeleton = net()
    skeleton.q = nn.Linear(64, 32)
    skeleton.k = nn.Linear(64, 24)
    skeleton.out = nn.LayerNorm(64)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder, model=skeleton)
    assert "q: the checkpoint has 64 → 16 features, the model 64 → 32" in str(caught.value)
    assert "k.bias: the model has one, the checkpoint none" in str(caught.value)
    assert "out: quantized in the checkpoint, but the model has a LayerNorm there" in str(caught.value)
    del skeleton.k
    with pytest.raises(CheckpointError, match="k: quantized in the checkpoint, but the model has no such module"):
        load_pretrained(folder, model=skeleton)


def test_a_missing_bias(saved):
    _, folder = saved
    skeleton = net()
    skeleton.q = nn.Linear(64, 16, bias=False)
    with pytest.raises(CheckpointError, match=r"q.bias: the checkpoint has one, the model none"):
        load_pretrained(folder, model=skeleton)


def test_a_skeleton_whose_buffers_hold_nothing(saved):
    with torch.device("meta"):
        skeleton = net()
    with pytest.raises(CheckpointError, match="mask: a buffer that no checkpoint holds, on the meta device"):
        load_pretrained(saved[1], model=skeleton)


def test_impossible_values_leave_the_skeleton_alone(saved):
    _, folder = saved
    edit(folder, lambda tensors: tensors["out.scales"].fill_(float("inf")))
    skeleton = net(seed=1)
    with pytest.raises(CheckpointError, match=r"out.scales: must be finite"):
        load_pretrained(folder, model=skeleton)
    assert isinstance(skeleton.q, nn.Linear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'paroquant', got 'gptq'"),
        ({"group_size": 64}, "q: quantization_config says group_size 64, the tensors say 32"),
        ({"krot": 8}, "out: quantization_config says krot 8, the tensors say 3"),
    ],
)
def test_a_contradictory_configuration(saved, change, message):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder, model=net())


def test_a_module_checkpoint_needs_a_skeleton(saved):
    with pytest.raises(CheckpointError, match="pass the module to fill as model="):
        load_pretrained(saved[1])


def test_save_refuses_a_folder_in_use_unless_told(saved):
    model, folder = saved
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save_pretrained(model, folder)
    save_pretrained(model, folder, overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_checkpoint_can_be_saved_over_itself(saved):
    model, folder = saved
    save_pretrained(load_pretrained(folder, model=net()), folder, overwrite=True)
    assert torch.equal(load_pretrained(folder, model=net())(TOKENS), model(TOKENS))


def test_save_refuses_what_holds_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="holds ParoLinear modules, got none"):
        save_pretrained(net(), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"(?s)meta device hold nothing to save.*embed.weight"):
        save_pretrained(quantized_net().to("meta"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(28, "No space left on device"), pytest.raises(OSError, match="No space left on device")),
        (SafetensorError("IoError: no space"), pytest.raises(CheckpointError, match="could not be written to")),
    ],
)
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, raised, expected):
    def full(state, folder, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise raised

    monkeypatch.setattr(pretrained, "save_torch_state_dict", full)
    with expected:
        save_pretrained(quantized_net(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_is_saved_beside(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_pretrained(quantized_net(), tmp_path / "model", tokenizer=Tokenizer())
    assert (tmp_path / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, r"dtype must be one of torch\.float16, .*, got torch\.int8"),
        ({"device": "gpu"}, "device must be one that PyTorch knows, such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"device": "cuda:99"}, "device must be present, got 'cuda:99'"),
        ({"model": "net"}, "model must be a torch.nn.Module to fill, got str"),
    ],
)
def test_wrong_options_of_loading_are_refused(saved, options, message):
    _, folder = saved
    with pytest.raises(ConfigError, match=message):
        load_pretrained(folder, **{"model": Net()} | options)


def test_a_dtype_may_be_given_by_its_name(saved):
    _, folder = saved
    assert load_pretrained(folder, model=Net(), dtype="bfloat16").embed.weight.dtype == torch.bfloat16


def test_a_float_tensor_that_holds_integers_is_refused(saved):
    _, folder = saved
    edit(folder, lambda tensors: tensors.update({"embed.weight": torch.ones(10, 64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"embed\.weight: expected floating-point numbers, got torch\.int8"):
        load_pretrained(folder, model=Net())


@pytest.mark.parametrize("size", ["5XB", "GB", "", "-1GB", "0GB", "0.0001KB", "٥GB", 0, -5, True, 1.5, None])
def test_a_shard_size_that_is_none_is_refused(saved, tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size must be a number of bytes"):
        save_pretrained(saved[0], tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_saved_is_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer must have save_pretrained.*'name'"):
        save_pretrained(saved[0], tmp_path / "out", tokenizer="name")
    assert not (tmp_path / "out").exists()
