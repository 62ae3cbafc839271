from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from parofx.passes.graph import (
    bind,
    binding,
    buffer_node,
    get_attribute,
    module_calls,
    module_stack,
    operator_name,
    plain_path,
    remove_dead_code,
    set_buffer,
    weight_binding,
)


def graph_module(**tensors: torch.Tensor) -> GraphModule:
    """Return a graph that adds up its tensors, named by path with `__` for a dot."""
    root, graph = nn.Module(), Graph()
    for name, tensor in tensors.items():
        *parents, last = name.split("__")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_buffer(last, tensor)
    total = graph.placeholder("x")
    for name in tensors:
        total = graph.call_function(torch.add, (total, graph.get_attr(name.replace("__", "."))))
    graph.output(total)
    return GraphModule(root, graph)


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self'].model.layers[0].mlp", "model.layers.0.mlp"),
        ("L['self']._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("layer@2", "layer"),
        ("L__self__.a", "a"),
        ("", ""),
    ],
)
def test_paths_of_both_doors_become_dotted_names(path: str, plain: str) -> None:
    assert plain_path(path) == plain


def test_a_module_stack_is_read_outermost_first() -> None:
    gm = graph_module(a__w=torch.ones(2))
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert module_stack(node) == []
    node.meta["nn_module_stack"] = {"k0": ("", "Root"), "k1": ("L['self'].a@1", nn.Linear)}
    assert module_stack(node) == [("", "Root"), ("a", "torch.nn.modules.linear.Linear")]
    assert module_calls(node) == ["k0|", "k1|L['self'].a@1"]


def test_bindings() -> None:
    gm = graph_module(a__w=torch.ones(2))
    x, attribute, addition, _ = gm.graph.nodes
    assert binding(attribute).fqn == "a.w"
    assert binding(attribute).module == "a"
    assert binding(x) is binding(addition) is binding("a.w") is None
    bind(x, "b.w", torch.zeros(2))
    assert binding(x).fqn == "b.w"
    assert weight_binding(x) == (binding(x), False)
    assert weight_binding(addition) is None


@pytest.mark.parametrize(
    ("path", "tensors", "expected"),
    [
        ("a.pairs", {"b__w": torch.ones(2)}, "a.pairs"),
        ("a.pairs", {"a__w": torch.ones(2)}, "a.pairs"),
        ("a.pairs", {"a__pairs": torch.ones(2)}, "a.pairs_"),
        ("a.pairs", {"a__pairs": torch.ones(2), "a__pairs_": torch.ones(2)}, "a.pairs__"),
        ("w.pairs", {"w": torch.ones(2)}, "w_.pairs"),
        ("a.w.pairs", {"a__w": torch.ones(2)}, "a.w_.pairs"),
        ("a", {"a__w": torch.ones(2)}, "a_"),
    ],
)
def test_new_buffers_disturb_nothing_that_the_graph_reads(
    path: str, tensors: dict[str, torch.Tensor], expected: str
) -> None:
    gm = graph_module(**tensors)
    before = gm(torch.zeros(2))
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(first):
        node = buffer_node(gm, path, torch.full((2,), 7.0))
    assert node.target == expected
    assert get_attribute(gm, expected)[0] == 7
    gm.recompile()
    assert torch.equal(gm(torch.zeros(2)), before)


def test_a_tensor_that_is_there_already_keeps_its_name() -> None:
    shared = torch.ones(2)
    gm = graph_module(a__w=shared)
    with gm.graph.inserting_after(next(iter(gm.graph.nodes))):
        assert buffer_node(gm, "a.w", shared).target == "a.w"


def test_what_one_node_alone_reads_may_be_replaced() -> None:
    gm = graph_module(a__w=torch.ones(2))
    _, attribute, *_ = gm.graph.nodes
    with gm.graph.inserting_before(attribute):
        assert buffer_node(gm, "a.w", torch.zeros(2), replaces=attribute).target == "a.w"


def test_a_parameter_is_replaced_by_a_buffer_of_its_name() -> None:
    gm = graph_module(a__w=torch.ones(2))
    gm.a.register_parameter("v", nn.Parameter(torch.ones(2)))
    set_buffer(gm, "a.v", torch.zeros(2))
    assert dict(gm.named_parameters()) == {}
    assert torch.equal(gm.a.v, torch.zeros(2))


def test_dead_code_takes_its_tensors_along() -> None:
    gm = graph_module(a__w=torch.ones(2), b__w=torch.ones(2))
    output = next(reversed(gm.graph.nodes))
    output.args = (output.args[0].args[0],)
    remove_dead_code(gm)
    assert set(gm.state_dict()) == {"a.w"}


@pytest.mark.parametrize(
    ("target", "name"),
    [(torch.ops.aten.add.Tensor, "add"), (torch.add, "add"), ("add", "add"), (SimpleNamespace(), "")],
)
def test_operator_names(target: object, name: str) -> None:
    assert operator_name(SimpleNamespace(target=target)) == name
