import copy
import json
import re

import numpy as np
import pytest
import torch
import transformers
from numpy_writer import dense_weight, random_linear
from rounded import round_model
from safetensors.numpy import save_file as save_numpy_file
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlavaConfig
from transformers.pytorch_utils import Conv1D
from zoo import LLAMA_LIKE, ZOO, tokens

import parofx
from parofx.checkpoint import layout, load_pretrained, save_pretrained
from parofx.errors import CheckpointError, ConfigError
from parofx.integrations.transformers import ParoHfQuantizer, ParoQuantizationConfig, mark_quantized
from parofx.nn import ParoLinear, tensor_specs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Relative error of two layers' logits against fp64; activations carry 24, 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


def rounded(name: str, group_size=32) -> nn.Module:
    return round_model(ZOO[name].build(), group_size)


def inputs(name: str) -> dict[str, torch.Tensor]:
    batch = ZOO[name].inputs()
    return batch | {"decoder_input_ids": batch["input_ids"]} if name == "t5" else batch


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return model(**batch)[0]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def llama(tmp_path):
    model = rounded("llama", lambda name: 64 if "down_proj" in name else 32)
    save_pretrained(model, tmp_path / "model")
    return model, tmp_path / "model"


def edit(folder, change) -> None:
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    (folder / "model.safetensors").unlink()  # the tensors above are views of it
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_survives(tmp_path, name):
    model, batch = rounded(name), inputs(name)
    expected = outputs(model, batch)
    save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / writer / "model.safetensors") for writer in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())

    strict = load_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(strict, batch), expected)
    assert not strict.training
    rotations = {id(linear.theta) for linear in layout.paro_linears(model).values()}
    assert len({id(linear.theta) for linear in layout.paro_linears(strict).values()}) == len(rotations)

    loaded = type(model).from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert relative_error(outputs(loaded, batch), expected) < TOLERANCE[torch.bfloat16]
    assert list(layout.paro_linears(loaded)) == list(layout.paro_linears(model))


@pytest.mark.parametrize(("tied", "bits", "head"), [(False, 3, 4), (True, 4, 8)])
def test_a_quantized_output_head_leaves_the_embedding_table_alone(tmp_path, tied, bits, head):
    config = transformers.LlamaConfig(**LLAMA_LIKE, vocab_size=256, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = inputs("llama")
    table = model.get_input_embeddings().weight.detach().clone()
    calibration = parofx.CalibrationConfig(recipe="data-free", steps=1)
    report = parofx.quantize(model, parofx.ParoConfig(bits=bits, lm_head=head, calibration=calibration), progress=False)
    assert isinstance(model.get_output_embeddings(), ParoLinear)
    assert {linear.bits for linear in report.linears if linear.name != "lm_head"} == {bits}
    assert [linear.bits for linear in report.linears if linear.name == "lm_head"] == [head]
    assert report.kept_float == ()
    assert torch.equal(model.get_input_embeddings().weight, table)
    expected = outputs(model, batch)
    save_pretrained(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["quantization_config"]["bits"] == bits
    assert written["quantization_config"]["module_bits"] == {"lm_head": head}
    for load in (load_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        assert torch.equal(outputs(loaded, batch), expected)
        assert torch.equal(loaded.get_input_embeddings().weight, table)
    with torch.no_grad():
        compiled = torch.compile(model, backend="paro", options={"provider": "reference"})
        assert relative_error(compiled(**batch)[0], expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_against_fp64(llama, dtype):
    model, folder = llama
    expected = outputs(copy.deepcopy(model).to(torch.float64), inputs("llama"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert relative_error(outputs(loaded, inputs("llama")), expected) < TOLERANCE[dtype]
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for linear in layout.paro_linears(loaded).values():
        specs = tensor_specs(linear.in_features, linear.out_features, linear.group_size, linear.krot, bias=False)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in linear.state_dict().items()} == specs


def test_modules_kept_in_fp32_leave_quantization_tensors_alone(tmp_path):
    save_pretrained(rounded("t5"), tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model", dtype=torch.float16)
    assert "wo" in type(loaded)._keep_in_fp32_modules
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.scales.dtype == torch.float16


def test_a_checkpoint_of_an_independent_writer(tmp_path):
    """Codes, rotations and files by NumPy; the reference is the float architecture in fp64 with NumPy's weights."""
    reference = ZOO["llama"].build().double()
    rng = np.random.default_rng(0)
    arrays = {}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            linear = random_linear(rng, module.in_features, module.out_features, 64, 5, bias=False)
            arrays |= {f"{name}.{key}": array for key, array in linear.items()}
            module.weight.data = torch.from_numpy(dense_weight(linear))
    for key, tensor in reference.state_dict().items():
        if f"{key.removesuffix('.weight')}.qweight" not in arrays:
            arrays[key] = tensor.float().numpy()
    save_numpy_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = reference.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["quantization_config"] = {"quant_method": "paroquant", "bits": 4, "group_size": 64, "krot": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()}, strict=False)

    expected = outputs(reference, inputs("llama"))
    for load in (load_pretrained, AutoModelForCausalLM.from_pretrained):
        assert relative_error(outputs(load(tmp_path), inputs("llama")), expected) < TOLERANCE[torch.float32]


def test_mixed_group_sizes_are_listed_and_honoured(llama):
    _, folder = llama
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    down_projs = {f"model.layers.{index}.mlp.down_proj": 64 for index in range(2)}
    assert (config["group_size"], config["group_sizes"]) == (32, down_projs)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: linear.group_size for name, linear in layout.paro_linears(loaded).items()}
    assert {name: size for name, size in found.items() if size == 64} == down_projs
    assert set(found.values()) == {32, 64}


def test_sharded_by_both_writers(tmp_path):
    model = rounded("qwen3")
    save_pretrained(model, tmp_path / "ours", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        assert torch.equal(outputs(load_pretrained(folder), inputs("qwen3")), outputs(model, inputs("qwen3")))
    next(iter((tmp_path / "theirs").glob("model-*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match=r"model-0000\d.* is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")


def test_renamed_keys_and_composite_models(tmp_path):
    """LLaVA's checkpoint keys are not its module names; a group size of its own must follow the renaming."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = ZOO["llama"].build().config
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    round_model(model, lambda name: 64 if name.endswith("down_proj") else 32)
    save_pretrained(model, tmp_path / "model")
    assert "language_model.model.layers.0.mlp.down_proj.qweight" in load_file(tmp_path / "model" / "model.safetensors")
    batch = {"input_ids": tokens()}
    for loaded in (load_pretrained(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model")):
        assert torch.equal(outputs(loaded, batch), outputs(model, batch))
        assert loaded.model.language_model.layers[0].mlp.down_proj.group_size == 64


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_other_auto_classes_load_what_they_have(llama, auto):
    model, folder = llama
    loaded = auto.from_pretrained(folder)
    backbone = loaded if auto is AutoModel else loaded.model
    batch = inputs("llama")
    assert torch.equal(outputs(backbone, batch), outputs(model.model, batch))


def test_generation_configuration_tokenizer_and_chat_template_are_saved(tmp_path):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{{ messages }}"
    model = rounded("llama")
    model.generation_config.max_new_tokens = 7
    save_pretrained(model, tmp_path / "model", tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == "{{ messages }}"
    assert load_pretrained(tmp_path / "model").generation_config.max_new_tokens == 7


def test_generate_equals_the_saved_model(llama):
    model, folder = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens(), **options), model.generate(tokens(), **options))


def test_what_the_quantizer_says_of_itself(llama):
    loaded = AutoModelForCausalLM.from_pretrained(llama[1])
    quantizer = loaded.hf_quantizer
    assert isinstance(quantizer, ParoHfQuantizer)
    assert (quantizer.is_compileable, quantizer.is_serializable(), quantizer.is_trainable) == (True, True, False)
    assert not quantizer.is_qat_trainable
    assert loaded.is_quantized
    assert isinstance(loaded.config.quantization_config, ParoQuantizationConfig)


def test_a_loaded_model_compiles_in_one_graph(llama):
    loaded = AutoModelForCausalLM.from_pretrained(llama[1])
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    assert torch.equal(outputs(compiled, inputs("llama")), outputs(loaded, inputs("llama")))


def test_casts_keep_siblings_tied(llama):
    loaded = AutoModelForCausalLM.from_pretrained(llama[1]).to(torch.bfloat16)
    mlp = loaded.model.layers[0].mlp
    assert mlp.gate_proj.theta is mlp.up_proj.theta
    assert mlp.gate_proj.theta.dtype == torch.float16
    assert copy.deepcopy(loaded).dtype == torch.bfloat16


def test_mark_quantized_is_what_from_pretrained_leaves(llama):
    _, folder = llama
    marked = rounded("llama", lambda name: 64 if "down_proj" in name else 32)
    mark_quantized(marked)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for attribute in ("is_quantized", "quantization_method"):
        assert getattr(marked, attribute) == getattr(loaded, attribute)
    assert marked.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert marked.config._is_quantized
    assert loaded.config._is_quantized
    with pytest.raises(CheckpointError, match=r"call parofx.quantize first"):
        mark_quantized(ZOO["llama"].build())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dequantize_gives_a_model_that_transformers_loads(tmp_path, name):
    model = rounded(name)
    expected = outputs(model, inputs(name))
    mark_quantized(model)
    floating = model.dequantize()
    assert not layout.paro_linears(floating)
    assert relative_error(outputs(floating, inputs(name)), expected) < TOLERANCE[torch.float32]
    assert not hasattr(floating.config, "quantization_config")
    assert not hasattr(floating.config, "_is_quantized")
    assert not floating.is_quantized
    kinds = {type(module) for module in floating.modules() if isinstance(module, (Conv1D, nn.Linear))}
    assert kinds == ({Conv1D, nn.Linear} if name == "gpt2" else {nn.Linear})
    floating.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(reloaded, inputs(name)), outputs(floating, inputs(name)))


def test_dequantize_of_a_model_made_by_hand():
    model = rounded("gpt2")
    expected = outputs(model, inputs("gpt2"))
    floating = parofx.dequantize(model, dtype=torch.float64)
    assert isinstance(floating.transformer.h[0].mlp.c_fc, Conv1D)
    assert floating.transformer.h[0].mlp.c_fc.weight.dtype == torch.float64
    assert relative_error(outputs(floating.double(), inputs("gpt2")), expected) < TOLERANCE[torch.float32]


def test_one_error_lists_every_key(llama):
    _, folder = llama

    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.theta"]
        tensors["extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(3, 128)

    edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    for line in (
        r"model.layers.0.mlp.up_proj: expected .*missing \['theta'\]",
        "model.norm.weight: missing",
        "extra: unexpected",
        r"lm_head.weight: expected \(250, 128\), got \(3, 128\)",
    ):
        assert re.search(f"  - {line}", str(caught.value)), str(caught.value)
    with pytest.raises(CheckpointError, match=r"missing \['theta'\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_keys_that_transformers_converts_are_checked_after_loading(tmp_path):
    save_pretrained(rounded("mixtral"), tmp_path / "model")
    edit(tmp_path / "model", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit MixtralForCausalLM.*missing_keys: model.norm.weight"):
        load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("load", [load_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.qweight"), r"up_proj: expected .*missing \['qweight'\]"),
        (lambda t: t["model.layers.0.mlp.up_proj.pairs"].zero_(), r"up_proj.pairs: .*must be a permutation"),
        (lambda t: t["model.layers.0.mlp.up_proj.theta"].fill_(float("nan")), r"up_proj.theta: must be finite"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(256).half()}),
            "up_proj.bias: the checkpoint has one, the model none",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.scales": t["model.layers.0.mlp.up_proj.scales"].float()}),
            r"up_proj.scales: expected torch.float16 .*got torch.float32",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.gate_up_weight_theta": torch.zeros(1)}),
            "fused mixture-of-experts weights are not supported",
        ),
    ],
    ids=["missing", "pairs", "nan", "bias", "dtype", "experts"],
)
def test_broken_quantized_tensors(llama, load, change, message):
    edit(llama[1], change)
    with pytest.raises(CheckpointError, match=message):
        load(llama[1])


def test_a_truncated_file(llama):
    file = llama[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(llama[1])


def rewrite_config(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_contradictory_group_size(llama):
    rewrite_config(llama[1], lambda config: config["quantization_config"].pop("group_sizes"))
    with pytest.raises(CheckpointError, match="down_proj: quantization_config says group_size 32, the tensors say 64"):
        AutoModelForCausalLM.from_pretrained(llama[1])


def test_an_unknown_architecture(llama):
    rewrite_config(llama[1], lambda config: config.update(architectures=["NoSuchModel"]))
    with pytest.raises(CheckpointError, match="has no architecture 'NoSuchModel'"):
        load_pretrained(llama[1])


def test_a_checkpoint_of_another_model(llama):
    rewrite_config(llama[1], lambda config: config.update(intermediate_size=512))
    with pytest.raises(CheckpointError, match="up_proj: the checkpoint has 128 → 256 features, the model 128 → 512"):
        AutoModelForCausalLM.from_pretrained(llama[1])


def test_linears_that_the_architecture_merges():
    model = ZOO["mixtral"].build()
    mark = ParoHfQuantizer(ParoQuantizationConfig())
    from parofx.integrations.transformers import keys

    linear = dict(rounded("llama").model.layers[0].mlp.up_proj.state_dict())
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1" for expert in range(2)]
    found = {f"{name}.{key}": tensor for name in names for key, tensor in linear.items()}
    _, problems = keys.match(model, found, mark.quantization_config.to_dict())
    assert problems == ["transformers merges linears of this architecture that the checkpoint has apart"]


def test_configuration_keeps_what_other_writers_add():
    options = {"quant_method": "paroquant", "bits": 4, "group_size": 128, "krot": 8, "zero_point": True}
    assert ParoQuantizationConfig.from_dict(options).to_dict() == options
    with pytest.raises(ConfigError, match=r"bits must be one of \(3, 4, 8\), got 5"):
        ParoQuantizationConfig(bits=5)


def test_quantizing_while_loading_is_refused(tmp_path):
    ZOO["llama"].build().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"then parofx.quantize\(model\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ParoQuantizationConfig())


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(rounded("llama"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_rotation(tmp_path):
    model = round_model(ZOO["llama"].build(), 32, krot=0)
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert torch.equal(outputs(loaded, inputs("llama")), outputs(model, inputs("llama")))
    assert isinstance(loaded.model.layers[0].mlp.up_proj, ParoLinear)
