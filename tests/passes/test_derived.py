from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from parofx.passes.derived import State, derived, unchanged


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[int]:
        self.calls += 1
        return (self.calls,)


def test_a_value_is_made_once_per_kind_and_sources() -> None:
    first, second, make = torch.ones(2), torch.ones(2), Counting()
    assert derived("a", [first, second], make) is derived("a", [first, second], make)
    assert derived("b", [first, second], make) == (2,)
    assert derived("a", [second, first], make) == (3,)
    assert make.calls == 3


@pytest.mark.parametrize("which", [0, 1])
def test_a_write_to_any_source_makes_it_anew(which: int) -> None:
    sources, make = [torch.ones(2), torch.ones(2)], Counting()
    derived("a", sources, make)
    sources[which].mul_(2)
    assert derived("a", sources, make) == (2,)
    assert derived("a", sources, make) == (2,)


@pytest.mark.parametrize("which", [0, 1])
def test_another_tensor_of_equal_values_is_another_source(which: int) -> None:
    sources, make = [torch.ones(2), torch.ones(2)], Counting()
    derived("a", sources, make)
    sources[which] = sources[which].clone()
    assert derived("a", sources, make) == (2,)


def test_another_memory_under_the_same_tensor_is_noticed() -> None:
    source, make = torch.ones(2), Counting()
    derived("a", [source], make)
    source.data = torch.zeros(2)
    assert derived("a", [source], make) == (2,)


def test_a_value_dies_with_its_first_source() -> None:
    class Value:
        pass

    source = torch.ones(2)
    value = weakref.ref(derived("a", [source], Value))
    assert value() is not None
    del source
    gc.collect()
    assert value() is None


def test_sources_are_not_kept_alive() -> None:
    source, other = torch.ones(2), torch.ones(2)
    derived("a", [source, other], Counting())
    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        source = torch.ones(2)
    make = Counting()
    assert derived("a", [source], make) is derived("a", [source], make)


def test_an_error_leaves_nothing_behind() -> None:
    source = torch.ones(2)

    def fail() -> Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        derived("a", [source], fail)
    assert derived("a", [source], Counting()) == (1,)


def test_threads_make_it_once() -> None:
    source, make, results = torch.ones(2), Counting(), []
    threads = [threading.Thread(target=lambda: results.append(derived("a", [source], make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(1,)] * 8


def test_states() -> None:
    first, second = torch.ones(2), torch.ones(2)
    states = [State.of(first), State.of(second)]
    assert unchanged(states, [first, second])
    assert not unchanged(states, [second, first])
    assert not unchanged(states, [first])
    assert unchanged([], [])
    second.add_(1)
    assert not unchanged(states, [first, second])
