"""PARO checkpoints: safetensors and JSON in and out, checked before anything is read or replaced."""

from parofx.checkpoint.pretrained import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
