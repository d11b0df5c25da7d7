"""The exchange of tokens with experts on other ranks: the numbers of one process, at one level and
at two, and what is computed while rows travel.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.passes import build, compare, fill, microbatch, on_nodes, training_pass
from torchsft.config import InputError, Parallel, Train
from torchsft.models import moe
from torchsft.models.moe import LocalExchange
from torchsft.ops.out_of_memory import explaining
from torchsft.ops.permute import Order, combine_reference, permute_reference
from torchsft.ops.swiglu import grouped_swiglu_reference
from torchsft.parallel.apply import parallelize
from torchsft.parallel.expert import FlatExchange, Transfer, TwoLevelExchange, node_groups
from torchsft.parallel.world import World, nodes_of_experts

S, K, D, E = 12, 3, 8, 8  # tokens of a rank, choices, width; experts, 2 of each of 4 ranks
PRODUCT, OF_EXPERTS = "aten::mm", "aten::_grouped_mm"


def choices(rank: int) -> dict[str, Tensor]:
    """Where the tokens of a rank go."""
    draw = torch.Generator().manual_seed(rank)
    anywhere = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(S)])
    away = 4 * (rank < 2) + torch.tensor([3, 0, 2])  # on the other node
    return {
        "anywhere": anywhere,
        "all on one node": torch.tensor([5, 7, 4]).expand(S, K),
        "all on one rank": torch.tensor([[2, 3, 3]]).expand(S, K),
        "all on the other node": away.expand(S, K),
        "some on one node only": torch.where(torch.arange(S)[:, None] % 2 > 0, anywhere, away),
    }


def layer(exchange: Any, chosen_SK: Tensor, of: slice, rank: int) -> list[Tensor]:
    """What a layer and `meanwhile` return, and gradients: of tokens, weights, experts."""
    draw = torch.Generator().manual_seed(9)
    numbers = {"generator": draw, "dtype": torch.float64}
    gate_up, down = torch.randn(E, 2 * D, D, **numbers), torch.randn(E, D, D, **numbers)
    draw.manual_seed(rank)
    inputs = [torch.randn(S, D, **numbers), torch.rand(S, K, **numbers), gate_up[of], down[of]]
    inputs = [x.clone().requires_grad_() for x in inputs]
    x_SD, weights_SK, *matrices = inputs

    def experts(given: list[Tensor], order: Order, offs: Tensor, _: Any) -> Tensor:
        x, weights = given
        order_R, row_TK = order
        weights = permute_reference(weights, order_R, row_TK.view(-1, 1))
        x = permute_reference(x, *order)
        return combine_reference(grouped_swiglu_reference(x, *matrices, weights, offs), *order)

    meanwhile = iter([None, x_SD * 2])
    y_SD, shared_SD = exchange(x_SD, weights_SK, chosen_SK, experts, meanwhile)
    (y_SD.square().sum() + shared_SD.sum()).backward()
    return [y_SD.detach(), shared_SD.detach(), *(x.grad for x in inputs)]


def each_exchange() -> None:
    """Compare both exchanges with all experts on one rank, in float64."""
    with World(Parallel(ep=4, timeout_seconds=60), 0) as world:
        group, levels = world.expert["ep"].get_group(), node_groups(world)
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        for name, chosen_SK in choices(world.rank).items():
            expected = layer(LocalExchange(E), chosen_SK, slice(None), world.rank)
            for gradient in expected[-2:]:  # of experts: of all ranks' tokens
                dist.all_reduce(gradient)
            expected[-2:] = [gradient[mine] for gradient in expected[-2:]]
            for exchange in (FlatExchange(E, group), TwoLevelExchange(E, group, *levels)):
                found = layer(exchange, chosen_SK, mine, world.rank)
                for got, wanted in zip(found, expected, strict=True):
                    close = torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)
                    assert close, (name, type(exchange))


def test_tokens_of_any_routing_get_what_experts_on_one_rank_return(ranks):
    """Ranks and nodes without any row too."""
    ranks(4, on_nodes, ranks_per_node=2, call=each_exchange)


def in_slices(**arguments: Any) -> dict[str, Any]:
    """`training_pass`, whose experts compute slices of rows, however few there are."""
    with mock.patch.object(moe, "MOST", 0):
        return training_pass(**arguments)


@pytest.mark.parametrize(
    ("n", "parallel", "family", "call"),
    [
        (4, {"tp": 2, "cp": 2, "ep": 4}, "", training_pass),
        (4, {"dp_shard": 4, "ep": 4}, "gpt_oss", in_slices),
        (8, {"dp_shard": 4, "tp": 2, "ep": 8}, "", in_slices),  # 4 nodes
    ],
    ids=["all rows", "gpt_oss in slices", "4 nodes, in slices"],
)
def test_two_levels_give_the_gradients_of_one_process(ranks, n, parallel, family, call):
    """Where experts have sorted rows, and where they sort slices of rows themselves."""
    balance = {"balance": 0.1, "family": family}
    expected = ranks(1, training_pass, parallel={}, **balance)[0]
    call = {"ranks_per_node": 2, "call": call}
    compare(ranks(n, on_nodes, parallel=parallel, **call, **balance), expected)


@pytest.mark.parametrize(
    "exchange", [FlatExchange(E, None), TwoLevelExchange(E, None, None, None)], ids=["flat", "two"]
)
def test_a_full_device_is_reported_before_any_row_has_come(exchange):
    moe = next(iter(build().moe_layers().values()))
    moe.exchange = exchange
    with pytest.raises(torch.OutOfMemoryError) as raised, explaining(moe.load):
        raise torch.OutOfMemoryError
    assert "0 rows have come to this rank" in raised.value.__notes__[0]


class Journal(TorchDispatchMode):
    """What ran while rows were on their way, one Counter for each exchange of rows or gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.flights: list[tuple[int, Counter[str]]] = []  # ranks of the group, operations
        self.now: dict[Transfer, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for counter in self.now.values():
            counter[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Journal:
        start, arrive = Transfer.start, Transfer.arrive

        def started(transfer: Transfer, *args: Any) -> Tensor:
            rows = start(transfer, *args)
            self.now[transfer] = Counter()
            return rows

        def arrived(transfer: Transfer) -> Tensor:
            self.flights.append((transfer.group.size(), self.now.pop(transfer)))
            return arrive(transfer)

        self.patch = mock.patch.multiple(Transfer, start=started, arrive=arrived)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patch.stop()
        assert not self.now or raised[0]  # every start is waited for


def journals(exchange: str, mode: str) -> list[list[tuple[int, Counter[str]]]]:
    """On 4 ranks, or 3 nodes of 2: of a forward and a backward pass. Experts compute all rows at
    once, also on a rank that receives many.
    """
    parallel = Parallel(ep=6, ep_exchange=exchange, timeout_seconds=60)
    with World(parallel, 0) as world, mock.patch.object(moe, "MOST", 100):
        model = build(n_routed_experts=12)
        options = Train(activation_checkpointing=mode)
        parallelize([model], world, torch.float32, activations=options)
        fill(model)
        with Journal() as forward:
            loss = model(**microbatch(world.rank % 4))
        with Journal() as backward:
            loss.backward()
    return [forward.flights, backward.flights]


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(("exchange", "size"), [("flat", 6), ("two-level", 3)])
def test_products_run_while_rows_and_gradients_travel_both_ways(ranks, exchange, size, mode):
    """All of a flat exchange, those between nodes of one at two levels. Where layers are computed
    again, the whole layer is, to the experts, while the first gradients travel.
    """
    layers = 2
    call = {"ranks_per_node": 2, "call": journals}
    for forward, backward in ranks(6, on_nodes, **call, exchange=exchange, mode=mode):
        there = [seen for of, seen in forward if of == size]
        back = [seen for of, seen in backward if of == size]
        again = 2 if mode == "full" else 0  # rows and weights
        assert len(there) == 3 * layers and len(back) == (3 + again) * layers
        assert all(seen[PRODUCT] for seen in [*there, *back])
        assert sum(seen[OF_EXPERTS] > 0 for seen in back) == (layers if again else 0)


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "exchange", "nodes"),
    [
        (32, 8, "auto", 4),
        (32, 8, "two-level", 4),
        (32, 8, "flat", 1),
        (8, 8, "auto", 1),  # within a node
        (4, 8, "auto", 1),
        (12, 8, "auto", 1),  # the ranks of a group fill no nodes
        (4, 1, "auto", 1),
        (1, 1, "auto", 1),
    ],
)
def test_rows_go_at_two_levels_where_groups_fill_nodes(ep, ranks_per_node, exchange, nodes):
    assert nodes_of_experts(Parallel(ep=ep, ep_exchange=exchange), ranks_per_node) == nodes


@pytest.mark.parametrize(("ep", "ranks_per_node"), [(8, 8), (4, 8), (12, 8), (4, 1)])
def test_two_levels_are_refused_where_there_are_none(ep, ranks_per_node):
    sentence = f"two-level needs .*, but --parallel.ep is {ep} and a node has {ranks_per_node} "
    with pytest.raises(InputError, match=sentence):
        nodes_of_experts(Parallel(ep=ep, ep_exchange="two-level"), ranks_per_node)


def scattered(exchange: str) -> tuple[int, str]:
    """Of ranks that are not numbered node by node: the nodes of a group, or the refusal."""
    try:
        with World(Parallel(ep=4, ep_exchange=exchange, timeout_seconds=60), 0) as world:
            return world.expert_nodes, ""
    except InputError as error:
        return 0, str(error)


def on_scattered_nodes(exchange: str) -> tuple[int, str]:
    """`scattered`, where ranks 0 and 2 are on one node, 1 and 3 on the other."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank // 2)}
    return scattered(exchange)


def test_nodes_whose_ranks_are_no_neighbours_are_refused_or_left(ranks):
    assert ranks(4, on_scattered_nodes, exchange="auto") == [(1, "")] * 4
    for _, words in ranks(4, on_scattered_nodes, exchange="two-level"):
        assert "needs as many ranks on every node, numbered node by node, but rank" in words
