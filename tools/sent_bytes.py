"""Counts at the collectives themselves what a rank has to send:

all-gather        the output less the rank's own input
reduce-scatter    the input less the rank's own output
all-reduce        2 (n - 1) / n of the tensor
all-to-all        the rows for other ranks
point-to-point    the tensors sent
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, and the calls, by kind; refuses collectives
    that it does not know.

    Attributes:
        sent, calls: Counters by kind. A collective of one rank counts as nothing.
        multiply_adds: of matrix products, those over groups of rows too.
    """

    IGNORED = ("wait_tensor", "recv_", "_wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.multiply_adds = 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it sends or multiplies."""
        if DTensor in types:
            # it comes again, as operations on the parts and collectives between them
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in self.IGNORED:
            given = {
                argument.name: value
                for argument, value in zip(function._schema.arguments, args, strict=False)
            }
            kind, sent = self.measured(name, given, result)
            if sent:
                self.sent[kind] += sent
                self.calls[kind] += 1
        elif name in ("mm", "addmm", "addmm_", "_grouped_mm"):
            x, y = args[1:3] if name.startswith("add") else args[:2]
            self.multiply_adds += x.numel() * y.shape[-1]
        return result

    def measured(self, name: str, given: Mapping[str, Any], result: Any) -> tuple[str, float]:
        """Kind and bytes of an operation with the arguments `given`."""
        if name == "_allgather_base_":
            return "all-gather", given["output_tensor"].nbytes - given["input_tensor"].nbytes
        if name == "_reduce_scatter_base_":
            return "reduce-scatter", given["input_tensor"].nbytes - given["output_tensor"].nbytes
        if name == "all_gather_into_tensor":
            return "all-gather", result.nbytes - given["input"].nbytes
        if name == "reduce_scatter_tensor":
            return "reduce-scatter", given["input"].nbytes - result.nbytes
        if name == "allreduce_":
            ranks = dist.ProcessGroup.unbox(given["process_group"]).size()
            return "all-reduce", 2 * (ranks - 1) / ranks * sum(x.nbytes for x in given["tensors"])
        if name in ("all_reduce", "all_reduce_"):
            ranks = _group(given["group_name"]).size()
            return "all-reduce", 2 * (ranks - 1) / ranks * given["input"].nbytes
        if name == "allgather_":
            return "all-gather", sum(x.nbytes for x in given["output_tensors"][0][1:])
        if name in ("all_to_all_single", "alltoall_base_"):
            group, x, rows = exchanged(given)
            own = rows[group.rank()]
            return "all-to-all", x[: len(x) - own].nbytes
        if name == "send":
            return "point-to-point", sum(x.nbytes for x in given["tensors"])
        raise AssertionError(f"{name} is not counted")


def exchanged(given: Mapping[str, Any]) -> tuple[dist.ProcessGroup, torch.Tensor, list[int]]:
    """Return the group of an all-to-all with these arguments, what goes in, and its rows for each
    rank: without sizes, as many for each.
    """
    x = given["input"]
    if "group_name" in given:
        group, rows = _group(given["group_name"]), given["input_split_sizes"]
    else:
        group = dist.ProcessGroup.unbox(given["process_group"])
        rows = given["input_split_sizes"]
    return group, x, rows or [len(x) // group.size()] * group.size()


def _group(name: Any) -> dist.ProcessGroup:
    """Return a functional collective's argument: a group, or (before torch 2.13) its name."""
    return (
        name
        if isinstance(name, dist.ProcessGroup)
        else dist.distributed_c10d._resolve_process_group(name)
    )
