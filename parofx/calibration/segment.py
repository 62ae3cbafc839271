"""A segment of the graph while calibration runs it."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Interpreter

from parofx.passes.graph import LINEAR
from parofx.precision import ATTENTION, attention, linear


class SegmentInterpreter(Interpreter):
    """Runs a segment, its linears and attention at the precision that the device is fast at."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        # What is raised names the transform; the traceback of the model's own code would only hide it.
        self.extra_traceback = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call what a node calls."""
        if target is LINEAR and not kwargs:
            return linear(*args)
        if target is ATTENTION:
            return attention(*args, **kwargs)
        return super().call_function(target, args, kwargs)
