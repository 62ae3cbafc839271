"""The kernels' layouts of weights by the width of their codes."""

from parofx.cpu_ops.layout import pack_weight, unpack_weight
from parofx.cpu_ops.layout_bytes import pack_byte_weight, unpack_byte_weight
from parofx.cpu_ops.layout_planes import pack_plane_weight, unpack_plane_weight

#: Bits → `(qweight, qzeros, scales, group_size)` to the kernels' `(weight, scales, zeros)`.
PACK = {3: pack_plane_weight, 4: pack_weight, 8: pack_byte_weight}
#: Bits → `(weight, scales, zeros, group_size, in_features, out_features)` to the checkpoint's tensors.
UNPACK = {3: unpack_plane_weight, 4: unpack_weight, 8: unpack_byte_weight}
