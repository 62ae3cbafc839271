from collections import defaultdict

import pytest
import torch
from graphs import QUICK, Layer, Stack
from torch import Tensor, nn

import parofx
from parofx import ParoConfig
from parofx.calibration.stream import BlockStream
from parofx.errors import DataError
from parofx.passes.graph import LINEAR

CONFIG = ParoConfig(calibration=QUICK)


def batch(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, 64, generator=torch.Generator().manual_seed(seed))


class Masked(nn.Module):
    """Two blocks that take a mask along."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1)])

    def forward(self, x, attention_mask=None):
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        for layer in self.layers:
            x = layer(x)
        return x


def prepared(model: nn.Module, *args: object) -> torch.fx.GraphModule:
    return parofx.prepare(parofx.capture(model.eval(), *args), CONFIG)


def stream_all(stream: BlockStream) -> dict[str, list[Tensor]]:
    rows = defaultdict(list)
    for segment in stream.segments:
        assert len(list(stream.run(segment, lambda name, value, _: rows[name].append(value)))) == len(stream.borders)
    return rows


def test_rows_are_what_the_modules_read_in_a_whole_forward():
    model = Masked().eval()
    batches = [{"x": batch(3)}, {"x": batch(2, seed=1)}]
    stream = BlockStream(prepared(model, batches[0]), batches)
    rows = stream_all(stream)
    seen = defaultdict(list)
    for name in rows:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for one in batches:
            model(**one)
    assert sorted(rows) == ["layers.0.down", "layers.0.gate", "layers.1.down", "layers.1.gate"]
    for name in rows:
        assert [len(one) for one in rows[name]] == [15, 10]
        expected = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen[name]])
        torch.testing.assert_close(torch.cat(rows[name]), expected, rtol=1e-5, atol=1e-5)


def test_a_border_holds_no_more_than_what_is_read_behind_it():
    one = {"x": batch()}
    stream = BlockStream(prepared(Masked(), one), [one])
    sizes = []
    for segment in stream.segments:
        list(stream.run(segment, lambda name, value, _: None))
        held = {value.data_ptr(): value for value in stream.borders[0].values() if isinstance(value, Tensor)}
        sizes.append(sum(value.numel() for value in held.values()))
    assert len(sizes) == 2
    # Between two blocks the residual and nothing else, whatever the blocks are wide inside; behind the last, nothing.
    assert sizes == [batch().numel(), 0]


def test_what_is_only_an_output_is_dropped():
    class Open(Masked):
        """A model that also returns what its first block computed."""

        def forward(self, x):
            hidden = self.layers[0](x)
            return hidden * 2, self.layers[1](hidden)

    stream = BlockStream(prepared(Open(), batch()), [{"arg0": batch()}])
    for segment in stream.segments:
        list(stream.run(segment, lambda name, value, _: None))
    assert stream.borders == [{}]


def test_rows_that_are_masked_out_are_not_seen():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    one = {"x": batch(), "attention_mask": mask}
    rows = stream_all(BlockStream(prepared(Masked(), one), [one]))
    assert {tuple(len(part) for part in parts) for parts in rows.values()} == {(7,)}
    # The first block reads the norm of the input; its rows are those the mask keeps.
    expected = Masked().layers[0].norm(batch()[mask.bool()]).detach()
    torch.testing.assert_close(rows["layers.0.gate"][0], expected, rtol=1e-5, atol=1e-5)


def test_segments_and_transforms():
    stream = BlockStream(prepared(Stack(), batch()), [{"arg0": batch()}])
    per_segment = [stream.transforms_of(segment) for segment in stream.segments]
    assert all(names for names in per_segment)
    for segment, names in zip(stream.segments, per_segment, strict=True):
        assert all(stream.last_segment_of(name) == segment for name in names)


def test_batches_of_other_inputs_are_refused():
    gm = prepared(Masked(), {"x": batch()})
    with pytest.raises(DataError, match=r"\['x'\]: missing \['x'\], unexpected \['y'\]"):
        BlockStream(gm, [{"x": batch()}, {"y": batch()}])
    with pytest.raises(DataError, match=r"unexpected \['attention_mask'\]"):
        BlockStream(gm, [{"x": batch(), "attention_mask": torch.ones(3, 5)}])
    with pytest.raises(DataError, match=r"missing \['arg0'\], unexpected \['x'\]"):
        BlockStream(prepared(Masked(), batch()), [{"x": batch()}])


def test_a_batch_that_would_go_another_way_is_refused():
    class Branching(Masked):
        def forward(self, x):
            return super().forward(x * 100 if x.shape[1] > 4 else x)

    gm = prepared(Branching(), {"x": batch()})
    BlockStream(gm, [{"x": batch()}, {"x": batch(2)}])
    message = r"batch 1 is not, Guard failed: x\.size\(\)\[1\] >.*; give batches of one kind"
    with pytest.raises(DataError, match=message):
        BlockStream(gm, [{"x": batch()}, {"x": batch()[:, :3]}])


def test_an_input_of_another_structure_is_refused():
    class Nested(Masked):
        def forward(self, x):
            return super().forward(x["a"] + x["b"])

    gm = prepared(Nested(), {"x": {"a": batch(), "b": batch()}})
    with pytest.raises(DataError, match="the captured graph takes 2 inputs, a calibration batch has 1"):
        BlockStream(gm, [{"x": {"a": batch()}}])


class Siblings(nn.Module):
    """Two linears that read one tensor, and a third that reads another with the second."""

    def __init__(self, *, bias: bool = False, other: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(128, 64, bias=False)
        self.second = nn.Linear(128, 32, bias=bias)
        self.other = other

    def forward(self, x, attention_mask=None):
        result = self.first(x).sum(-1) + self.second(x).sum(-1)
        return result + self.second(x.sin()).sum(-1) if self.other else result


def lengths_of(model: nn.Module, *, by_keyword: bool = False, **inputs: Tensor) -> list[Tensor | None]:
    gm = prepared(model, inputs)
    if by_keyword:
        for node in gm.graph.find_nodes(op="call_function", target=LINEAR):
            node.args, node.kwargs = node.args[:2], {"bias": None}
        gm.recompile()
    stream = BlockStream(gm, [inputs])
    found = []
    measured = {"first": frozenset({"first", "second"})}
    for segment in stream.segments:
        list(stream.run(segment, lambda name, rows, lengths: found.append((name, rows, lengths)), measured))
    assert {name for name, _, _ in found} == {"first"}
    for _, rows, lengths in found:
        if lengths is not None:
            outputs = torch.cat([model.first(rows), model.second(rows)], 1)
            torch.testing.assert_close(lengths, outputs.norm(dim=1), rtol=1e-5, atol=1e-5)
    return [lengths for _, _, lengths in found]


@torch.no_grad()
def test_lengths_are_those_of_what_all_siblings_make_of_the_rows():
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    (lengths,) = lengths_of(Siblings(), x=x)
    assert lengths.shape == (10,)
    (lengths,) = lengths_of(Siblings(), x=x, attention_mask=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]))
    assert lengths.shape == (7,)


@torch.no_grad()
def test_lengths_are_left_out_where_linears_have_arguments_by_keyword():
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    assert lengths_of(Siblings(), by_keyword=True, x=x) == [None]


@torch.no_grad()
@pytest.mark.parametrize("options", [{"bias": True}, {"other": True}])
def test_lengths_are_left_out_where_not_all_siblings_make_them_of_the_same_rows(options):
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    lengths = lengths_of(Siblings(**options), x=x)
    assert None in lengths
    assert len([one for one in lengths if one is not None]) == bool(options.get("other"))
