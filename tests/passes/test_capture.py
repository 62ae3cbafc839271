from __future__ import annotations

import re
from typing import Any

import graphs
import pytest
import torch
from graphs import Model
from torch import Tensor, nn
from zoo import ZOO

from parofx.api import convert, prepare
from parofx.errors import CaptureError
from parofx.passes import Stage, stage_of
from parofx.passes.capture import capture, complete_inputs
from parofx.passes.graph import LINEAR, binding, nodes_calling
from parofx.passes.guards import why_not_served


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == "parofx" and record.levelname == "WARNING"
    ]


def two_layers() -> nn.Module:
    return nn.Sequential(graphs.linear(64, 32), nn.Dropout(0.5), graphs.linear(32, 64))


def test_the_graph_computes_what_the_model_computes_in_eval_mode() -> None:
    model, x = two_layers().train(), graphs.rows(3, 64)
    gm = capture(model, x)
    assert stage_of(gm) is Stage.FLOAT
    assert graphs.relative(gm(x).detach(), graphs.eager(model.eval(), x)) == 0


def test_each_module_is_left_in_the_mode_it_was_in() -> None:
    model = two_layers().train()
    model[1].eval()
    capture(model, graphs.rows(3, 64))
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_modes_are_restored_when_export_fails() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x

    model = Model(forward).train()
    with pytest.raises(CaptureError, match=r"(?s)Model could not be captured as one graph.*torch\.compile"):
        capture(model, graphs.rows(3, 64))
    assert model.training


def test_the_graph_shares_the_parameters_and_leaves_the_module_tree_alone() -> None:
    model, x = two_layers().eval(), graphs.rows(3, 64)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    output = graphs.eager(model, x)
    gm = capture(model, x)
    found = [binding(node.args[1]) for node in nodes_calling(gm.graph, LINEAR)]
    assert [(one.fqn, one.tensor.data_ptr()) for one in found] == [
        ("0.weight", before["0.weight"]),
        ("2.weight", before["2.weight"]),
    ]
    prepare(gm, graphs.config())
    graphs.round_to_nearest(gm)
    convert(gm)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert torch.equal(graphs.eager(model, x), output)


def test_sizes_are_dynamic_where_the_model_allows() -> None:
    model = two_layers().eval()
    gm = capture(model, graphs.rows(3, 5, 64))
    other = graphs.rows(2, 7, 64)
    assert torch.equal(gm(other), graphs.eager(model, other))


def test_sizes_of_collected_and_nested_inputs_are_dynamic() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_layers()

        def forward(self, *args: Tensor, pair: tuple[Tensor, Tensor], more: dict[str, Tensor]) -> Tensor:
            return self.inner(args[0] + pair[1]) + more["shift"]

    def inputs(batch: int) -> list[Tensor]:
        return [graphs.rows(batch, 64, seed=seed) for seed in range(4)]

    model = Nested().eval()
    x, first, second, shift = inputs(3)
    gm = capture(model, x, pair=(first, second), more={"shift": shift})
    x, first, second, shift = inputs(5)
    given = {"pair": (first, second), "more": {"shift": shift}}
    assert torch.equal(gm(x, **given), model(x, **given))


def test_sizes_are_fixed_where_the_model_fixes_them() -> None:
    model = Model(lambda module, x: module.inner(x.reshape(3, 64)), inner=two_layers()).eval()
    gm = capture(model, graphs.rows(3, 64))
    assert torch.equal(gm(graphs.rows(3, 64)), graphs.eager(model, graphs.rows(3, 64)))


def test_no_guards_are_left() -> None:
    gm = capture(two_layers(), graphs.rows(3, 64))
    assert not [node for node in gm.graph.nodes if node.op == "call_module"]


def test_a_mapping_stands_for_keyword_inputs() -> None:
    model = Model(lambda module, x: module.inner(x), inner=two_layers())

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *, hidden: Tensor, scale: float = 1.0) -> Tensor:
            return self.inner(hidden) * scale

    x = graphs.rows(3, 64)
    for gm in (capture(Named(), {"hidden": x}), capture(Named(), hidden=x)):
        assert gm.meta["parofx_inputs"] == (0, ("hidden",))
        assert torch.equal(gm(hidden=x), graphs.eager(Named().eval().inner, x))


def test_inputs_of_transformers_models_are_completed() -> None:
    class Seq2Seq(nn.Module):
        def forward(
            self,
            input_ids: Any = None,
            decoder_input_ids: Any = None,
            decoder_inputs_embeds: Any = None,
            use_cache: Any = None,
        ) -> None: ...

    ids = torch.ones(1, 2)
    completed = complete_inputs(Seq2Seq(), {"input_ids": ids})
    assert completed["use_cache"] is False
    assert completed["decoder_input_ids"] is ids
    given = {"input_ids": ids, "decoder_inputs_embeds": ids, "use_cache": True}
    assert complete_inputs(Seq2Seq(), given) == given
    assert complete_inputs(two_layers(), {"x": ids}) == {"x": ids}


def test_a_decoder_that_reads_the_encoders_tokens_reads_them_under_their_mask() -> None:
    class Seq2Seq(nn.Module):
        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            decoder_input_ids: Any = None,
            decoder_attention_mask: Any = None,
        ) -> None: ...

    ids, mask = torch.ones(1, 2), torch.zeros(1, 2)
    completed = complete_inputs(Seq2Seq(), {"input_ids": ids, "attention_mask": mask})
    assert completed["decoder_attention_mask"] is mask
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.zeros(1, 2)}
    assert complete_inputs(Seq2Seq(), given) == given


def test_one_tensor_given_twice_is_two_inputs() -> None:
    def forward(module: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return module.inner(x), module.inner(y)

    model, x = Model(forward, inner=two_layers()).eval(), graphs.rows(3, 64)
    gm, other = capture(model, x, x), graphs.rows(5, 64)
    assert [len(one) for one in gm(x, other)] == [3, 5]


class TestKeywordInputs:
    class Collecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_layers()

        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return self.inner(x) + more["shift"]

    @pytest.mark.parametrize("replaced", [False, True])
    def test_sizes_of_what_a_model_collects_are_dynamic(self, replaced: bool, caplog: pytest.LogCaptureFixture) -> None:
        model = self.Collecting().eval()
        if replaced:
            model.forward = forward = model.forward
        gm = capture(model, graphs.rows(3, 64), shift=graphs.rows(3, 64, seed=1))
        assert vars(model).get("forward") is (forward if replaced else None)
        assert not warnings_of(caplog)
        x, shift = graphs.rows(5, 64), graphs.rows(5, 64, seed=1)
        assert torch.equal(gm(x, shift=shift), model(x, shift=shift))


def test_fixed_sizes_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    export = torch.export.export

    def static_only(*args: Any, dynamic_shapes: Any = None, **options: Any) -> Any:
        if dynamic_shapes is not None:
            raise ValueError("this one cannot\nfor many reasons")
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", static_only)
    gm = capture(two_layers(), graphs.rows(3, 64))
    assert warnings_of(caplog) == [
        "Sequential is captured for the sizes of its example inputs alone: with dynamic sizes, torch.export says: "
        "this one cannot"
    ]
    assert why_not_served(gm, {"input_1": graphs.rows(3, 64)}) is None
    reason = why_not_served(gm, {"input_1": graphs.rows(2, 64)})
    assert reason == "input_1 must have the shape (3, 64), as at the capture, got (2, 64)"


class Choosing(nn.Module):
    """A model that goes several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = two_layers()

    def forward(self, x: Tensor, flag: bool = False, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.inner(x) if x.shape[0] > 4 else x
        x = x * scale if flag else x
        return x if shift is None else x + shift


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"x": graphs.rows(9, 64)}, None),
        ({"x": graphs.rows(3, 64)}, r"^Guard failed: x\.size\(\)\[0\] >"),
        ({"x": graphs.rows(5, 3, 64)}, r"^x must have the shape \(\*, 64\), as at the capture, got \(5, 3, 64\)$"),
        ({"x": graphs.rows(5, 32)}, r"^x must have the shape \(\*, 64\), as at the capture, got \(5, 32\)$"),
        ({"x": None}, r"^x must be a tensor, as at the capture, got None$"),
        ({"flag": True}, r"^flag must be False, as at the capture, got True$"),
        ({"flag": 0}, r"^flag must be False, as at the capture, got 0$"),
        ({"shift": graphs.rows(5, 64)}, r"^shift must be None, as at the capture, got a tensor of shape \(5, 64\)$"),
        ({"scale": 2.0}, r"^scale must be nan, as at the capture, got 2\.0$"),
    ],
)
def test_what_a_graph_was_not_captured_for(changes: dict[str, Any], reason: str | None) -> None:
    inputs = {"x": graphs.rows(5, 64), "flag": False, "shift": None, "scale": float("nan")}
    found = why_not_served(capture(Choosing(), **inputs), inputs | changes)
    assert found is None if reason is None else re.search(reason, str(found)), found


@pytest.mark.parametrize("name", sorted(ZOO))
def test_guards_of_real_models_let_other_sizes_pass(name: str) -> None:
    spec = ZOO[name]
    model = spec.build()
    inputs = complete_inputs(model, spec.inputs())
    gm = capture(model, inputs)
    other = {key: value[:1] if isinstance(value, Tensor) and value.dim() else value for key, value in inputs.items()}
    for given in (inputs, other):
        assert why_not_served(gm, given) is None


def test_tied_parameters_are_one_tensor() -> None:
    model = ZOO["qwen3"].build()
    gm = capture(model, {"input_ids": torch.arange(10, 18)[None]})
    head = nodes_calling(gm.graph, LINEAR)[-1]
    (embedding,) = nodes_calling(gm.graph, torch.ops.aten.embedding.default)
    assert binding(head.args[1]).tensor is binding(embedding.args[0]).tensor
