"""parofx: a compiler pass for PyTorch that quantizes linear layers to 4 bit with learned pairwise rotations.

    parofx.quantize(model, calibration=texts, tokenizer=tokenizer)
    fast = torch.compile(model, backend="paro")

Importing this package imports neither Triton nor Transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from parofx import integrations as _integrations

if TYPE_CHECKING:
    from parofx.api import Explanation, calibrate, convert, explain, lower, prepare
    from parofx.checkpoint import load_pretrained, save_pretrained
    from parofx.config import CalibrationConfig, ParoConfig
    from parofx.dequantization import dequantize
    from parofx.eager import set_eager_activations
    from parofx.errors import ParoError
    from parofx.nn import ParoLinear
    from parofx.passes.capture import capture
    from parofx.pipeline import Pipeline
    from parofx.planning import QuantizationPlan, plan_quantization
    from parofx.quantization import quantize
    from parofx.report import FloatReason, QuantizationReport

__version__ = "0.1.0"

_PUBLIC = {
    "CalibrationConfig": "parofx.config",
    "Explanation": "parofx.api",
    "FloatReason": "parofx.report",
    "ParoConfig": "parofx.config",
    "ParoError": "parofx.errors",
    "ParoLinear": "parofx.nn",
    "Pipeline": "parofx.pipeline",
    "QuantizationPlan": "parofx.planning",
    "QuantizationReport": "parofx.report",
    "calibrate": "parofx.api",
    "capture": "parofx.passes.capture",
    "convert": "parofx.api",
    "dequantize": "parofx.dequantization",
    "explain": "parofx.api",
    "load_pretrained": "parofx.checkpoint",
    "lower": "parofx.api",
    "plan_quantization": "parofx.planning",
    "prepare": "parofx.api",
    "quantize": "parofx.quantization",
    "save_pretrained": "parofx.checkpoint",
    "set_eager_activations": "parofx.eager",
}

__all__ = [
    "CalibrationConfig",
    "Explanation",
    "FloatReason",
    "ParoConfig",
    "ParoError",
    "ParoLinear",
    "Pipeline",
    "QuantizationPlan",
    "QuantizationReport",
    "__version__",
    "calibrate",
    "capture",
    "convert",
    "dequantize",
    "explain",
    "load_pretrained",
    "lower",
    "plan_quantization",
    "prepare",
    "quantize",
    "save_pretrained",
    "set_eager_activations",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'parofx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_integrations.register()
