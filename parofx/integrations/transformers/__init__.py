"""PARO checkpoints in transformers: the `paroquant` quantizer behind every Auto class's `from_pretrained`.

Importing this registers the quantizer.
"""

from parofx.integrations.transformers.models import dequantize, load, save
from parofx.integrations.transformers.quantizer import (
    ParoHfQuantizer,
    ParoQuantizationConfig,
    mark_quantized,
    register,
)

__all__ = [
    "ParoHfQuantizer",
    "ParoQuantizationConfig",
    "dequantize",
    "load",
    "mark_quantized",
    "register",
    "save",
]

register()
