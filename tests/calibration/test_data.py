"""Calibration data of every accepted kind becomes the same batches, and what is wrong with it is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from parofx.calibration.data import batches, pack_tokens, sample_from_model
from parofx.config import CalibrationConfig
from parofx.errors import DataError

CONFIG = CalibrationConfig(seqlen=8, samples=6, batch_size=4)


class Model(nn.Module):
    def forward(self, x: Tensor, scale: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        raise AssertionError("reading data runs no model")


class Numbers:
    """A tokenizer of numbers separated by spaces, with no special tokens."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(start: int, stop: int) -> str:
    return " ".join(str(number) for number in range(start, stop))


def test_pack_tokens_concatenates_and_cuts_in_order() -> None:
    packed = pack_tokens([numbers(0, 5), numbers(5, 11)], Numbers(), seqlen=3)
    assert packed.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seqlen=st.integers(2, 9),
    samples=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_pack_tokens_draws_windows_without_overlap(lengths: list[int], seqlen: int, samples: int, seed: int) -> None:
    total = sum(lengths)
    assume(total >= samples * seqlen)
    texts, start = [], 0
    for length in lengths:
        texts.append(numbers(start, start + length))
        start += length
    packed = pack_tokens(texts, Numbers(), seqlen=seqlen, samples=samples, seed=seed)
    assert packed.shape == (samples, seqlen)
    assert packed.dtype == torch.int64
    # The stream counts upwards: a window is a run of it that begins at a multiple of seqlen.
    assert torch.equal(packed, packed[:, :1] + torch.arange(seqlen))
    assert (packed[:, 0] % seqlen == 0).all()
    assert len(packed[:, 0].unique()) == samples
    assert torch.equal(packed, pack_tokens(texts, Numbers(), seqlen=seqlen, samples=samples, seed=seed))


def test_pack_tokens_seed_chooses_other_windows() -> None:
    first, second = (pack_tokens([numbers(0, 400)], Numbers(), seqlen=4, samples=5, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_pack_tokens_stops_reading_when_the_pool_is_full() -> None:
    read = []

    def endless() -> Iterator[str]:
        while True:
            read.append(1)
            yield numbers(0, 10)

    assert pack_tokens(endless(), Numbers(), seqlen=10, samples=2).shape == (2, 10)
    assert len(read) == 32


def test_pack_tokens_joins_documents_by_the_end_token() -> None:
    tokenizer = tiny.tokenizer()
    packed = pack_tokens(["the sea", "is wide"], tokenizer, seqlen=3)
    assert tokenizer.convert_ids_to_tokens(packed.flatten()) == ["the", "sea", "</s>", "is", "wide", "</s>"]


def test_pack_tokens_starts_every_window_as_the_tokenizer_starts_a_text() -> None:
    tokenizer = tiny.tokenizer(starts=True)
    packed = pack_tokens([tiny.TEXT * 2], tokenizer, seqlen=4)
    assert (packed[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.convert_ids_to_tokens(packed[1, 1:]) == ["wide", "and", "ships"]
    assert (packed == tokenizer.bos_token_id).sum() == len(packed)


def test_pack_tokens_renders_conversations() -> None:
    tokenizer = tiny.tokenizer()
    packed = pack_tokens([[{"role": "user", "content": "why ?"}]], tokenizer, seqlen=4)
    assert tokenizer.convert_ids_to_tokens(packed[0]) == ["user", "why", "?", "</s>"]


def test_pack_tokens_refuses_conversations_without_a_template() -> None:
    with pytest.raises(DataError, match="no chat template"):
        pack_tokens([[{"role": "user", "content": "why ?"}]], tiny.tokenizer(chat=False), seqlen=4)


def test_pack_tokens_says_how_much_text_is_missing() -> None:
    with pytest.raises(DataError, match="needs 16 tokens of text, found 10"):
        pack_tokens([numbers(0, 10)], Numbers(), seqlen=16, samples=1)


def test_pack_tokens_takes_fewer_windows_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="fills 3 windows of 4 tokens, 5 were asked for"):
        packed = pack_tokens([numbers(0, 14)], Numbers(), seqlen=4, samples=5)
    assert sorted(packed[:, 0].tolist()) == [0, 4, 8]


def test_texts_become_batches_of_the_first_argument() -> None:
    read = batches([tiny.TEXT] * 20, tiny.model(), CONFIG, tokenizer=tiny.tokenizer())
    assert [batch.inputs["input_ids"].shape for batch in read] == [(4, 8), (2, 8)]
    assert [batch.attention_mask for batch in read] == [None, None]


def test_a_file_is_read_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(tiny.TEXT * 20)
    by_name = batches(str(file), tiny.model(), CONFIG, tokenizer=tiny.tokenizer())
    by_path = batches(file, tiny.model(), CONFIG, tokenizer=tiny.tokenizer())
    assert sum(batch.samples for batch in by_name) == 6
    assert torch.equal(by_name[0].inputs["input_ids"], by_path[0].inputs["input_ids"])


def test_the_model_can_write_its_own_text() -> None:
    read = batches("self", tiny.model(), CONFIG, tokenizer=tiny.tokenizer())
    tokens = torch.cat([batch.inputs["input_ids"] for batch in read])
    assert tokens.shape == (6, 8)
    assert (tokens[:, 0] == 0).all()
    assert len(tokens.unique(dim=0)) == 6
    state = torch.random.get_rng_state()
    assert torch.equal(tokens, sample_from_model(tiny.model(), tiny.tokenizer(), CONFIG))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_model_that_cannot_write_is_refused() -> None:
    with pytest.raises(DataError, match="needs a model with generate"):
        batches("self", Model(), CONFIG, tokenizer=tiny.tokenizer())


def test_a_tensor_is_split_and_limited() -> None:
    data = torch.randn(9, 3)
    read = batches(data, Model(), CONFIG)
    assert [batch.samples for batch in read] == [4, 2]
    assert torch.equal(torch.cat([batch.inputs["x"] for batch in read]), data[:6])


@pytest.mark.parametrize(
    "item",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.ones(3)),
        [torch.ones(2, 3)],
        {"x": torch.ones(2, 3), "scale": None},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_model_inputs_keep_their_batches_up_to_the_samples(item: object) -> None:
    read = batches([item] * 10, Model(), CONFIG)
    assert len(read) == 3
    assert all(torch.equal(batch.inputs["x"], torch.ones(2, 3)) for batch in read)


def test_one_mapping_is_one_batch() -> None:
    mask = torch.tensor([[1, 1, 0]])
    (batch,) = batches({"x": torch.ones(1, 3), "attention_mask": mask}, Model(), CONFIG)
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, False]]
    assert torch.equal(batch.inputs["attention_mask"], mask)


def test_a_mask_of_more_dimensions_marks_no_rows() -> None:
    mask = torch.full((1, 1, 3, 3), float("-inf"))
    (batch,) = batches([{"x": torch.ones(1, 3), "attention_mask": mask}], Model(), CONFIG)
    assert batch.attention_mask is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_by_sample(value: float) -> None:
    bad = torch.zeros(2, 3)
    bad[1, 2] = value
    with pytest.raises(DataError, match="sample 5: x holds NaN or infinite"):
        batches([torch.zeros(2, 3), torch.zeros(2, 3), bad], Model(), CONFIG)
    with pytest.raises(DataError, match="sample 0: x holds NaN or infinite"):
        batches([torch.tensor(value), torch.tensor(0.0)], Model(), CONFIG)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no item"),
        (iter(()), "holds no item"),
        (7, "got int"),
        (["text"], "needs a tokenizer"),
        ([7], "sample 0: expected a tensor, a mapping or a tuple of inputs, got int"),
        ([{"x": 1}], "at least one tensor among the inputs, got {'x': 'int'}$"),
        (
            [{"text": "a"}],
            r"got {'text': 'str'}; of rows with text give the strings: \[row\['text'\] for row in rows\]",
        ),
        ([[3, 4]], r"got {'x': 'int', 'scale': 'int'}; token ids are given as a tensor: torch\.tensor\(\[ids\]\)"),
        ([(torch.ones(1), torch.ones(1), torch.ones(1), torch.ones(1))], "Model.forward does not take it"),
        ([torch.ones(0, 3)], r"x is empty, of shape \(0, 3\)"),
        (torch.ones(0, 3), r"at least one sample, got a tensor of shape \(0, 3\)"),
        (torch.tensor(3.0), r"at least one sample, got a tensor of shape \(\)"),
    ],
)
def test_what_is_no_data_is_refused(calibration: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(calibration, Model(), CONFIG)


def test_a_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="must be a tokenizer, got 'path/to/model'; load it with AutoTokenizer"):
        batches([tiny.TEXT], Model(), CONFIG, tokenizer="path/to/model")


def test_another_models_tokenizer_is_refused() -> None:
    message = f"gives token {tiny.VOCAB}, and LlamaForCausalLM has embeddings for {tiny.VOCAB}; pass the model's own"
    with pytest.raises(DataError, match=message):
        batches([f"{numbers(0, tiny.VOCAB + 1)} " * 3], tiny.model(), CONFIG, tokenizer=Numbers())
    known = [f"{numbers(0, tiny.VOCAB)} " * 3]
    assert batches(known, tiny.model(), CONFIG, tokenizer=Numbers())

    class NoTable(Model):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert batches(known, NoTable(), CONFIG, tokenizer=Numbers())


@pytest.mark.parametrize("token", [-100, tiny.VOCAB])
def test_a_token_without_an_embedding_is_named(token: int) -> None:
    good, bad = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    bad[1, 3] = token
    message = f"sample 3: input_ids holds token {token}, and LlamaForCausalLM has embeddings for 0 to {tiny.VOCAB - 1}"
    with pytest.raises(DataError, match=message):
        batches([good, {"input_ids": bad}], tiny.model(), CONFIG)


def test_an_item_that_is_no_text_is_named() -> None:
    with pytest.raises(DataError, match="calibration item 1: expected a string or a list of messages"):
        batches([tiny.TEXT, 7], tiny.model(), CONFIG, tokenizer=tiny.tokenizer())
