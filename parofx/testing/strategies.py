"""Hypothesis strategies for the cases of `parofx.testing.cases`.

Every argument narrows what is drawn to what a kernel supports; the defaults are all that the operators' contract
allows. The first entry of each tuple is the one a failing case shrinks towards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from parofx.testing.cases import ANGLES, CODES, LAYOUTS, VALUES, Layout, LinearCase, RotateLinearCase, RotationCase

#: Every even group size is legal; checkpoints use the last three, the others find what those hide.
GROUP_SIZES = (2, 4, 6, 10, 32, 64, 128)
#: Checkpoints have 8 rounds; 0 leaves the channel scales alone.
KROTS = (1, 0, 2, 3, 8)
#: Activation dtypes.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Dtypes of `theta` and of the channel scales: the checkpoint's, and the ones they are trained in.
ROTATION_DTYPES = (torch.float16, torch.float32, torch.float64)
#: Token counts at which kernels change tile, or run past the last one.
TOKENS = (1, 0, 2, 3, 7, 16, 17, 33)

_Case = TypeVar("_Case", RotationCase, LinearCase, RotateLinearCase)


def batches(tokens: Sequence[int] = TOKENS) -> SearchStrategy[tuple[int, ...]]:
    """Draw leading dimensions: a row of tokens, a batch of rows, or none at all (one vector)."""
    counts = st.sampled_from(tokens)
    return st.one_of(counts.map(lambda count: (count,)), st.just(()), st.tuples(st.integers(1, 3), counts))


def rotation_cases(
    *,
    krots: Sequence[int] = KROTS,
    rotation_dtypes: Sequence[torch.dtype] = ROTATION_DTYPES,
    **narrowed: Any,
) -> SearchStrategy[RotationCase]:
    """Draw calls of `rotate`.

    Args:
        krots: numbers of rounds.
        rotation_dtypes: of `theta` and of the channel scales.
        narrowed: `batch`, `group_sizes`, `max_groups`, `dtypes`, `layouts`, `device`; see `linear_cases`.
    """
    return _build(RotationCase, _inputs(**narrowed) | _rotations(krots, rotation_dtypes))


def linear_cases(*, max_words: int = 5, bits: Sequence[int] = (4,), **narrowed: Any) -> SearchStrategy[LinearCase]:
    """Draw calls of `int4_linear`.

    Args:
        max_words: largest `words` of a case, N/8 with 4 bits.
        bits: widths of codes; calls of other than 4 get a last argument that says so.
        narrowed: `batch` (a strategy, by default `batches()`), `group_sizes`, `max_groups` (3: K is then often no
            power of two times the group), `dtypes`, `layouts` and `device`.
    """
    return _build(LinearCase, _inputs(**narrowed) | _weights(max_words, bits))


def rotate_linear_cases(
    *,
    krots: Sequence[int] = KROTS,
    rotation_dtypes: Sequence[torch.dtype] = ROTATION_DTYPES,
    max_words: int = 5,
    bits: Sequence[int] = (4,),
    **narrowed: Any,
) -> SearchStrategy[RotateLinearCase]:
    """Draw calls of `rotate_int4_linear`; the arguments are those of the two strategies above."""
    parts = _inputs(**narrowed) | _rotations(krots, rotation_dtypes) | _weights(max_words, bits)
    return _build(RotateLinearCase, parts)


def _inputs(
    *,
    batch: SearchStrategy[tuple[int, ...]] | None = None,
    group_sizes: Sequence[int] = GROUP_SIZES,
    max_groups: int = 3,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[Layout] = LAYOUTS,
    device: str = "cpu",
) -> dict[str, SearchStrategy[Any]]:
    return {
        "batch": batches() if batch is None else batch,
        "groups": st.integers(1, max_groups),
        "group_size": st.sampled_from(group_sizes),
        "dtype": st.sampled_from(dtypes),
        "layout": st.sampled_from(layouts),
        "values": st.sampled_from(VALUES),
        "device": st.just(device),
        "seed": st.integers(0, 2**16),
    }


def _rotations(krots: Sequence[int], dtypes: Sequence[torch.dtype]) -> dict[str, SearchStrategy[Any]]:
    return {
        "krot": st.sampled_from(krots),
        "angles": st.sampled_from(ANGLES),
        "theta_dtype": st.sampled_from(dtypes),
        "scales_dtype": st.sampled_from(dtypes),
        "flat_scales": st.booleans(),
    }


def _weights(max_words: int, bits: Sequence[int]) -> dict[str, SearchStrategy[Any]]:
    return {
        "words": st.integers(1, max_words),
        "bits": st.sampled_from(bits),
        "bias": st.booleans(),
        "codes": st.sampled_from(CODES),
    }


def _build(case: Callable[..., _Case], parts: dict[str, SearchStrategy[Any]]) -> SearchStrategy[_Case]:
    return st.builds(case, **parts)
