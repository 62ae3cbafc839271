"""The real harness on tasks of local files: scores are those that the logits give."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch

import parofx
from parofx.errors import ConfigError, DataError

lm_eval = pytest.importorskip("lm_eval")

from parofx.integrations.lm_eval import ParoLM, TaskScore, find_tasks, run_tasks  # noqa: E402  (needs lm-eval)

QUESTIONS = [
    {"question": "why the", "choices": [" sea", " ships ?", " the"], "answer": 0},
    {"question": "the sea", "choices": [" ?", " why the sea", " ships"], "answer": 1},
    {"question": "ships", "choices": [" why", " the sea ?", " sea"], "answer": 2},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tasks `sea`, questions with choices, and `harbour`, whose data does not exist."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "sea.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, data in (("sea", "sea.jsonl"), ("harbour", "nowhere.jsonl")):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def accuracy(model: torch.nn.Module) -> float:
    """Return the share of questions whose answer has the largest log-likelihood."""
    tokenizer, right = tiny.tokenizer(), 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"], add_special_tokens=False).input_ids
            whole = tokenizer(row["question"] + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logits[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    return right / len(QUESTIONS)


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_those_of_the_logits(tasks: Path, seed: int) -> None:
    model = tiny.model(seed)
    (score,) = run_tasks(model, tiny.tokenizer(), ["sea"], include=[tasks])
    assert score == TaskScore("sea", "acc", pytest.approx(accuracy(model)), score.error, samples=3)
    assert score.error is not None
    assert 0 <= score.error < 1


@pytest.mark.slow
def test_a_quantized_model_is_scored_compiled(tasks: Path) -> None:
    torch._dynamo.reset()
    model = tiny.model()
    parofx.quantize(model, parofx.ParoConfig(group_size=32), progress=False)
    expected = accuracy(model)
    (score,) = run_tasks(model, tiny.tokenizer(), ["sea"], include=[tasks], compile=True, batch_size=4)
    assert score.value == pytest.approx(expected)


def test_lm_eval_knows_the_model_by_name(tasks: Path, tmp_path: Path) -> None:
    """A checkpoint's folder is all that lm-eval needs, and `limit` is its own."""
    model = tiny.model()
    parofx.quantize(model, parofx.ParoConfig(group_size=32), progress=False)
    parofx.save_pretrained(model, tmp_path / "paro", tokenizer=tiny.tokenizer())
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"tasks": ["sea"], "task_manager": manager, "limit": 2, "bootstrap_iters": 10}
    found = lm_eval.simple_evaluate("paro", {"pretrained": str(tmp_path / "paro")}, **options)
    assert found["n-samples"]["sea"]["effective"] == 2


def test_what_cannot_be_run_is_said(tasks: Path) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with pytest.raises(ConfigError, match=r"names that lm-eval knows, got \['lake'\]"):
        run_tasks(model, tokenizer, ["sea", "lake"], include=[tasks])
    with pytest.raises(ConfigError, match="got none"):
        run_tasks(model, tokenizer, [], include=[tasks])
    with pytest.raises(DataError, match="lm-eval could not load harbour"):
        run_tasks(model, tokenizer, ["harbour"], include=[tasks])
    with pytest.raises(DataError, match="has no tokenizer"):
        ParoLM(model)
    with pytest.raises(DataError, match="has no tokenizer"):
        run_tasks(model, None, ["sea"], include=[tasks])
    with pytest.raises(ConfigError, match=r"got \['peft', 'subfolder'\], accepted are revision"):
        ParoLM(model, tokenizer, peft="adapter", subfolder="x")
    with pytest.raises(ConfigError, match=r"got dtype 'torch.float32', accepted"):
        ParoLM(model, tokenizer, dtype="torch.float32")
    with pytest.raises(ConfigError, match=r"got \['max_lenght'\], accepted are \[.*'max_length'"):
        ParoLM(model, tokenizer, max_lenght=64)
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        run_tasks(model, tokenizer, ["sea"], include=[tasks], limit=0)
    with pytest.raises(DataError, match="could not score sea with 9 examples in a prompt: Sample larger"):
        run_tasks(model, tokenizer, ["sea"], include=[tasks], fewshot=9)


def test_the_caller_finds_everything_as_it_was(tasks: Path) -> None:
    model, tokenizer = tiny.model().train(), tiny.tokenizer()
    before = torch.get_rng_state(), random.getstate()
    run_tasks(model, tokenizer, ["sea"], include=[tasks])
    assert model.training
    assert tokenizer.pad_token is None
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_a_group_may_hold_tasks_of_lm_eval(tasks: Path, tmp_path: Path) -> None:
    group = {"group": "harbours", "task": ["sea", "arc_easy"]}
    for name in ("sea.yaml", "sea.jsonl"):
        (tmp_path / name).write_text((tasks / name).read_text())
    (tmp_path / "harbours.yaml").write_text(json.dumps(group))
    assert "arc_easy" in find_tasks(["harbours"], [tmp_path]).all_tasks
    assert "arc_easy" not in find_tasks(["sea"], [tmp_path]).all_tasks
