"""The processes of a run: process group, device, seeds, and several views of the same ranks.

    dense       pp, dp_replicate, dp_shard, cp, tp      what the options say
    parameter   pp, dp_replicate, fsdp, tp              fsdp = dp_shard * cp: ranks that hold shards
                                                        of one parameter
    expert      pp, dp_replicate, edp, ep               ep * edp = dp_shard * cp * tp: of an
                                                        expert's parameter
    sequence    data, sequence                          sequence = cp * tp: ranks that share the
                                                        tokens of a microbatch

All are row-major over the same ranks, so that tp, cp and ep peers are neighbours (on one node,
where talk is cheapest).
"""

import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torchsft.config import InputError, Parallel
from torchsft.parallel.cluster import (
    check_interface,
    files_needed,
    raise_file_limit,
    write_record,
)
from torchsft.parallel.collectives import PATIENCE, patient
from torchsft.parallel.groups import connect, groups_of, make_meshes


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch choose operations that compute the same bits each time, if `on`, and say so where
    one has none; entered before anything is computed on a GPU.
    """
    name = "CUBLAS_WORKSPACE_CONFIG"
    before = os.environ.get(name), torch.are_deterministic_algorithms_enabled()
    if on:
        os.environ.setdefault(name, ":4096:8")  # cuBLAS chooses by what it finds free otherwise
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if before[0] is None:
            os.environ.pop(name, None)
        torch.use_deterministic_algorithms(before[1])


def mesh_sizes(parallel: Parallel, world_size: int) -> dict[str, dict[str, int]]:
    """Axes and sizes of the meshes `dense`, `parameter`, `expert` and `sequence` for `world_size`
    ranks.

    Raises:
        InputError: the sizes do not multiply to the world size, or ep does not divide dp_shard * cp
            * tp.
    """
    others = parallel.pp * parallel.dp_replicate * parallel.cp * parallel.tp
    shard = max(world_size // others, 1) if parallel.dp_shard == -1 else parallel.dp_shard
    if others * shard != world_size:
        if world_size % others:
            remedy = (
                f"start {-(-world_size // others) * others} ranks or lower pp, dp_replicate, cp or "
                f"tp (together {others})"
            )
        else:
            remedy = (
                f"set --parallel.dp-shard -1 or {world_size // others}, or start {others * shard} "
                f"ranks"
            )
        raise InputError(
            f"the mesh sizes pp {parallel.pp} x dp_replicate {parallel.dp_replicate} x dp_shard "
            f"{shard} x cp {parallel.cp} x "
            f"tp {parallel.tp} multiply to {others * shard}, but there are {world_size} ranks; "
            f"{remedy}"
        )
    inner = shard * parallel.cp * parallel.tp
    if inner % parallel.ep:
        divisors = ", ".join(str(n) for n in range(1, inner + 1) if inner % n == 0)
        raise InputError(
            f"--parallel.ep is {parallel.ep}, but it must divide dp_shard * cp * tp = {inner}; set "
            f"it to one of {divisors}"
        )
    outer = {"pp": parallel.pp, "dp_replicate": parallel.dp_replicate}
    sequence = parallel.cp * parallel.tp
    return {
        "dense": {**outer, "dp_shard": shard, "cp": parallel.cp, "tp": parallel.tp},
        "parameter": {**outer, "fsdp": shard * parallel.cp, "tp": parallel.tp},
        "expert": {**outer, "edp": inner // parallel.ep, "ep": parallel.ep},
        "sequence": {"data": world_size // sequence, "sequence": sequence},
    }


def nodes_of_experts(parallel: Parallel, ranks_per_node: int) -> int:
    """Return over how many nodes the ranks of an ep group exchange rows at two levels; 1: they do
    so at one level.

    Raises:
        InputError: --parallel.ep-exchange two-level cannot be followed.
    """
    ep = parallel.ep
    if parallel.ep_exchange == "flat":
        return 1
    if ranks_per_node > 1 and ep > ranks_per_node and ep % ranks_per_node == 0:
        return ep // ranks_per_node
    if parallel.ep_exchange == "two-level":
        raise InputError(
            f"--parallel.ep-exchange two-level needs an ep of several nodes, with several ranks on "
            f"each, but --parallel.ep is {ep} and a node has {ranks_per_node} (LOCAL_WORLD_SIZE); "
            f"set the exchange to flat or auto, or ep to a larger multiple of the ranks per node"
        )
    return 1


def fresh_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return a part of `store` that only the ranks of this start have; every rank calls it.

    `torchrun --max-restarts` gives restarted ranks the store of those before, where they would find
    the addresses of dead ones (torch 2.13: gloo then waits for ever). A rank's greeting is new each
    time, and so is the name that rank 0 answers with. TimeoutError where other ranks did not
    come.
    """
    mine, deadline = uuid.uuid4().hex.encode(), time.monotonic() + timeout.total_seconds()

    def found(key: str) -> bytes:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {rank} of {size} waited {timeout.total_seconds():.0f} s for others to "
                f"start; look at their logs"
            )
        return store.get(key) if store.check([key]) else b""

    if rank:
        store.set(f"torchsft/greeting/{rank}", mine)
        while not (answer := found(f"torchsft/answer/{rank}")).startswith(mine):
            time.sleep(0.01)
        mine = answer.removeprefix(mine)
        store.set(f"torchsft/heard/{rank}", mine)
    else:
        left = set(range(1, size))
        while left:
            for peer in left:
                store.set(f"torchsft/answer/{peer}", found(f"torchsft/greeting/{peer}") + mine)
            time.sleep(0.01)
            left = {peer for peer in left if found(f"torchsft/heard/{peer}") != mine}
    return dist.PrefixStore(mine.decode(), store)


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the store in which all ranks find each other, this one's number, and how many they
    are.

    Raises:
        InputError: the port is in use.
    """
    try:
        return next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise InputError(
            f"port {port} is in use by another program on this machine; set MASTER_PORT to a free "
            "one (torchrun: --master-port, or --standalone on one machine)"
        ) from error


class World:
    """This process among the ranks of a run. A context manager: leaving it destroys the process
    group.

    Reads what `torchrun` sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); under plain
    `python` it is a world of one rank, with the same code path. NCCL and one CUDA device per local
    rank where CUDA is there, else gloo on the CPU.
    """

    def __init__(self, parallel: Parallel, seed: int) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.is_main = self.rank == 0  # the one rank that prints and writes single files
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        sizes = mesh_sizes(parallel, self.size)  # before anything is started
        self.expert_nodes = nodes_of_experts(parallel, self.ranks_per_node)
        cuda = torch.cuda.is_available()
        if cuda and self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"local rank {self.local_rank} has no GPU of its own: this machine has "
                f"{torch.cuda.device_count()}; lower --nproc-per-node"
            )
        self.device = torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        check_interface()
        raise_file_limit(files_needed(sizes, self.size, cuda))
        self.timeout = timeout = timedelta(seconds=parallel.timeout_seconds)
        if "RANK" in os.environ:
            store, rank, size = _meet(timeout)
            store = fresh_store(store, rank, size, timeout)
        else:
            store, rank, size = dist.HashStore(), 0, 1
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        meshes = make_meshes(sizes, self.device.type, timeout).values()
        self.dense, self.parameter, self.expert, self.sequence = meshes
        shard = sizes["dense"]["dp_shard"]
        # A gloo group of all ranks for the thread that writes checkpoints, None on a world of one:
        # this thread's talk must not mix with the step's, and waits for the slowest rank's file
        # system.
        self.writers = dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        # among how many the rows are shared; `data_rank` is this rank's share
        self.data_size = parallel.dp_replicate * shard
        replica, share = map(self.dense.get_local_rank, ("dp_replicate", "dp_shard"))
        self.data_rank = replica * shard + share
        # True on one rank of those that read the same rows, so that what they read is counted once.
        self.is_reader = all(self.dense.get_local_rank(axis) == 0 for axis in ("pp", "cp", "tp"))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        connect({dist.group.WORLD: ()} | groups_of(meshes), self.device)
        # a rank that refuses its input and leaves does not disturb others that still build groups
        if not self._nodes_are_alike() and self.expert_nodes > 1:
            if parallel.ep_exchange == "two-level":
                raise InputError(
                    "--parallel.ep-exchange two-level needs as many ranks on every node, numbered "
                    f"node by node, but rank {self.rank} is local rank {self.local_rank} of "
                    f"{self.ranks_per_node} (LOCAL_WORLD_SIZE) or others are so; set it to flat"
                )
            self.expert_nodes = 1

    def _nodes_are_alike(self) -> bool:
        """Whether ranks are numbered node by node, with as many on each; a barrier."""
        count = self.ranks_per_node
        is_other = self.size % count > 0 or self.rank % count != self.local_rank
        others, total, squares = self.sum([is_other, count, count * count]).tolist()
        return not others and total * total == self.size * squares

    def sum(self, values: list[float] | torch.Tensor) -> torch.Tensor:
        """float64 sums over all ranks of a short vector; [n] -> [n]. One collective.

        Ranks that know the same thing must not all say it: see `is_reader`. Numbers that the host
        knows stay on the host and go through gloo, so that no GPU is waited for.
        """
        total = torch.as_tensor(values).double()
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait until every rank has come here, however long others tokenise, load or write."""
        with patient():
            self.sum([0.0])

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # After an error the peers may wait in a collective: destroying the group could wait for
        # them, leaving does not.
        if kind is None:
            dist.destroy_process_group()
        elif self.device.type == "cpu":
            write_record(self.rank)
