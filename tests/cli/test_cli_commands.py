"""The commands on a tiny model: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Files, Run

import parofx
import parofx.cpu_ops
from parofx.cli.common import size
from parofx.cli.inspect import _natural, summarize
from parofx.evaluation import reference_head


def test_quantize_saves_a_checkpoint_and_its_report(files: Files) -> None:
    config = json.loads((files.paro / "config.json").read_text())["quantization_config"]
    assert (config["group_size"], config["krot"]) == (32, 8)
    report = json.loads((files.paro / "parofx_report.json").read_text())
    assert report["config"]["calibration"]["steps"] == 3
    assert len(report["linears"]) == 14
    assert (files.paro / "tokenizer.json").is_file()


def test_quantize_says_what_it_did(files: Files, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--recipe", "data-free", "--steps", 1, "--krot", 0, "--modules-to-not-convert", "model.layers.0.mlp.*")
    status, output, _ = run("quantize", files.float_model, "-o", out, *options)
    assert status == 0
    assert "quantized 11 linears" in output
    assert "excluded by modules_to_not_convert" in output
    assert "parofx inspect" in output
    assert not [name for name in parofx_names(out) if name.startswith("model.layers.0.mlp")]


def test_quantize_reads_several_sources_in_turn(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "why the sea ?"}]}))
    sources = ("--calibration", files.text, "--calibration", tmp_path / "chat.jsonl")
    limits = ("--samples", 2, "--seqlen", 8, "--steps", 1)
    status, output, _ = run("quantize", files.float_model, "-o", tmp_path / "out", *sources, *limits)
    assert status == 0, output


def test_quantize_keeps_what_the_folder_holds(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    status, output, _ = run("quantize", files.float_model, "-o", tmp_path)
    assert status == 2
    assert "pass --overwrite" in output
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_quantize_can_say_what_it_would_do(files: Files, run: Run, tmp_path: Path) -> None:
    options = ("--samples", 4, "--seqlen", 16, "--steps", 3, "--group-size", 32, "--calibration", files.text)
    plan = run("quantize", files.float_model, "-o", tmp_path / "out", *options, "--dry-run")
    assert plan.status == 0, plan.output
    report = json.loads((files.paro / "parofx_report.json").read_text())
    printed = " ".join(plan.printed.split())
    assert f"14 linears with {len(report['transforms'])} transforms in 2 blocks" in printed
    assert "4 sequences, 64 tokens" in printed
    assert f"{report['bits_per_weight']:.3f} bits per quantized weight" in printed
    for label in ("memory", "work folder", "time about", "1 output head"):
        assert label in printed
    assert not list(tmp_path.iterdir())


def test_quantize_reads_a_configuration_file(files: Files, run: Run, tmp_path: Path) -> None:
    config = parofx.ParoConfig(krot=2, group_size=64, calibration=parofx.CalibrationConfig(steps=1))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    out = tmp_path / "out"
    given = ("--config", tmp_path / "config.json", "--group-size", 32)
    status, output, _ = run("quantize", files.float_model, "-o", out, *given)
    assert status == 0, output
    layer = summarize(out).layers[0]
    assert (layer.krot, layer.group_size) == (2, 32)


def test_eval_compares_with_the_float_model(files: Files, run: Run, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = ("--text", files.text, "--seqlen", 16, "--windows", 6, "--reference", files.float_model)
    status, output, _ = run("eval", files.paro, *options, "--json", result)
    assert status == 0, output
    found = json.loads(result.read_text())
    assert (found["windows"], found["tokens"]) == (6, 90)
    assert 0 < found["kl_mean"] < 0.1
    assert found["top1_agreement"] > 0.5
    for label in ("perplexity", "KL divergence", "99th percentile", "top-1"):
        assert label in output


def test_layers_are_listed_in_the_order_people_count() -> None:
    stored = ["layers.10.down", "layers.10.up", "layers.2.down", "layers.2.up", "norm"]
    assert sorted(stored, key=_natural) == [*stored[2:4], *stored[:2], "norm"]


def test_a_stopped_run_says_how_to_go_on(
    files: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parofx, "quantize", stop)
    for options, expected in (((), "--work-dir"), (("--work-dir", tmp_path / "run"), "give the same command again")):
        status, output, _ = run("quantize", files.float_model, "-o", tmp_path / "out", "--steps", 1, *options)
        assert status == 130
        assert expected in " ".join(output.split())
    assert not (tmp_path / "out").exists()


def test_eval_tells_what_a_quantized_head_costs(files: Files, run: Run, tmp_path: Path) -> None:
    float_model = tiny.save(tmp_path / "float", vocab_size=24)  # 8 divides it, as kernels want
    quantize = ("--recipe", "data-free", "--steps", 1, "--group-size", 32, "--lm-head", 4)
    assert run("quantize", float_model, "-o", tmp_path / "paro", *quantize).status == 0
    options = ("--text", files.text, "--seqlen", 16, "--windows", 6, "--reference", float_model)
    status, output, _ = run("eval", tmp_path / "paro", *options, "--json", tmp_path / "result.json")
    assert status == 0, output
    found = json.loads((tmp_path / "result.json").read_text())
    # Of this model's 15 linears the head is the one right before the logits.
    assert 0 < found["kl_mean_float_head"] < found["kl_mean"]
    assert "KL with a float output head" in output
    model = parofx.load_pretrained(tmp_path / "paro")
    head = model.lm_head
    with reference_head(model, tiny.model(vocab_size=24)) as quantized:
        assert quantized
        assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.lm_head is head
    with reference_head(model.bfloat16(), tiny.model(vocab_size=24)) as quantized:
        assert quantized
        assert model.lm_head.weight.dtype == torch.bfloat16
    for other in (tiny.model(vocab_size=32), tiny.model(vocab_size=24, hidden_size=128)):
        with reference_head(model, other) as quantized:
            assert not quantized


@pytest.mark.slow
def test_eval_compiles(files: Files, run: Run, tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = ("--text", files.text, "--seqlen", 16, "--windows", 2)
    perplexities = []
    for flag in ("--compile", "--no-compile"):
        assert run("eval", files.paro, *options, flag, "--json", tmp_path / "result.json").status == 0
        perplexities.append(json.loads((tmp_path / "result.json").read_text())["perplexity"])
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)


def test_eval_without_a_reference_measures_perplexity_alone(files: Files, run: Run) -> None:
    status, output, _ = run("eval", files.float_model, "--text", files.text, "--seqlen", 16, "--windows", 1)
    assert status == 0, output
    assert "perplexity" in output
    assert "KL" not in output


def test_eval_scores_tasks(files: Files, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": "the", "choices": [" sea", " ?"], "answer": 0}] * 3
    (tmp_path / "sea.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sea",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "sea.jsonl")}, "cache_dir": str(tmp_path / "cache")
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "sea.yaml").write_text(json.dumps(task))
    options = ("--task", "sea", "--include-path", tmp_path, "--limit", 2, "--reference", files.float_model)
    status, output, printed = run("eval", files.paro, *options, "--json", tmp_path / "result.json")
    assert status == 0, output
    (found,) = json.loads((tmp_path / "result.json").read_text())["tasks"]
    assert (found["task"], found["metric"], found["samples"]) == ("sea", "acc", 2)
    assert 0 <= found["value"] <= 1
    assert 0 <= found["reference"] <= 1
    assert "reference" in printed
    status, output, _ = run("eval", "./missing", "--task", "lake", "--include-path", tmp_path)
    assert status == 2
    assert "names that lm-eval knows, got ['lake']" in " ".join(output.split())


def test_generate_continues_each_prompt(files: Files, run: Run) -> None:
    options = ("-p", "why the sea ?", "-p", "ships", "--no-compile", "--max-new-tokens", 5, "--no-chat")
    status, output, _ = run("generate", files.paro, *options)
    assert status == 0, output
    model, tokenizer = parofx.load_pretrained(files.paro), tiny.tokenizer()
    inputs = tokenizer("ships", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(tokens[0, 1:], skip_special_tokens=True).strip() in output


def test_generate_samples_reproducibly_through_the_chat_template(files: Files, run: Run) -> None:
    options = ("-p", "why ?", "--no-compile", "--max-new-tokens", 8, "--temperature", 1.5)
    first, again, other = (run("generate", files.paro, *options, "--seed", seed).printed for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.slow
def test_generate_compiles(files: Files, run: Run) -> None:
    torch._dynamo.reset()
    options = ("-p", "ships sail on", "--max-new-tokens", 6)
    compiled, eager = (run("generate", files.paro, *options, flag) for flag in ("--compile", "--no-compile"))
    assert compiled.status == 0, compiled.output
    assert compiled.printed == eager.printed


def test_inspect_lists_layers_with_errors_and_sizes(files: Files, run: Run, tmp_path: Path) -> None:
    status, output, _ = run("inspect", files.paro, "--sort", "error", "--json", tmp_path / "layers.json")
    assert status == 0, output
    found = json.loads((tmp_path / "layers.json").read_text())
    model = parofx.load_pretrained(files.paro)
    expected = {name: module for name, module in model.named_modules() if isinstance(module, parofx.ParoLinear)}
    assert {layer["name"] for layer in found["layers"]} == set(expected)
    for layer in found["layers"]:
        module = expected[layer["name"]]
        assert layer["name"] in output
        assert (layer["out_features"], layer["in_features"]) == (module.out_features, module.in_features)
        assert (layer["bits"], layer["group_size"], layer["krot"]) == (4, 32, 8)
        assert layer["bytes"] == module.packed_bytes()
        assert layer["relative_error"] > 0
    assert "14 quantized layers" in output
    on_disk = sum(file.stat().st_size for file in files.paro.glob("*.safetensors"))
    assert found["quantized_bytes"] + found["float_bytes"] == pytest.approx(on_disk, rel=0.2)


def test_inspect_orders_by_size_and_lives_without_a_report(files: Files, run: Run, tmp_path: Path) -> None:
    for file in files.paro.iterdir():
        if file.name != "parofx_report.json":
            (tmp_path / file.name).symlink_to(file)
    status, output, _ = run("inspect", tmp_path, "--sort", "size")
    assert status == 0, output
    assert output.index("gate_proj") < output.index("k_proj")
    assert "–" in output


def test_inspect_shows_what_training_did_and_draws_the_report(files: Files, run: Run, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    for file in files.paro.iterdir():
        (trained / file.name).symlink_to(file)
    report = json.loads((trained / "parofx_report.json").read_text())
    stages = [{"name": "weights", "before": 0.5, "after": 0.25, "kept": "epoch 1 of 2"}]
    (trained / "parofx_report.json").unlink()
    (trained / "parofx_report.json").write_text(json.dumps(report | {"blocks": [{"name": "one", "stages": stages}]}))
    status, output, _ = run("inspect", trained, "--page", tmp_path / "report.html")
    assert status == 0, output
    assert "×0.500" in output
    assert "2.50e-01" in output
    page = (tmp_path / "report.html").read_text()
    assert all(linear["name"] in page for linear in report["linears"])
    (trained / "parofx_report.json").unlink()
    refused = run("inspect", trained, "--page", tmp_path / "none.html")
    assert refused.status == 2
    assert "holds no parofx_report.json" in " ".join(refused.output.split())
    assert not (tmp_path / "none.html").exists()


def test_explain_names_every_linear_and_its_fate(files: Files, run: Run, tmp_path: Path) -> None:
    status, output, _ = run("explain", files.float_model, "--json", tmp_path / "rows.json")
    assert status == 0, output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 15
    assert [row["name"] for row in rows if row["action"] == "keep float"] == ["lm_head"]
    assert all(row["name"] in output for row in rows)
    assert "model.layers" not in run("explain", files.float_model, "--grep", "lm_head").output


def test_explain_takes_the_options_of_quantize(files: Files, run: Run) -> None:
    status, output, _ = run("explain", files.float_model, "--modules-to-not-convert", "model.layers.0.*")
    assert status == 0, output
    assert "modules_to_not_convert" in output


def test_explain_of_a_checkpoint_names_calls_and_providers(files: Files, run: Run, tmp_path: Path) -> None:
    status, output, _ = run("explain", files.paro, "--json", tmp_path / "rows.json")
    assert status == 0, output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows if row["action"] == "keep float"] == ["lm_head"]
    quantized = [row["reason"] for row in rows if row["action"] == "quantized"]
    assert len(quantized) == 14
    assert all(reason.startswith("4 bit; group_size 32; krot 8; ") for reason in quantized)
    assert all("lowered to " in reason for reason in quantized)
    assert sum("v_proj with 1 rotation(s)" in reason for reason in quantized) == 6


def test_passes_lists_the_registry(run: Run) -> None:
    import parofx.passes

    status, output, _ = run("passes")
    assert status == 0
    assert all(cls.name in output for cls in parofx.passes.registry())
    assert "CALIBRATED → CONVERTED" in run("passes", "convert").output
    assert "normalize: no stage | FLOAT | CONVERTED → FLOAT | CONVERTED" in run("passes", "normalize").output


def test_doctor_tells_versions_and_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parofx.cpu_ops, "describe", lambda: {"isa": "avx9", "flags": ["-O9", "-g"], "none": []})
    status, output, _ = run("doctor")
    assert status == 0
    for expected in (torch.__version__, parofx.__version__, "reference", "CPU kernels: isa", "avx9", "-O9, -g"):
        assert expected in output


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (2**41, "2048.00 GiB")]
)
def test_sizes_are_readable(count: float, text: str) -> None:
    assert size(count) == text


def parofx_names(folder: Path) -> list[str]:
    return [layer.name for layer in summarize(folder).layers]
