from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounded import random_rotation
from test_merge_siblings import attention, converted
from torch import Tensor
from torch.fx import Node

from parofx import affine, ops, packing, providers
from parofx.errors import LoweringError
from parofx.passes import MergeSiblings
from parofx.passes.graph import ROTATE_INT4_SIBLINGS, get_attribute, nodes_calling
from parofx.passes.lower import sibling_call
from parofx.providers import ReferenceProvider, SiblingCall
from parofx.providers.aten import AtenProvider, pack_rotation, pack_weight

#: Its scales and products are bf16: 2⁻⁸ an operand, of random sign.
BF16 = 1e-2


def calls(model: Any, *inputs: Tensor) -> list[SiblingCall]:
    captured = converted(model, *inputs)
    MergeSiblings().run(captured.gm)
    return [sibling_call(captured.gm, node, None) for node in nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)]


def a_call(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> SiblingCall:
    first, _ = calls(attention().to(dtype), graphs.rows(3, 64).to(dtype))
    values = {name: getattr(first, name) for name in first.__dataclass_fields__}
    return SiblingCall(**(values | changes))


class TestChoice:
    def test_the_reference_is_last_and_takes_everything(self) -> None:
        assert providers.providers()[-1].name == "reference"
        assert ReferenceProvider().why_not(a_call()) is None

    def test_aten_serves_bfloat16_on_cpu(self) -> None:
        assert AtenProvider().why_not(a_call()) is None

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"device": torch.device("cuda")}, "device cuda is not cpu"),
            ({"dtype": torch.float32}, "torch.float32 is scalar code there; only bfloat16 is fast"),
            ({"dtype": torch.float16}, "torch.float16 is scalar code there; only bfloat16 is fast"),
            ({"group_size": 16}, "group_size 16 is not one of (32, 64, 128)"),
            ({"activations": "int8"}, "it does not quantize activations to int8"),
            ({"bits": 8}, "weights have 8 bits; the product knows 4"),
            ({"corrections": ((), ())}, "weights have low-rank corrections, which the product does not add"),
        ],
    )
    def test_why_not_aten(self, changes: dict[str, Any], reason: str) -> None:
        assert AtenProvider().why_not(a_call(**changes)) == reason

    def test_why_not_aten_by_out_features(self) -> None:
        (call,) = calls(graphs.linear(64, 24).bfloat16(), graphs.rows(3, 64).bfloat16())
        assert AtenProvider().why_not(call) == "out_features (24,) are not multiples of 16"

    def test_why_not_aten_without_tensors(self) -> None:
        call = a_call()
        placeholder = next(node for node in call.gm.graph.nodes if node.op == "placeholder")
        loose = a_call(weights=((placeholder,) * 3,))
        assert AtenProvider().why_not(loose) == "the packed tensors are not known when the graph is lowered"

    def test_reasons_of_those_passed_over(self) -> None:
        provider, reasons = providers.choose(a_call(device=torch.device("meta")))
        assert provider.name == "reference"
        assert [name for name, _ in reasons] == [one.name for one in providers.providers()[:-1]]
        assert {reason for _, reason in reasons} == {"device meta is not cpu", "device meta is not cuda"}

    def test_a_call_that_nobody_serves_is_refused_with_every_reason(self) -> None:
        call = a_call(device=torch.device("meta"), activations="int8")
        with pytest.raises(
            LoweringError, match=r"no provider serves .*(?s:.)*cpu: device meta.*\n.*\n.*\n.*reference: it does"
        ):
            providers.choose(call)

    def test_a_registered_provider_comes_first_and_replaces_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Mine(ReferenceProvider):
            name = "mine"

        monkeypatch.setattr(providers, "_PROVIDERS", list(providers.providers()))
        before = [one.name for one in providers.providers()]
        first, second = Mine(), Mine()
        providers.register(first)
        providers.register(second)
        assert [one.name for one in providers.providers()] == ["mine", *before]
        assert providers.choose(a_call())[0] is second


def problem(
    m: int, group_size: int, groups: int, out_features: tuple[int, ...], shared: bool, biases: tuple[bool, ...]
) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
    in_features = group_size * groups
    x = graphs.rows(m, in_features, seed=m).bfloat16()
    rotations, weights, bias = [], [], []
    for index, out in enumerate(out_features):
        if index == 0 or not shared:
            tensors = random_rotation(in_features, group_size, 3, seed=index)
            rotations.append([tensors[name] for name in ("pairs", "theta", "channel_scales")])
        matrix = graphs.matrix(out, in_features, seed=index).detach()
        grid = affine.choose_qparams(matrix, 4, group_size)
        codes = affine.quantize(matrix, *grid, 4, group_size)
        weights.append(list(packing.pack_linear(codes, *grid, bits=4)))
        if biases[index]:
            bias.append(graphs.vector(out, seed=index).detach().half())
    return x, rotations, weights, bias


@given(
    m=st.sampled_from((0, 1, 2, 7, 33)),
    group_size=st.sampled_from((32, 64, 128)),
    groups=st.integers(1, 3),
    out_features=st.lists(st.sampled_from((16, 32, 48)), min_size=1, max_size=3).map(tuple),
    shared=st.booleans(),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_aten_equals_the_reference(
    m: int, group_size: int, groups: int, out_features: tuple[int, ...], shared: bool, biases: tuple[bool, ...]
) -> None:
    biases = biases[: len(out_features)]
    x, rotations, weights, bias = problem(m, group_size, groups, out_features, shared, biases)
    expected = ops.rotate_int4_siblings(
        x.float(), *(list(part) for part in zip(*rotations, strict=True)),
        *(list(part) for part in zip(*weights, strict=True)), bias, list(biases), group_size,
    )  # fmt: skip
    forms = zip(*(pack_rotation(*rotation, group_size) for rotation in rotations), strict=True)
    packed = zip(*(pack_weight(*weight) for weight in weights), strict=True)
    arguments = (x, *map(list, forms), *map(list, packed), bias, list(biases), group_size)
    found = torch.ops.parofx.aten_int4_siblings(*arguments)
    for one, reference in zip(found, expected, strict=True):
        assert one.shape == reference.shape
        assert one.dtype == torch.bfloat16
        if m:
            assert float((one.float() - reference).norm() / reference.norm()) < BF16


def test_aten_passes_opcheck() -> None:
    x, rotations, weights, bias = problem(3, 32, 2, (16, 32), False, (True, False))
    forms = zip(*(pack_rotation(*rotation, 32) for rotation in rotations), strict=True)
    packed = zip(*(pack_weight(*weight) for weight in weights), strict=True)
    arguments = (x, *map(list, forms), *map(list, packed), bias, [True, False], 32)
    torch.library.opcheck(torch.ops.parofx.aten_int4_siblings.default, arguments)


def test_the_reference_passes_opcheck_with_gradients() -> None:
    x, rotations, weights, bias = problem(3, 32, 2, (16, 32), True, (True, False))
    lists = [list(part) for part in (*zip(*rotations, strict=True), *zip(*weights, strict=True))]
    x = x.float().requires_grad_()
    torch.library.opcheck(torch.ops.parofx.reference_int4_siblings.default, (x, *lists, bias, [True, False], 32))


class TestConstants:
    """Tensors that a provider makes from others, in the graph once."""

    @staticmethod
    def emit(call: SiblingCall, make: Any, layout: str = "doubled") -> tuple[Node, ...]:
        with call.gm.graph.inserting_before(call.node):
            return call.constants(layout, call.weights[0], make)

    def test_they_are_made_once_and_shared_between_graphs(self) -> None:
        call, made = a_call(), []

        def make() -> tuple[Tensor, ...]:
            made.append(1)
            return (torch.ones(2), torch.zeros(2))

        first, second = self.emit(call, make), self.emit(call, make)
        assert made == [1]
        assert [node.target for node in first] == [node.target for node in second]
        assert [node.target for node in first] == [f"parofx_packed.q.qweight.doubled_{index}" for index in range(2)]

    def test_another_layout_is_another_tensor(self) -> None:
        call = a_call()
        (first,) = self.emit(call, lambda: (torch.ones(2),))
        (second,) = self.emit(call, lambda: (torch.zeros(2),), "other")
        assert first.target != second.target

    def test_what_is_made_anew_does_not_replace_what_the_graph_reads(self) -> None:
        call = a_call()
        (first,) = self.emit(call, lambda: (torch.ones(2),))
        call.tensor(call.weights[0][0]).add_(0)  # a new version: what was made of it is stale
        (second,) = self.emit(call, lambda: (torch.zeros(2),))
        assert first.target != second.target
        assert get_attribute(call.gm, first.target).sum() == 2
        assert get_attribute(call.gm, second.target).sum() == 0
