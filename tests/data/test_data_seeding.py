import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from siman_convert.data.seeding import borrowed_generators, mix, permutation, sample_seeds, seed_generators

WORD = 2**64 - 1


def splitmix64(state: int) -> int:
    """The published generator's output function in Python integers."""
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
    return state ^ (state >> 31)


def test_splitmix64_gives_its_published_first_outputs():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # Vigna's splitmix64.c from seed 0
    assert mix(0) == 0xE220A8397B1DCDAF >> 1


@given(st.integers(-(2**80), 2**80), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_vectorised_seeds_equal_the_integer_ones(seed, epoch, indices):
    base = splitmix64(splitmix64(seed & WORD) ^ epoch) >> 1
    expected = [splitmix64(base ^ index) >> 1 for index in indices]
    assert sample_seeds(seed, epoch, np.array(indices)).tolist() == expected


def test_seeds_do_not_collide_over_neighbouring_seeds_and_epochs():
    drawn = {int(s) for seed in range(5) for epoch in range(5) for s in sample_seeds(seed, epoch, np.arange(2000))}
    assert len(drawn) == 50_000


def test_permutation_holds_each_index_once():
    order = permutation(3, 1, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15


def test_all_three_generators_are_seeded_and_put_back():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(1))

    seed_generators(5)
    expected = draw()
    seed_generators(77)
    before = draw()
    seed_generators(77)
    with borrowed_generators():
        seed_generators(5)
        assert draw() == expected
    assert draw() == before
    assert len({*expected, *before}) == 6
