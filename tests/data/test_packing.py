"""Packing: nothing lost, nothing too long, rows full, the same each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchsft.config import InputError
from torchsft.data.packing import pack


def fill(lengths, rows, seq_len):
    return sum(lengths) / (len(rows) * seq_len)


@given(
    lengths=st.lists(st.integers(1, 50), max_size=80),
    buffer=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_every_sample_is_in_exactly_one_row_that_can_hold_it(lengths, buffer, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack(lengths, order, 50, buffer=buffer)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 50 for row in rows)
    assert rows == pack(lengths, order.tolist(), 50, buffer=buffer)
    if buffer >= len(lengths):  # no two rows would fit into one
        assert len(rows) <= 2 * sum(lengths) / 50 + 1


def test_only_the_samples_of_the_order_are_packed():
    assert sorted(i for row in pack([3, 1, 4, 1, 5], [4, 0, 2], 6) for i in row) == [0, 2, 4]


def test_best_fit_decreasing_solves_a_case_that_first_come_first_served_does_not():
    assert sorted(map(sorted, pack([4, 6, 3, 7, 5, 5], range(6), 10))) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("buffer", [1024, 8192])
def test_long_tailed_lengths_fill_rows_to_99_percent(buffer):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, 20_000).astype(int), 1, 4096).tolist()
    assert fill(lengths, pack(lengths, rng.permutation(20_000), 4096, buffer=buffer), 4096) >= 0.99


def test_a_window_bounds_how_far_a_sample_moves():
    lengths = np.random.default_rng(0).integers(1, 400, 5000).tolist()
    rows = pack(lengths, range(5000), 1000, buffer=500)
    place = {sample: i / len(rows) * 5000 for i, row in enumerate(rows) for sample in row}
    # Its own window of 500 and, for the row that stays open, the next one; half of one for rows of unequal counts.
    assert max(abs(place[sample] - sample) for sample in range(5000)) < 1250


def test_a_sample_longer_than_a_row_is_refused_with_both_numbers():
    with pytest.raises(InputError, match="sample 1 has 11 tokens, but a row holds 1 to 10"):
        pack([5, 11], [0, 1], 10)
