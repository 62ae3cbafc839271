import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.nn import functional

from parofx.dynamo import Owner
from parofx.training import training_calls, training_modules


def call(target, *args, **kwargs):
    graph = Graph()
    names = ("x", "mean", "variance")
    values = {name: graph.placeholder(name) for name in names}
    place = lambda value: values.get(value, value) if isinstance(value, str) else value  # noqa: E731
    node = graph.call_function(target, tuple(map(place, args)), {key: place(value) for key, value in kwargs.items()})
    graph.output(node)
    return GraphModule(nn.Module(), graph)


aten = torch.ops.aten
STATISTICS = {"running_mean": "mean", "running_var": "variance"}


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (functional.dropout, ("x",), {}),
        (functional.dropout, ("x", 0.1, True), {}),
        (functional.dropout2d, ("x",), {"training": True}),
        (functional.feature_alpha_dropout, ("x", 0.2), {"training": True}),
        (torch.dropout, ("x", 0.1, True), {}),
        (aten.dropout.default, ("x", 0.1, True), {}),
        (functional.rrelu, ("x",), {"training": True}),
        (functional.batch_norm, ("x", "mean", "variance", None, None, True), {}),
        (torch.batch_norm, ("x", None, None, "mean", "variance", True, 0.1, 1e-5, False), {}),
        (functional.scaled_dot_product_attention, ("x", "x", "x"), {"dropout_p": 0.1}),
        (functional.scaled_dot_product_attention, ("x", "x", "x", None, 0.1), {}),
        (functional.multi_head_attention_forward, (*("x",) * 3, 8, 2, *(None,) * 4, False, 0.1, "x", None), {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_that_train(target, args, kwargs):
    found = training_calls(call(target, *args, **kwargs))
    assert len(found) == 1
    assert found[0].endswith(")")


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (functional.dropout, ("x", 0.1, False), {}),
        (functional.dropout, ("x", 0.0), {}),
        (torch.dropout, ("x", 0.1, False), {}),
        (functional.rrelu, ("x",), {}),
        (functional.batch_norm, ("x", "mean", "variance"), {}),
        # A batch norm without running statistics uses the batch's in evaluation too.
        (functional.batch_norm, ("x", None, None), {"training": True}),
        (functional.scaled_dot_product_attention, ("x", "x", "x"), {}),
        (functional.multi_head_attention_forward, (*("x",) * 3, 8, 2, *(None,) * 4, False, 0.0, "x", None), {}),
        (torch.relu, ("x",), {}),
        (torch._C._set_grad_enabled, (False,), {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_that_do_not_train(target, args, kwargs):
    assert training_calls(call(target, *args, **kwargs)) == []


def test_modules_that_hold_a_parameter_come_first():
    leaf, inner, outer = nn.Linear(2, 2), nn.ModuleList(), nn.Module().eval()
    other = nn.Linear(2, 2).eval()
    ways = [
        (Owner("a.leaf", leaf, None), Owner("a", inner, None), Owner("", outer, None)),
        (Owner("a.other", other, None), Owner("a", inner, None), Owner("", outer, None)),
        (),
    ]
    assert training_modules(ways) == ["a.leaf", "a"]
    outer.train()
    assert training_modules(ways) == ["a.leaf", "a", "Module"]
