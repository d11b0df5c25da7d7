"""Collectives over Python objects, which also work in one process without a process group; and
those that wait long.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

PATIENCE = timedelta(days=1)


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, by rank, on every rank.

    Args:
        value: anything that can be pickled.
        group: a group of all ranks; None: the default one, `patient`.
    """
    _, size = rank_and_size()
    values = [value] * size
    if size > 1:
        with nullcontext() if group else patient():
            dist.all_gather_object(values, value, group)
    return values


@contextmanager
def patient() -> Iterator[None]:
    """Within its context collectives of all ranks wait for a day: where some tokenise, read or
    write for longer than others.

    The timeout of the options is for ranks that hang in a step. One that has died is noticed here
    too: gloo's connection to it breaks, and torchrun ends the others. For one thread alone. Uses
    two private names of torch, whose own collectives have no such option.
    """
    if rank_and_size()[1] == 1:
        yield
        return
    before = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    _set_pg_timeout(PATIENCE)
    try:
        yield
    finally:
        _set_pg_timeout(before)
