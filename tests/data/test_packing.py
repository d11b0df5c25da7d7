"""Packing: nothing lost, nothing too long, rows full, the same each time; and rows dealt so that
ranks have equal work.
"""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.listed import Listed, numbered
from torchsft.config import InputError
from torchsft.data.packing import balance_rows, pack
from torchsft.data.stream import TrainLoader

METHODS = ["best-fit", "first-fit", "none"]


@given(
    lengths=st.lists(st.integers(1, 50), max_size=80),
    method=st.sampled_from(METHODS),
    opened=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_every_sample_is_in_exactly_one_row_that_can_hold_it(lengths, method, opened, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    opened = (
        0
        if method == "none" or sum(lengths[i] for i in order[:opened]) > 50
        else min(opened, len(lengths))
    )
    rows = pack(lengths, order, 50, method, opened)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 50 for row in rows)
    assert all(type(i) is int for row in rows for i in row)  # goes into JSON
    assert rows == pack(np.array(lengths, dtype=np.int32), order.tolist(), 50, method, opened)
    if opened:
        assert rows[0][:opened] == order[:opened].tolist()
    if method == "none":
        assert rows == [[i] for i in order]
    else:  # no two rows would fit into one
        assert all(sum(lengths[i] for i in a + b) > 50 for a, b in combinations(rows, 2))


def test_only_the_samples_of_the_order_are_packed():
    for method in METHODS:
        assert sorted(i for row in pack([3, 1, 4, 1, 5], [4, 0, 2], 6, method) for i in row) == [
            0,
            2,
            4,
        ]
    assert pack([], [], 6) == []


def test_best_fit_decreasing_solves_a_case_that_first_fit_does_not():
    lengths = [4, 6, 3, 7, 5, 5]
    assert sorted(map(sorted, pack(lengths, range(6), 10))) == [[0, 1], [2, 3], [4, 5]]
    assert pack([4, 3, 6, 7], range(4), 10, "first-fit") == [[0, 1], [2], [3]]


@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_the_quick_ways_are_the_textbook_ways(lengths):
    """First-fit and best-fit decreasing, each by looking at every row."""
    first, best = [], []
    for i, n in enumerate(lengths):
        for row in first:
            if sum(lengths[j] for j in row) + n <= 20:
                row.append(i)
                break
        else:
            first.append([i])
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row in best if sum(lengths[j] for j in row) + lengths[i] <= 20]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[j] for j in row)).append(i)
        else:
            best.append([i])
    assert pack(lengths, range(len(lengths)), 20, "first-fit") == first
    assert pack(lengths, range(len(lengths)), 20, "best-fit") == best


RNG = np.random.default_rng(0)
LENGTHS = {
    # its shortest, middle, longest
    "gsm8k-like": np.clip(RNG.lognormal(5.03, 0.37, 20_000).astype(int), 51, 521).tolist(),
    "long-tailed": np.clip(RNG.lognormal(5.5, 1.2, 20_000).astype(int), 1, 4096).tolist(),
}


@pytest.mark.parametrize("buffer", [2048, 8192])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_of_an_epoch_are_filled_to_99_percent(lengths, buffer):
    sizes = {"seq_len": 4096, "global_batch_size": 1, "micro_batch_size": 1, "buffer": buffer}
    loader = TrainLoader(
        [Listed(numbered(lengths))], data_rank=0, data_size=1, seed=0, pad_token_id=0, **sizes
    )
    assert sum(lengths) / (loader.steps_in_epoch(0) * 4096) >= 0.99


def test_a_sample_longer_than_a_row_is_refused_with_both_numbers():
    for method in METHODS:
        with pytest.raises(InputError, match="sample 1 has 11 tokens, but a row holds 1 to 10"):
            pack([5, 11], [0, 1], 10, method)


@given(
    costs=st.lists(st.floats(0, 100), min_size=1, max_size=60),
    ranks=st.integers(1, 5),
    together=st.integers(1, 3),
)
def test_every_row_is_dealt_once_and_no_rank_does_more_than_a_row_beyond_another(
    costs, ranks, together
):
    costs = costs + [0.0] * (-len(costs) % (ranks * together))
    dealt = balance_rows(costs, ranks, together)
    assert {len(rows) for rows in dealt} == {len(costs) // ranks}
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs)))
    rounds = [
        sorted((costs[r] for rows in dealt for r in rows[i : i + together]), reverse=True)
        for i in range(0, len(dealt[0]), together)
    ]
    # like rows at the same time
    assert [cost for each in rounds for cost in each] == sorted(costs, reverse=True)
    totals = [sum(costs[r] for r in rows) for rows in dealt]
    if together == 1:
        assert max(totals) - min(totals) <= max(costs) + 1e-9


def test_dealing_by_cost_is_nearer_to_equal_than_dealing_in_a_row():
    """Attention costs the squares: long documents in one rank's rows keep the others waiting."""
    rows = pack(LENGTHS["long-tailed"], range(4096), 4096)[:256]
    costs = [sum(LENGTHS["long-tailed"][i] ** 2 for i in row) for row in rows]
    order = np.random.default_rng(0).permutation(256)

    def slowest(dealt):
        """Time of a step over that of equal ranks, where ranks wait for each other at every
        microbatch.
        """
        return sum(max(costs[rows[i]] for rows in dealt) for i in range(len(dealt[0]))) / (
            sum(costs) / len(dealt)
        )

    assert slowest(balance_rows(costs, 8, 1)) < 1.1 < 1.5 < slowest(order.reshape(8, 32).tolist())
    totals = [sum(costs[row] for row in rows) for rows in balance_rows(costs, 8, 1)]
    assert max(totals) / min(totals) < 1.02
