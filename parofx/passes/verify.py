"""`verify`: the invariants of a stage, and the proof that a rewrite kept the output."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from parofx.errors import PassError, one_per_line
from parofx.passes.base import Stage, stage_of
from parofx.passes.graph import FAKE_QUANTIZE, INT4_LINEAR, LINEAR, ROTATE, SEMANTIC, nodes_calling
from parofx.passes.transforms import find_transforms


def census(gm: GraphModule) -> Counter[str]:
    """Count the graph's operators by name."""
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def verify_stage(gm: GraphModule) -> None:
    """Check the structural invariants of the graph's stage.

    Raises:
        PassError: listing every violation.
    """
    stage = stage_of(gm)
    gm.graph.lint()
    problems = list(_violations(gm, stage))
    if problems:
        raise PassError(f"the graph does not keep the invariants of {stage}:\n{one_per_line(problems)}")


def verify_equal(before: Any, after: Any, *, tolerance: float, what: str = "the rewrite") -> float:
    """Compare two outputs (nested tensors) and return the largest relative difference.

    The difference of two tensors is `max|a − b| / max|a|`, computed in fp64; NaN counts as infinite.

    Raises:
        PassError: if it exceeds the tolerance, or structure or shapes differ.
    """
    first, second = (pytree.tree_leaves(value) for value in (before, after))
    tensors = [(a, b) for a, b in zip(first, second, strict=False) if isinstance(a, Tensor)]
    if len(first) != len(second) or any(not isinstance(b, Tensor) or a.shape != b.shape for a, b in tensors):
        raise PassError(f"{what} changed the structure or shapes of the output")
    worst = 0.0
    for a, b in ((a.detach().double(), b.detach().double()) for a, b in tensors if a.numel()):
        relative = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
        worst = max(worst, relative if relative == relative else float("inf"))
    if worst > tolerance:
        raise PassError(f"{what} must keep the output to {tolerance:.1e}, got a relative difference of {worst:.3e}")
    return worst


def _violations(gm: GraphModule, stage: Stage) -> list[str]:
    present = {target: nodes_calling(gm.graph, target) for target in SEMANTIC}
    if stage is Stage.FLOAT:
        return [f"{node.name} is a parofx operator" for nodes in present.values() for node in nodes]
    if stage in (Stage.PREPARED, Stage.CALIBRATED):
        problems = [f"{node.name} is packed already" for node in present[INT4_LINEAR]]
        for transform in find_transforms(gm):
            for linear in transform.linears:
                off = linear.grid(gm)[0].numel() == 0
                if off != (stage is Stage.PREPARED):
                    problems.append(f"fake quantization of {linear.name} is {'off' if off else 'on'}")
        return problems
    if stage is Stage.CONVERTED:
        problems = [f"{node.name} still rounds a float weight" for node in present[FAKE_QUANTIZE]]
        for node in nodes_calling(gm.graph, LINEAR):
            source = node.args[0]
            if getattr(source, "target", None) is ROTATE:
                problems.append(f"{node.name} reads a rotated tensor but has a float weight")
        return problems
    return [f"{node.name} was not lowered" for nodes in present.values() for node in nodes]
