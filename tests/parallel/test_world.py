"""Mesh sizes, refusals, and the world of one rank."""

import pytest
import torch

from torchsft.config import InputError, Parallel
from torchsft.parallel.world import World, mesh_sizes


@pytest.mark.parametrize(
    ("world_size", "parallel", "dp_shard", "edp"),
    [(1, {}, 1, 1), (8, {}, 8, 8), (8, {"ep": 4}, 8, 2), (8, {"ep": 8}, 8, 1), (4, {"dp_shard": 4, "ep": 2}, 4, 2)],
)
def test_mesh_sizes(world_size, parallel, dp_shard, edp):
    dense, expert = mesh_sizes(Parallel(**parallel), world_size)
    assert dense == {"pp": 1, "dp_replicate": 1, "dp_shard": dp_shard, "cp": 1, "tp": 1}
    assert expert == {"pp": 1, "dp_replicate": 1, "edp": edp, "ep": parallel.get("ep", 1)}


@pytest.mark.parametrize(
    ("world_size", "parallel", "sentence"),
    [
        (4, {"dp_shard": 3}, "multiply to 3, but 4 ranks were started"),
        (4, {"ep": 3}, r"ep is 3, but it must divide dp_shard \* cp \* tp = 4; set it to one of 1, 2, 4"),
        (2, {"ep": 4}, r"ep is 4, but it must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(world_size, parallel, sentence):
    with pytest.raises(InputError, match=sentence):
        mesh_sizes(Parallel(**parallel), world_size)


def test_a_world_of_one_rank_needs_no_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World(Parallel(), seed=7) as world:
        first = torch.rand(2)
        assert (world.rank, world.size, world.data_rank, world.data_size) == (0, 1, 0, 1)
        assert world.sum([1.0, 2.5]).tolist() == [1.0, 2.5]
    with World(Parallel(), seed=7):
        assert torch.equal(first, torch.rand(2))
