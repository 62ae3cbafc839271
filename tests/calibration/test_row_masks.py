"""Which rows a mask leaves out. Those of `VALUES` hold their number: a list of numbers says which were seen."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
from torch import Tensor, nn

import parofx
from parofx.calibration.stream import BlockStream
from parofx.errors import DataError

VALUES = torch.arange(1.0, 9.0).view(2, 4, 1).expand(2, 4, 64).clone()
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
OTHER = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
ALL = [1, 2, 3, 4, 5, 6, 7, 8]


def seen(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[int]]:
    """Return, by linear, the numbers of the rows that reach the statistics."""
    gm = parofx.prepare(parofx.capture(model.eval(), inputs), graphs.config())
    stream = BlockStream(gm, [inputs])
    rows = defaultdict(list)
    for segment in stream.segments:
        list(stream.run(segment, lambda name, value, _: rows[name].extend(int(row[0]) for row in value)))
    return dict(rows)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def static_sizes(monkeypatch):
    """Let captures know the sizes of their examples as numbers."""
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *args, dynamic_shapes=None, **more: export(*args, **more))


class Parts(nn.Module):
    """Linears for the forward functions below, each with a transform of its own."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = graphs.linear(64, 64), graphs.linear(64, 64, seed=1)
        self.forward = forward.__get__(self)


def linear_of(change: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.a(change(x))

    return Parts(forward)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, [1, 2, 3, 4, 5]),
        (lambda x: x.transpose(0, 1), [1, 5, 2, 3, 4]),
        (lambda x: x.reshape(-1, 64), [1, 2, 3, 4, 5]),
        (lambda x: torch.relu(x.transpose(0, 1).reshape(-1, 64)) + 0, [1, 5, 2, 3, 4]),
        (lambda x: nn.functional.layer_norm(x, (64,)).reshape(-1, 64) * 0 + x.reshape(-1, 64), [1, 2, 3, 4, 5]),
        (lambda x: x.reshape(x.shape[0], x.shape[1], 2, 32).repeat(1, 1, 1, 2), [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        (lambda x: x[:, ::2], [1, 3, 5, 7]),
        (lambda x: x.reshape(-1, 64).flip(0), ALL[::-1]),
    ],
    ids=["as is", "transposed", "flat", "transposed and flat", "row-wise", "heads", "every second", "reordered"],
)
def test_rows_are_masked_in_the_order_they_have(change, expected):
    assert seen(linear_of(change), {"x": VALUES, "attention_mask": MASK}) == {"a": expected}


def test_a_square_batch_is_told_apart_by_its_symbols():
    square, mask = VALUES.reshape(8, 64)[:4].reshape(2, 2, 64), torch.tensor([[1, 1], [0, 0]])
    assert seen(linear_of(lambda x: x.transpose(0, 1)), {"x": square, "attention_mask": mask}) == {"a": [1, 2]}


def test_encoder_and_decoder_have_masks_of_their_own():
    def forward(self, inputs_embeds, decoder_inputs_embeds, attention_mask=None, decoder_attention_mask=None):
        return self.a(inputs_embeds), self.b(decoder_inputs_embeds)

    inputs = {"inputs_embeds": VALUES, "decoder_inputs_embeds": VALUES, "attention_mask": OTHER}
    assert seen(Parts(forward), inputs) == {"a": [1, 2, 5, 6], "b": ALL}
    inputs["decoder_attention_mask"] = MASK
    assert seen(Parts(forward), inputs) == {"a": [1, 2, 5, 6], "b": [1, 2, 3, 4, 5]}


@pytest.mark.usefixtures("static_sizes")
def test_a_decoder_of_the_encoders_fixed_sizes_is_not_masked_by_its_mask(caplog):
    def forward(self, input_ids, decoder_input_ids, table, attention_mask):
        hidden = self.a(table[input_ids])
        return self.b(hidden.mean() + table[decoder_input_ids])

    ids = torch.arange(8).view(2, 4)
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "table": VALUES.reshape(8, 64), "attention_mask": MASK}
    found = seen(Parts(forward), inputs)
    assert found["a"] == [1, 2, 3, 4, 5]
    assert len(found["b"]) == 8
    assert "attention_mask masks is not clear" in told(caplog)[0]


def test_what_is_computed_from_no_masked_input_is_whole():
    def forward(self, input_ids, table, attention_mask):
        return self.a(table), self.b(table[input_ids])

    inputs = {"input_ids": torch.arange(8).view(2, 4), "table": VALUES.reshape(8, 64), "attention_mask": MASK}
    assert seen(Parts(forward), inputs) == {"a": ALL, "b": [1, 2, 3, 4, 5]}


def test_a_mask_that_the_model_applies_belongs_to_what_it_is_applied_to():
    def forward(self, x, y, attention_mask):
        return self.a(x * attention_mask[..., None].clamp(1)), self.b(y)

    assert seen(Parts(forward), {"x": VALUES, "y": VALUES, "attention_mask": MASK}) == {"a": [1, 2, 3, 4, 5], "b": ALL}


def test_in_doubt_every_row_counts_and_the_log_says_so(caplog):
    def forward(self, x, y, attention_mask):
        return self.a(x), self.b(y)

    assert seen(Parts(forward), {"x": VALUES, "y": VALUES, "attention_mask": MASK}) == {"a": ALL, "b": ALL}
    assert told(caplog) == ["attention_mask fits x, y equally: no row is left out of the statistics for it"]


def test_a_mask_of_another_shape_is_told(caplog):
    assert seen(linear_of(lambda x: x), {"x": VALUES, "attention_mask": MASK[:, :3]}) == {"a": ALL}
    assert told(caplog) == ["attention_mask fits no input's shape: no row is left out of the statistics for it"]


@pytest.mark.usefixtures("static_sizes")
def test_a_static_square_is_a_doubt_that_is_told_once(caplog):
    def forward(self, x, attention_mask):
        return self.a(x.transpose(0, 1)), self.b(x)

    square, mask = VALUES.reshape(8, 64)[:4].reshape(2, 2, 64), torch.tensor([[1, 1], [0, 0]])
    found = seen(Parts(forward), {"x": square, "attention_mask": mask})
    assert found == {"a": [1, 3, 2, 4], "b": [1, 2, 3, 4]}
    (message,) = told(caplog)
    assert "attention_mask masks is not clear: all of them count" in message
    assert seen(Parts(forward), {"x": VALUES, "attention_mask": MASK}) == {"a": [1, 5, 2, 3, 4], "b": [1, 2, 3, 4, 5]}


def test_a_mask_that_fits_another_batch_is_refused():
    gm = parofx.prepare(parofx.capture(linear_of(lambda x: x), {"x": VALUES, "attention_mask": MASK}), graphs.config())
    message = r"batch 1 is not, attention_mask must have the shape \(2, 3\) of x, got \(2, 4\)"
    with pytest.raises(DataError, match=message):
        BlockStream(gm, [{"x": VALUES, "attention_mask": MASK}, {"x": VALUES[:, :3], "attention_mask": MASK}])
