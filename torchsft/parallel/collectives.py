"""Collectives over Python objects, which also work in one process without a process group."""

from typing import Any

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, by rank, on every rank.

    Args:
        value: anything that can be pickled.
        group: a group of all ranks; None: the default one.
    """
    _, size = rank_and_size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value, group)
    return values
