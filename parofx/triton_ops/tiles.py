"""Launch parameters of each kernel: what a row of a launch table holds. Nothing here needs Triton."""

from __future__ import annotations

from dataclasses import dataclass

from parofx.errors import ConfigError

#: The narrow side of a tensor-core product on NVIDIA: what the fused kernel has for tokens and K tiles together.
OPERAND_ROWS = 8
#: And on AMD, where the same launch parameters leave half of it to copies.
_AMD_OPERAND_ROWS = 16
#: Tokens that the fused kernel takes.
MAX_FUSED_TOKENS = 4


@dataclass(frozen=True)
class RotateTiles:
    """Of `rotate`: rows per program and warps."""

    block_m: int
    num_warps: int


@dataclass(frozen=True)
class DenseTiles:
    """Of `rotate_dense`: rows per program, warps and pipeline stages."""

    block_m: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class LinearTiles:
    """Of `int4_linear`.

    Args:
        block_m: tokens of an output tile; at least 16, or 8 with `swap_ab`.
        block_n: its output columns; with `swap_ab` at least 16.
        split_k: programs that share an output tile; 0 leaves it to the cost model.
        swap_ab: compute the transposed product.
        num_warps: warps of a program.
        num_stages: depth of the pipeline that loads weights.
    """

    block_m: int
    block_n: int
    split_k: int
    swap_ab: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DequantizeTiles:
    """Of `dequantize`: output columns of a program, and its warps."""

    block_n: int
    num_warps: int


@dataclass(frozen=True)
class FusedTiles:
    """Of `rotate_int4_linear`.

    Args:
        block_n: output columns of a program.
        slice_tiles: K tiles of 128 channels of a program; times the tokens, rounded up to a power of two, at most 8.
        num_warps: warps of a program.
        num_stages: depth of the pipeline that loads weights.
    """

    block_n: int
    slice_tiles: int
    num_warps: int
    num_stages: int

    def check(self, tokens: int) -> None:
        """Check that the tiles serve a number of tokens.

        Raises:
            ConfigError: if they do not.
        """
        if not 1 <= tokens <= MAX_FUSED_TOKENS:
            raise ConfigError(f"rotate_int4_linear takes 1 to {MAX_FUSED_TOKENS} tokens, got {tokens}")
        if padded_rows(tokens) * self.slice_tiles > OPERAND_ROWS:
            raise ConfigError(
                f"slice_tiles times the tokens, as a power of two, must be at most {OPERAND_ROWS}, "
                f"got {self.slice_tiles} and {tokens}"
            )


def operand_slots(*, ptx: bool) -> int:
    """Return the narrow side of a tensor-core product: for NVIDIA, whose kernels use PTX, or for AMD."""
    return OPERAND_ROWS if ptx else _AMD_OPERAND_ROWS


def padded_rows(tokens: int) -> int:
    """Return the smallest power of two that holds `tokens`."""
    return 1 << (tokens - 1).bit_length()
