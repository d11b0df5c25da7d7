"""The two-level exchange: the numbers of one process, in every layout and mode of memory."""

from __future__ import annotations

import pytest

from tests.parallel.passes import compare, on_nodes, training_pass


@pytest.mark.parametrize(
    ("n", "ranks_per_node", "parallel"),
    [
        (4, 2, {"dp_shard": 4, "ep": 4}),
        (4, 2, {"tp": 2, "cp": 2, "ep": 4}),
        (8, 2, {"dp_shard": 4, "tp": 2, "ep": 8}),
    ],
    ids=str,
)
def test_two_levels_give_the_gradients_of_one_process(ranks, n, ranks_per_node, parallel):
    expected = ranks(1, training_pass, parallel={}, balance=0.1)[0]
    arguments = {"ranks_per_node": ranks_per_node, "balance": 0.1, "call": training_pass}
    compare(ranks(n, on_nodes, parallel=parallel, **arguments), expected)
