"""Triton kernels for CUDA and ROCm, on weights packed for them.

Importing this package does not import Triton; importing one of its kernel modules does.

| module | holds |
|-|-|
| `layout` | packing from and to the checkpoint's tensors; PyTorch only |
| `_device` | what kernels share: rounds in registers, dequantization, split-K |
| `rotate`, `rotate_dense` | the rotation on its own, as gathers or as tensor-core products |
| `int4_linear` | the int4 product of activations that are rotated already |
| `rotate_int4_linear` | both in one launch, for few tokens |
| `cost_model` | which of them, with which tiles: pure functions and the launch tables |
| `launch` | the functions to call: they choose by the cost model and launch |
"""
