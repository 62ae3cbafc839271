"""What a weight alone tells of the inputs it multiplies."""

from __future__ import annotations

from torch import Tensor

#: How fast the guessed power grows with the inverse energy of a weight column, and how far.
GUESS_EXPONENT = 4
LARGEST_GUESS = 10.0


def guess_power(weight: Tensor) -> Tensor:
    """Guess the relative power `E[x²]` of input channels, fp32 `(K,)`: 1, and up to ten times that.

    A channel of massive activations, which can carry most of a layer's input power, has one of the smallest columns
    of the weight; so columns of less energy than the median one are guarded. Columns of more energy tell nothing.

    Args:
        weight: all rows that read the input, `(N, K)`.
    """
    energy = weight.float().square().sum(0)
    smallness = (energy.median() / energy.clamp(min=1e-30)) ** GUESS_EXPONENT
    return smallness.clamp(1.0, LARGEST_GUESS)
