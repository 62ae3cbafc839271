from __future__ import annotations

import graphs
import pytest
import torch

from parofx.errors import PassError
from parofx.passes import Convert, InsertTransforms, Lower, MergeSiblings, Stage, census, verify_equal, verify_stage
from parofx.passes.base import set_stage
from parofx.passes.graph import INT4_LINEAR
from parofx.passes.transforms import find_transforms


def stages() -> dict[Stage, torch.fx.GraphModule]:
    found = {}
    for stage in Stage:
        gm = graphs.enter("export", graphs.Stack(1).eval(), graphs.rows(3, 64)).gm
        if stage is not Stage.FLOAT:
            InsertTransforms(graphs.config()).run(gm)
        if stage not in (Stage.FLOAT, Stage.PREPARED):
            graphs.round_to_nearest(gm)
        if stage in (Stage.CONVERTED, Stage.LOWERED):
            Convert().run(gm)
        if stage is Stage.LOWERED:
            MergeSiblings().run(gm)
            Lower(provider="reference").run(gm)
        found[stage] = gm
    return found


#: (claimed, actual) stages that nothing tells apart: a graph without operators of parofx is one in which nothing was
#: quantized, and a lowered one holds operators of a provider only.
ALIKE = {(claimed, actual) for claimed in Stage for actual in (Stage.FLOAT, Stage.LOWERED)}


def test_every_stage_keeps_its_own_invariants_and_breaks_the_others() -> None:
    for actual, gm in stages().items():
        verify_stage(gm)
        for claimed in set(Stage) - {actual}:
            set_stage(gm, claimed)
            if (claimed, actual) in ALIKE:
                verify_stage(gm)
                continue
            with pytest.raises(PassError, match=f"does not keep the invariants of {claimed}"):
                verify_stage(gm)


def test_each_violation_is_named() -> None:
    gm = stages()[Stage.PREPARED]
    linear = find_transforms(gm)[0].linears[1]
    linear.set_grid(gm, torch.ones(128, 1), torch.ones(128, 1))
    with pytest.raises(PassError, match=r"of PREPARED:\n  - fake quantization of whatever.0.up is on$"):
        verify_stage(gm)
    set_stage(gm, Stage.CALIBRATED)
    with pytest.raises(PassError, match=r"(?s)fake quantization of whatever.0.gate is off\n.*whatever.0.down is off$"):
        verify_stage(gm)
    set_stage(gm, Stage.CONVERTED)
    with pytest.raises(PassError, match=r"fake_quantize\w* still rounds a float weight"):
        verify_stage(gm)
    set_stage(gm, Stage.FLOAT)
    with pytest.raises(PassError, match=r"rotate\w* is a parofx operator"):
        verify_stage(gm)
    set_stage(gm, Stage.LOWERED)
    with pytest.raises(PassError, match=r"rotate\w* was not lowered"):
        verify_stage(gm)
    gm = stages()[Stage.CONVERTED]
    set_stage(gm, Stage.PREPARED)
    with pytest.raises(PassError, match=r"int4_linear\w* is packed already"):
        verify_stage(gm)


def test_a_float_linear_on_a_rotated_tensor_is_a_violation() -> None:
    gm = stages()[Stage.PREPARED]
    for transform in find_transforms(gm):
        for linear in transform.linears:
            linear.fake_quantize.replace_all_uses_with(linear.parameter_node)
    gm.graph.eliminate_dead_code()
    set_stage(gm, Stage.CONVERTED)
    with pytest.raises(PassError, match=r"linear\w* reads a rotated tensor but has a float weight"):
        verify_stage(gm)


def test_census_counts_operators() -> None:
    counts = census(stages()[Stage.CONVERTED])
    assert counts[str(INT4_LINEAR)] == 3
    assert counts["parofx.rotate.default"] == 2


class TestVerifyEqual:
    def test_the_largest_relative_difference_is_returned(self) -> None:
        a = {"x": torch.tensor([1.0, -2.0]), "y": (torch.ones(2), "text", None)}
        b = {"x": torch.tensor([1.0, -2.002]), "y": (torch.ones(2), "text", None)}
        assert verify_equal(a, b, tolerance=0.01) == pytest.approx(1e-3, rel=1e-3)
        assert verify_equal(a, a, tolerance=0) == 0

    @pytest.mark.parametrize("after", [torch.tensor([1.0, 3.0]), torch.tensor([1.0, torch.nan])])
    def test_too_far(self, after: torch.Tensor) -> None:
        with pytest.raises(PassError, match=r"merging must keep the output to 1.0e-03, got a relative difference of "):
            verify_equal(torch.tensor([1.0, 2.0]), after, tolerance=1e-3, what="merging")

    @pytest.mark.parametrize("after", [torch.ones(3), (torch.ones(2), torch.ones(2)), None])
    def test_another_structure(self, after: object) -> None:
        with pytest.raises(PassError, match="the rewrite changed the structure or shapes of the output"):
            verify_equal(torch.ones(2), after, tolerance=1)

    def test_gradients_do_not_matter(self) -> None:
        before = torch.ones(2, requires_grad=True)
        assert verify_equal(before * 2, (before * 2).detach(), tolerance=0) == 0

    def test_empty_tensors_are_equal(self) -> None:
        assert verify_equal(torch.empty(0, 3), torch.empty(0, 3), tolerance=0) == 0
