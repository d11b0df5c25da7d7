"""The layout benchmark: its count of bytes against numbers worked out by hand, and that it runs."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import (
    all_to_all_single,
    all_to_all_single_autograd,
    wait_tensor,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

from tools import benchmark_exchange
from tools.benchmark_layouts import layout, run
from tools.sent_bytes import SentBytes
from torchsft.config import Parallel
from torchsft.parallel.world import World


def test_multiply_adds_are_those_of_every_kind_of_product():
    x, y = torch.ones(6, 16), torch.ones(2, 16, 8)
    with SentBytes() as count:
        x @ y[0]
        torch.addmm(torch.ones(8), x, y[0])
        torch.nn.functional.grouped_mm(x, y, offs=torch.tensor([4, 6], dtype=torch.int32))
    assert count.multiply_adds == 3 * 6 * 16 * 8


def counted(call):
    with SentBytes() as bytes_of:
        call()
    return dict(bytes_of.sent), dict(bytes_of.calls)


def single_collectives():
    """What each of 2 ranks sends in one call; tensors of 6 rows of 5 fp32 numbers, 120 bytes."""
    with World(Parallel(timeout_seconds=60), 0) as world:
        x, half, twice = torch.ones(6, 5), torch.empty(3, 5), torch.empty(12, 5)
        mesh = init_device_mesh("cpu", (2,))
        splits = [[4, 2], [1, 5]]  # rows that rank 0 and rank 1 send to rank 0 and rank 1
        given, taken = splits[world.rank], [row[world.rank] for row in splits]
        y = torch.ones(6, 5, requires_grad=True)

        def there_and_back():
            wait_tensor(
                all_to_all_single_autograd(y, taken, given, dist.group.WORLD)
            ).sum().backward()

        def plain():
            dist.all_to_all_single(torch.empty(sum(taken), 5), x[: sum(given)], taken, given)

        def neighbours():
            send, receive = (
                dist.isend(x, 1 - world.rank),
                dist.irecv(torch.empty(6, 5), 1 - world.rank),
            )
            send.wait(), receive.wait()

        calls = {
            "gather": lambda: dist.all_gather_into_tensor(twice, x),
            "scatter": lambda: dist.reduce_scatter_tensor(half, x),
            "reduce": lambda: dist.all_reduce(x),
            "exchange": lambda: wait_tensor(all_to_all_single(x, None, None, dist.group.WORLD)),
            "uneven": there_and_back,
            "plain": plain,
            "list": lambda: dist.all_gather([torch.empty(6, 5), torch.empty(6, 5)], x),
            "send": neighbours,
            "placements": lambda: DTensor.from_local(x, mesh, [Shard(0)]).redistribute(
                placements=[Replicate()]
            ),
            "sum": lambda: (
                DTensor.from_local(x, mesh, [Partial()])
                .redistribute(placements=[Replicate()])
                .to_local()
                + 1
            ),
            "inside": lambda: DTensor.from_local(x, mesh, [Shard(0)]).sum().full_tensor(),
            "nobody": lambda: dist.all_reduce(
                x, group=dist.new_group([world.rank], use_local_synchronization=True)
            ),
        }
        return {name: counted(call) for name, call in calls.items()}


def test_what_a_collective_sends_is_counted(ranks):
    first, second = ranks(2, single_collectives)
    for result in (first, second):
        assert result["gather"] == ({"all-gather": 120}, {"all-gather": 1})
        assert result["list"] == result["gather"]
        assert result["scatter"] == ({"reduce-scatter": 60}, {"reduce-scatter": 1})
        assert result["reduce"] == ({"all-reduce": 120}, {"all-reduce": 1})  # 2 (n - 1) / n = 1
        assert result["exchange"] == ({"all-to-all": 60}, {"all-to-all": 1})
        assert result["send"] == ({"point-to-point": 120}, {"point-to-point": 1})
        assert result["placements"] == ({"all-gather": 120}, {"all-gather": 1})
        assert result["sum"] == ({"all-reduce": 120}, {"all-reduce": 1})
        assert result["inside"] == ({"all-reduce": 4}, {"all-reduce": 1})  # of one number
        assert result["nobody"] == ({}, {})
    # Forward the rows for the other rank, backward those that came from there: 2 and 1 rows of 20
    # bytes.
    assert first["plain"] == ({"all-to-all": 40}, {"all-to-all": 1})
    assert second["plain"] == ({"all-to-all": 20}, {"all-to-all": 1})
    assert first["uneven"] == second["uneven"] == ({"all-to-all": 60}, {"all-to-all": 2})


def unknown_collective():
    with World(Parallel(timeout_seconds=60), 0), SentBytes():
        try:
            dist.broadcast(torch.ones(3), 0)
        except AssertionError as error:
            return str(error)


def test_what_is_not_known_is_not_passed_over(ranks):
    assert ranks(1, unknown_collective) == ["broadcast_ is not counted"]


@pytest.mark.parametrize(("exchange", "calls"), [("flat", [4, 3]), ("two-level", [8, 6])], ids=str)
def test_ways_to_experts_send_what_the_routing_says_and_the_host_waits_once(ranks, exchange, calls):
    """Between nodes and within, by every byte; on 2 nodes of 2 ranks."""
    sizes = {"width": 64, "experts": 16, "groups": 4, "top_groups": 2, "top_k": 4}
    arguments = {"ranks_per_node": 2, "exchange": exchange}
    found = ranks(4, benchmark_exchange.layer_pass, **arguments, tokens=10, sizes=sizes)
    chosen = [result["chosen"] for result in found]
    expected = benchmark_exchange.expected_bytes(chosen, **arguments, width=64, experts=16)
    assert benchmark_exchange.summed(found) == expected
    assert all(r["calls"] == calls and r["waits"] == [1, 0] for r in found)


def test_layouts_send_what_they_have_to(tmp_path):
    """Numbers of a 4-layer model by hand, and those of `expected_bytes`."""
    layouts = [
        layout(),
        layout(dp_shard=2),
        layout(dp_shard=2, ep=2),
        layout(pp=2, tp=2, pp_schedule="1F1B"),
    ]
    report = run(
        tmp_path / "layouts.json",
        1,
        layouts,
        row=128,
        exchange=False,
        num_hidden_layers=4,
        first_k_dense_replace=1,
    )
    assert json.loads((tmp_path / "layouts.json").read_text()) == json.loads(json.dumps(report))
    one, sharded, expert, both = report["results"]
    assert [r["ranks"] for r in report["results"]] == [1, 2, 2, 4]
    assert all(r["step_seconds"] > 0 and r["cpu_seconds"] > 0 for r in report["results"])
    assert one["sent"] == one["calls"] == {}

    # Nothing is computed twice.
    assert {r["multiply_adds"] for r in report["results"]} == {one["multiply_adds"]}

    # By hand. Parameters: query, key/value, output and norms; experts; embedding, head, dense
    # layer, routers, shared experts.
    attention = 128 * 64 + 64 * 4 * 32 + 128 * 80 + 64 * 4 * 48 + 4 * 32 * 128 + (64 + 64 + 2 * 128)
    experts = 3 * 8 * 3 * 128 * 64
    others = 2 * 1024 * 128 + 128 + 4 * attention + 3 * 128 * 256 + 3 * (8 * 128 + 3 * 128 * 64)
    # 4 microbatches, half of 4 bytes; gathered twice, but for what is outside of layers.
    assert sharded["sent"]["reduce-scatter"] == 4 * (others + experts) * 2
    assert sharded["sent"]["all-gather"] == 4 * (2 * (others + experts) - 2 * 1024 * 128 - 128) * 2
    assert expert["sent"]["reduce-scatter"] == 4 * others * 2
    # Of 3 layers half of the rows, there and back, twice (about: routing), and 8 counts.
    assert expert["sent"]["all-to-all"] == pytest.approx(
        4 * 3 * (4 * 128 * 2 * 128 * 4 + 8 * 8) / 2, rel=0.2
    )
    # 8 microbatches of 64 x 128 numbers, forward from one half of the ranks and backward from the
    # other.
    assert both["sent"]["point-to-point"] == 8 * 64 * 128 * 4

    for r in (sharded, expert, both):
        for kind in ("all-gather", "reduce-scatter", "all-reduce", "point-to-point"):
            assert r["sent"].get(kind, 0) == pytest.approx(r["expected"].get(kind, 0), rel=1e-3), (
                r["layout"],
                kind,
            )
