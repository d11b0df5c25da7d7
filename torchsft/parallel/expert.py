"""Expert parallelism: rows travel to the rank that holds their expert, and back.

At one level (`FlatExchange`) a token is sent once for each expert that it chose. At two
(`TwoLevelExchange`), where the ranks of the `ep` axis fill several nodes, it is sent once to each
node that holds some of its experts, to the rank of the same place there, and on from there within
the node; on the way back the rows of a token are summed on the node before they leave it. So what
crosses nodes, where the network is slow, is a token per node and not a token per expert, in the
backward pass too. DeepSeek-V3 does so (arXiv:2412.19437, section 3.2.2).

Shapes: S tokens of this rank, K choices of each, R = S * K rows, M rows that this rank's experts
receive, D width, E experts, n ranks of a group, e = E / n of the `ep` axis: local experts. At two
levels, N nodes of m ranks: C copies of tokens that this rank sends to nodes, I copies that it
receives, Q rows that it makes of them.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from torchsft.config import InputError
from torchsft.models.language_model import LanguageModel
from torchsft.models.moe import ComputeRows, sort_by_expert
from torchsft.ops.permute import Order, Rows, combine, copy_rows, inverse, permute, sum_rows
from torchsft.ops.repetition import once, repeating
from torchsft.parallel.groups import connect
from torchsft.parallel.world import World


class Route(NamedTuple):
    """How many rows go to each rank of a group, and how many come from each."""

    sent: list[int]
    received: list[int]


class Transfer:
    """Rows on their way between the ranks of a group, and their gradients on the way back."""

    # the rows sent, which stay in memory until they have arrived, those received, and the wait
    flight: tuple[Tensor, Tensor, dist.Work] | None = None

    def __init__(self, group: dist.ProcessGroup, route: Route) -> None:
        self.group, self.route = group, route

    def start(self, x: Tensor, route: Route) -> Tensor:
        """Return the rows that will have arrived behind `arrive`."""
        x, rows = x.contiguous(), x.new_empty(sum(route.received), *x.shape[1:])
        work = dist.all_to_all_single(
            rows, x, route.received, route.sent, group=self.group, async_op=True
        )
        self.flight = x, rows, work
        return rows

    def arrive(self) -> Tensor:
        """Wait for what was started."""
        (_, rows, work), self.flight = self.flight, None
        work.wait()
        return rows


class _Start(torch.autograd.Function):
    """Lets rows leave; its backward pass waits for their gradients, which `_Arrive` let leave.

    With two operations, what is computed between them runs beside the exchange in both passes:
    autograd goes back through what was computed last first. (A functional collective waits at once
    in its backward pass.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer, skip: bool) -> Tensor:
        ctx.transfer = transfer
        if skip:
            return x.new_empty(sum(transfer.route.received), *x.shape[1:])
        return transfer.start(x, transfer.route)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transfer.arrive(), None, None


class _Arrive(torch.autograd.Function):
    """Waits for rows; its backward pass lets their gradients leave, of which `_Start` gets what
    arrives by the side: it has another number of rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        if transfer.flight is not None:
            transfer.arrive()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.start(grad, Route(*transfer.route[::-1]))
        return grad, None


def carry(
    group: dist.ProcessGroup,
    *parts: tuple[Tensor, Route],
    meanwhile: Iterator[Tensor | None] | None = None,
    back: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """Send rows to the ranks of a group; differentiable.

    Args:
        group: of the ranks.
        parts: rows, those for each rank together in the order of the ranks, and their route.
        meanwhile: its next value is computed while the rows travel.
        back: send rows back which came by that route. Nothing reads them where a layer is computed
            again: they are not sent then, and the result is uninitialised.

    Returns:
        The rows received, and the value of `meanwhile`.
    """
    moving = []
    for x, route in parts:
        transfer = Transfer(group, Route(*route[::-1]) if back else route)
        moving.append((_Start.apply(x, transfer, back and repeating()), transfer))
    result = next(meanwhile) if meanwhile else None
    return [_Arrive.apply(*each) for each in moving], result


class Arrival(NamedTuple):
    """How rows that come sorted by sender, then expert, are sorted by expert."""

    order: Order
    offs_e: Tensor  # int32, where the rows of each local expert end
    ends: list[int]  # the same

    @classmethod
    def of(cls, counts_ne: Tensor, ends: list[int]) -> "Arrival":
        """Of the numbers of rows from each sender for each local expert, and their `ends`."""
        senders, experts = counts_ne.shape
        expert_M = torch.arange(experts, device=counts_ne.device).repeat(senders)
        expert_M = expert_M.repeat_interleave(counts_ne.flatten(), output_size=ends[-1])
        order_M = expert_M.argsort(stable=True)
        order = Order(order_M, inverse(order_M).unsqueeze(1))
        return cls(order, ends_of(counts_ne).to(torch.int32), ends)


def ends_of(counts_ne: Tensor) -> Tensor:
    """Return where each expert's rows end, int64 [e], of those from each sender."""
    return counts_ne.sum(0).cumsum(0)


def told(*numbers: Tensor) -> list[list[int]]:
    """Tell the host vectors of numbers, for which it waits once."""
    (every,) = torch.cat(numbers).unsqueeze(0).tolist()
    rest = iter(every)
    return [list(islice(rest, len(each))) for each in numbers]


class FlatPlan(NamedTuple):
    """Where rows go at one level."""

    order_R: Tensor
    row_SK: Tensor
    route: Route
    arrival: Arrival


class FlatExchange:
    """A MoE layer's `exchange` over the `ep` axis: all-to-all, local experts, all-to-all back.

    The split sizes of an uneven all-to-all are host numbers, hence one host synchronisation per
    layer and microbatch; a layer that is computed again exchanges the same rows without.
    """

    rows = 0  # until a first plan is made

    def __init__(self, experts: int, group: dist.ProcessGroup) -> None:
        self.experts, self.group = experts, group

    @torch.no_grad()
    def plan(self, chosen_SK: Tensor) -> FlatPlan:
        """Exchange how many rows go from each rank to each expert."""
        counts_E, order_R, row_SK = sort_by_expert(chosen_SK, self.experts)
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        ranks = self.group.size()
        counts_ne, local_ne = counts_E.view(ranks, -1), received_E.view(ranks, -1)
        *route, ends = told(counts_ne.sum(1), local_ne.sum(1), ends_of(local_ne))
        return FlatPlan(order_R, row_SK, Route(*route), Arrival.of(local_ne, ends))

    def __call__(
        self,
        x_SD: Tensor,
        weights_SK: Tensor,
        chosen_SK: Tensor,
        experts: ComputeRows,
        meanwhile: Iterator[Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """See `models.moe.Exchange`."""
        plan = once("exchange", lambda: self.plan(chosen_SK))
        order_R, row_SK, route, arrival = plan
        self.rows = arrival.ends[-1]
        arrived, _ = carry(
            self.group,
            (permute(x_SD, order_R, row_SK), route),
            (permute(weights_SK.view(-1, 1), order_R, row_SK.view(-1, 1)), route),
            meanwhile=meanwhile,
        )
        y_MD = experts(arrived, *arrival)
        (y_RD,), result = carry(self.group, (y_MD, route), meanwhile=meanwhile, back=True)
        return combine(y_RD, order_R, row_SK), result


class TwoLevelPlan(NamedTuple):
    """Where copies of tokens go, and the rows that are made of them."""

    copies: Rows  # of this rank's tokens, sorted by node
    copies_route: Route
    order_R: Tensor  # sorts this rank's rows by node, then token
    rows_route: Route
    on_node: Rows  # of the copies that came here, sorted by expert of the node
    order_Q: Tensor  # sorts the rows that came here by expert
    node_route: Route
    arrival: Arrival


class TwoLevelExchange:
    """A MoE layer's `exchange` over nodes, then within each; see the top of this file."""

    rows = 0  # until a first plan is made

    def __init__(
        self,
        experts: int,
        group: dist.ProcessGroup,  # of the `ep` axis
        rail: dist.ProcessGroup,  # its ranks of this place, one on each node
        node: dist.ProcessGroup,  # its ranks of this node
    ) -> None:
        self.experts, self.group, self.rail, self.node = experts, group, rail, node

    @torch.no_grad()
    def plan(self, chosen_SK: Tensor) -> TwoLevelPlan:
        """Exchange how many copies and rows each rank has for each node and expert: all the ranks
        of the axis then know what each sends to which, at both levels, and the host waits once.
        """
        nodes, ranks = self.rail.size(), self.node.size()
        tokens, choices = chosen_SK.shape
        of_node = self.experts // nodes
        device, chosen_R = chosen_SK.device, chosen_SK.flatten()
        node_R, order_R = (chosen_R // of_node).sort(stable=True)
        token_R = order_R // choices
        pair_R = node_R * tokens + token_R
        # a row begins the copy of a token for a node
        begins_R = pair_R.diff(prepend=pair_R.new_full((1,), -1)) != 0
        mine = torch.zeros(self.experts + nodes, dtype=torch.int32, device=device)
        mine.scatter_add_(0, chosen_R, torch.ones_like(chosen_R, dtype=torch.int32))
        mine.scatter_add_(0, self.experts + node_R, begins_R.int())
        every = mine.new_empty(nodes * ranks, len(mine))
        dist.all_gather(list(every), mine, group=self.group)
        # Sender's node, its place there, receiver's node, its place, its local expert.
        rows = every[:, : self.experts].view(nodes, ranks, nodes, ranks, -1)
        copies = every[:, self.experts :].view(nodes, ranks, nodes)
        node, place = divmod(self.group.rank(), ranks)
        local_ppe = rows[:, :, node].sum(0)  # from place to place within this node
        sent = copies[node, place], rows[node, place].sum((1, 2)), local_ppe[place].sum(1)
        received = (
            copies[:, place, node],
            rows[:, place, node].sum((1, 2)),
            local_ppe[:, place].sum(1),
        )
        *both, ends = told(*sent, *received, ends_of(local_ppe[:, place]))
        copies_route, rows_route, node_route = map(Route, both[:3], both[3:])
        numbered = partial(torch.arange, device=device)
        copy_R = begins_R.cumsum(0) - 1
        token_C = token_R[torch.searchsorted(copy_R, numbered(sum(copies_route.sent)))]
        row_C = token_C.argsort(stable=True)
        first_S = torch.searchsorted(token_C[row_C], numbered(tokens))
        # An expert of the node, and whether the row begins a copy, in one number.
        code_R = (chosen_R[order_R] % of_node * 2 + begins_R).int()
        code_Q = code_R.new_empty(sum(rows_route.received))
        dist.all_to_all_single(
            code_Q, code_R, rows_route.received, rows_route.sent, group=self.rail
        )
        copy_Q = (code_Q % 2).cumsum(0) - 1
        order_Q = (code_Q // 2).argsort(stable=True)
        first_I = torch.searchsorted(copy_Q, numbered(sum(copies_route.received)))
        return TwoLevelPlan(
            Rows(token_C, row_C, first_S),
            copies_route,
            order_R,
            rows_route,
            Rows(copy_Q[order_Q], inverse(order_Q), first_I),
            order_Q,
            node_route,
            Arrival.of(local_ppe[:, place], ends),
        )

    def __call__(
        self,
        x_SD: Tensor,
        weights_SK: Tensor,
        chosen_SK: Tensor,
        experts: ComputeRows,
        meanwhile: Iterator[Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """See `models.moe.Exchange`."""
        plan = once("exchange", lambda: self.plan(chosen_SK))
        self.rows = plan.arrival.ends[-1]
        inverse_R1 = inverse(plan.order_R).unsqueeze(1)
        (x_ID, weights_Q1), _ = carry(
            self.rail,
            (copy_rows(x_SD, plan.copies), plan.copies_route),
            (permute(weights_SK.view(-1, 1), plan.order_R, inverse_R1), plan.rows_route),
            meanwhile=meanwhile,
        )
        arrived, _ = carry(
            self.node,
            (copy_rows(x_ID, plan.on_node), plan.node_route),
            (permute(weights_Q1, plan.order_Q, plan.on_node.row_R.unsqueeze(1)), plan.node_route),
        )
        del x_ID
        y_MD = experts(arrived, *plan.arrival)
        (y_QD,), _ = carry(self.node, (y_MD, plan.node_route), back=True)
        y_ID = sum_rows(y_QD, plan.on_node)
        (y_CD,), result = carry(
            self.rail, (y_ID, plan.copies_route), meanwhile=meanwhile, back=True
        )
        return sum_rows(y_CD, plan.copies), result


def node_groups(world: World) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
    """Make the groups of `TwoLevelExchange`: rail and node; None where rows go at one level."""
    if world.expert_nodes == 1:
        return None
    ranks = dist.get_process_group_ranks(world.expert["ep"].get_group())
    size = len(ranks) // world.expert_nodes
    node, place = divmod(ranks.index(world.rank), size)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    rail, neighbours = (
        dist.new_group(some, timeout=world.timeout, backend=backend, use_local_synchronization=True)
        for some in (ranks[place::size], ranks[node * size :][:size])
    )
    connect({rail: ["rail"], neighbours: ["node"]}, world.device)
    return rail, neighbours


def apply_expert_parallel(
    model: LanguageModel,
    world: World,
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None,
) -> None:
    """Give each rank of the `ep` axis its experts: stacked parameters become DTensors sharded on
    dim 0.

    Args:
        model: changed in place.
        world: its expert mesh is used.
        groups: what `node_groups` returns.

    Raises:
        InputError: the number of experts is not a multiple of ep.
    """
    mesh = world.expert["ep"]
    if mesh.size() == 1:
        return
    for layer, moe in model.moe_layers().items():
        count = len(moe.expert_load)
        if count % mesh.size():
            raise InputError(
                f"model.layers.{layer}.mlp has {count} experts, which do not "
                f"divide over --parallel.ep {mesh.size()} ranks; choose an ep that divides "
                "them, or start another number of ranks"
            )
        for key, parameter in list(moe.experts.named_parameters(recurse=False)):
            sharded = nn.Parameter(
                distribute_tensor(parameter, mesh, [Shard(0)]),
                requires_grad=parameter.requires_grad,
            )
            moe.experts.register_parameter(key, sharded)
        group = mesh.get_group()
        moe.exchange = (
            TwoLevelExchange(count, group, *groups) if groups else FlatExchange(count, group)
        )
