from __future__ import annotations

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


def test_tied_parameters_are_one_tensor() -> None:
    model = ZOO["qwen3"].build()
    gm = capture(model, {"input_ids": torch.arange(10, 18)[None]})
    head = nodes_calling(gm.graph, LINEAR)[-1]
    (embedding,) = nodes_calling(gm.graph, torch.ops.aten.embedding.default)
    assert binding(head.args[1]).tensor is binding(embedding.args[0]).tensor
