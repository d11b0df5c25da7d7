"""The second table of `tools/benchmark.py layouts`: what is sent between nodes and within them when
tokens go to experts and back, flat and at two levels.

A MoE layer of DeepSeek-V3's width and routing (256 experts in 8 groups, of which a token may choose
8 experts in 4 groups; random weights) runs forward and backward on 16 ranks of this machine, two to
each of 8 supposed nodes, so that each node has one group. Experts are narrow, which changes no byte
of what is sent. Bytes are counted at the collectives, by whom they go to; beside them stands what
the routing says has to be sent (`expected_bytes`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tools.benchmark_pipeline import on_ranks
from tools.sent_bytes import SentBytes, exchanged
from torchsft.config import Parallel
from torchsft.models.attention import locate_documents
from torchsft.models.decoder import SwigluMLP, seeded_normal
from torchsft.models.moe import Experts, MoE
from torchsft.models.routers import GroupedSigmoidRouter
from torchsft.parallel.expert import FlatExchange, TwoLevelExchange, node_groups
from torchsft.parallel.world import World

NODES, RANKS_PER_NODE, TOKENS = 8, 2, 64  # tokens of each rank
V3 = {"width": 7168, "experts": 256, "groups": 8, "top_groups": 4, "top_k": 8}
WAITS = ("tolist", "item", "cpu")  # by which the host waits for a device


class NodeBytes(SentBytes):
    """Counts what this rank sends to ranks of other nodes, and to others of its own.

    Attributes:
        to: a Counter with the keys `between` and `within`.
    """

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self.ranks_per_node = ranks_per_node
        self.to: Counter[str] = Counter()

    def measured(self, name: str, given: Mapping[str, Any], result: Any) -> tuple[str, float]:
        """See `SentBytes.measured`."""
        if name == "allgather_":
            group = dist.ProcessGroup.unbox(given["process_group"])
            parts = [given["input_tensors"][0].nbytes] * group.size()
        else:
            group, x, rows = exchanged(given)
            parts = [part.nbytes for part in x.split(rows)]
        rank = dist.get_rank()
        for other, part in zip(dist.get_process_group_ranks(group), parts, strict=True):
            if other != rank:
                same = other // self.ranks_per_node == rank // self.ranks_per_node
                self.to["within" if same else "between"] += part
        return super().measured(name, given, result)


def layer_pass(
    ranks_per_node: int, exchange: str, tokens: int, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """On each rank: what a forward and a backward pass of a layer send, and where tokens go."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_node)
    ranks = int(os.environ["WORLD_SIZE"])
    width, experts, groups, top_groups, top_k = sizes.values()
    with World(Parallel(ep=ranks, ep_exchange=exchange, timeout_seconds=120), 0) as world:
        router = GroupedSigmoidRouter(
            width,
            experts,
            groups=groups,
            top_groups=top_groups,
            top_k=top_k,
            normalise=True,
            scale=2.5,
        )
        moe = MoE(router, Experts(experts // ranks, width, 8, "grouped_mm"), SwigluMLP(width, 8))
        for name, parameter in moe.named_parameters():
            here = "" if name.startswith(("gate", "shared")) else f"{rank}."
            value = seeded_normal(here + name, parameter.shape, width**-0.5, 0)
            parameter.data = value.bfloat16() if "experts" in name else value
        group, levels = world.expert["ep"].get_group(), node_groups(world)
        moe.exchange = (
            TwoLevelExchange(experts, group, *levels) if levels else FlatExchange(experts, group)
        )
        chosen: list[Tensor] = []
        moe.observe = chosen.append
        x_SD = seeded_normal(f"{rank}.x", (tokens, width), 1.0, 0).bfloat16().requires_grad_()
        factors, ends = torch.ones(tokens, 4), torch.tensor([0, tokens])
        documents = locate_documents("sdpa", factors, factors, ends, None)
        waits = mock.Mock()
        patches = [
            mock.patch.object(Tensor, name, _counted(waits, getattr(Tensor, name)))
            for name in WAITS
        ]
        with NodeBytes(ranks_per_node) as sent:
            for patch in patches:
                patch.start()
            y_SD = moe(x_SD, documents)
            calls_forward, waits_forward = sum(sent.calls.values()), waits.call_count
            y_SD.float().square().sum().backward()
            for patch in patches:
                patch.stop()
        calls = sum(sent.calls.values())
    return {
        "between": sent.to["between"],
        "within": sent.to["within"],
        "calls": [calls_forward, calls - calls_forward],
        "waits": [waits_forward, waits.call_count - waits_forward],
        "chosen": chosen[0].tolist(),
    }


def _counted(waits: mock.Mock, method: Any) -> Any:
    def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
        waits()
        return method(tensor, *args, **options)

    return call


def expected_bytes(
    chosen: Sequence[Sequence[Sequence[int]]],
    ranks_per_node: int,
    exchange: str,
    width: int,
    experts: int,
) -> dict[str, int]:
    """Return what all ranks together have to send by the experts that each rank's tokens choose: a
    bf16 row to an expert and back, and again in the backward pass; an fp32 weight there, and its
    gradient back. Once: the numbers of rows, and at two levels (4 bytes) the expert of each.
    """
    ranks = len(chosen)
    nodes, here = ranks // ranks_per_node, experts // ranks
    sent = Counter({"between": 0, "within": 0})
    row, weight = 4 * 2 * width, 2 * 4
    counts = 8 * here if exchange == "flat" else 4 * (experts + nodes)
    sent["within"] += counts * ranks * (ranks_per_node - 1)
    sent["between"] += counts * ranks * (ranks - ranks_per_node)
    for rank, tokens in enumerate(chosen):
        node, place = divmod(rank, ranks_per_node)
        for token in tokens:
            owners = [expert // here for expert in token]
            away = [owner for owner in owners if owner // ranks_per_node != node]
            if exchange == "flat":
                others = sum(owner != rank for owner in owners)
                sent["between"] += len(away) * (row + weight)
                sent["within"] += (others - len(away)) * (row + weight)
                continue
            sent["between"] += len({owner // ranks_per_node for owner in away}) * row
            sent["between"] += len(away) * (weight + 4)
            sent["within"] += sum(owner % ranks_per_node != place for owner in owners) * (
                row + weight
            )
    return dict(sent)


def summed(results: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return what all ranks sent together."""
    return {key: sum(result[key] for result in results) for key in ("between", "within")}


def run() -> list[dict[str, Any]]:
    """Measure both exchanges, and print them."""
    ranks, lines, report = NODES * RANKS_PER_NODE, [], []
    for exchange in ("flat", "two-level"):
        arguments = {"ranks_per_node": RANKS_PER_NODE, "exchange": exchange}
        found = on_ranks(ranks, layer_pass, **arguments, tokens=TOKENS, sizes=V3)
        chosen = [result["chosen"] for result in found]
        expected = expected_bytes(chosen, **arguments, width=V3["width"], experts=V3["experts"])
        sent = summed(found)
        each = ranks * TOKENS * 1000
        kilobytes = [
            f"{sent[key] / each:.1f} ({expected[key] / each:.1f})" for key in ("between", "within")
        ]
        numbers = [" + ".join(map(str, found[0][key])) for key in ("calls", "waits")]
        lines.append("| " + " | ".join([exchange, *kilobytes, *numbers]) + " |")
        row = {"exchange": exchange, "sent": sent, "expected": expected}
        report.append(row | {key: found[0][key] for key in ("calls", "waits")})
    print("\nkB a token and MoE layer, forward and backward, counted (by the routing)\n")
    head = ["--parallel.ep-exchange", "between nodes", "within nodes", "collectives", "host waits"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    print("\n".join(lines), flush=True)
    flat, two = (row["sent"]["between"] for row in report)
    print(f"\nacross nodes: {flat / two:.2f} times less")
    return report
