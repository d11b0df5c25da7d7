"""Mesh sizes, refusals, and the world of one rank."""

import math
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.parallel.passes import build, fill, microbatch
from torchsft.config import InputError, Parallel
from torchsft.parallel.world import World, deterministic, fresh_store, mesh_sizes


@pytest.mark.parametrize(
    ("world_size", "parallel", "dp_shard", "edp"),
    [
        (1, {}, 1, 1),
        (8, {}, 8, 8),
        (8, {"ep": 4}, 8, 2),
        (8, {"ep": 8}, 8, 1),
        (4, {"dp_shard": 4, "ep": 2}, 4, 2),
        (256, {"pp": 4, "dp_replicate": 2, "cp": 2, "tp": 4, "ep": 16}, 4, 2),
    ],
)
def test_mesh_sizes(world_size, parallel, dp_shard, edp):
    meshes = mesh_sizes(Parallel(**parallel), world_size)
    pp, dp_replicate, cp, tp, ep = (
        parallel.get(axis, 1) for axis in ("pp", "dp_replicate", "cp", "tp", "ep")
    )
    assert meshes == {
        "dense": {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp},
        "parameter": {"pp": pp, "dp_replicate": dp_replicate, "fsdp": dp_shard * cp, "tp": tp},
        "expert": {"pp": pp, "dp_replicate": dp_replicate, "edp": edp, "ep": ep},
        "sequence": {"data": pp * dp_replicate * dp_shard, "sequence": cp * tp},
    }
    assert {math.prod(axes.values()) for axes in meshes.values()} == {world_size}


@pytest.mark.parametrize(
    ("world_size", "parallel", "sentence"),
    [
        (
            4,
            {"dp_shard": 3},
            "multiply to 3, but there are 4 ranks; set --parallel.dp-shard -1 "
            "or 4, or start 3 ranks",
        ),
        (
            8,
            {"pp": 3, "tp": 2},
            r"multiply to 6, but there are 8 ranks; start 12 ranks or lower "
            r".* \(together 6\)",
        ),
        (2, {"pp": 4}, "multiply to 4, but there are 2 ranks; start 4 ranks or lower pp"),
        (
            4,
            {"ep": 3},
            r"ep is 3, but it must divide dp_shard \* cp \* tp = 4; set it to one of 1, "
            r"2, 4",
        ),
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


def test_restarted_ranks_find_nothing_of_those_before():
    """torchrun's store outlives the ranks, and what dead ranks wrote in it. Some attempts end
    before all ranks have come.
    """
    store, size, seen = dist.HashStore(), 4, []

    def start(rank, timeout=20.0):
        return fresh_store(store, rank, size, timedelta(seconds=timeout))

    with ThreadPoolExecutor(size) as threads:
        for attempt, ranks in enumerate([range(4), (1, 2, 3), range(4), (0, 2), (2,), range(4)]):
            complete = len(ranks) == size
            starts = [
                threads.submit(start, rank, 20.0 if complete else 0.3) for rank in reversed(ranks)
            ]
            if not complete:
                failures = [s.exception() for s in starts]
                assert any(
                    isinstance(f, TimeoutError) and "look at their logs" in str(f) for f in failures
                )
                continue
            stores = [s.result() for s in starts]
            assert not any(s.check(["address"]) for s in stores)
            stores[0].set("address", str(attempt))
            assert {s.get("address") for s in stores} == {str(attempt).encode()}
            seen.append(attempt)
    assert seen == [0, 2, 5]


def test_a_port_in_use_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            InputError, match=f"port {port} is in use by another program .* --standalone"
        ):
            World(Parallel(), 0)


@pytest.mark.parametrize("family", ["deepseek_v32", "gpt_oss"])
def test_deterministic_runs_are_equal_bit_by_bit_and_the_switch_is_undone(monkeypatch, family):
    """torch raises where an operation of the model has no deterministic kind."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def gradients():
        model = build(family=family)
        fill(model)
        for moe in model.moe_layers().values():
            moe.balance_scale = moe.z_scale = 0.1
        model(**microbatch(0)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert all(map(torch.equal, gradients(), gradients()))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
