"""Directories with one writer, and directories that appear only when they are complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchsft.config import InputError


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks; nothing to wait for without a process group."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, by rank, on every rank; collective. They are pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries (names, not contents) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(output: Path, main: bool) -> Iterator[None]:
    """Make a run's directory and keep other runs out of it until this one leaves or its main process ends, however it does.

    Args:
        output: made if it is not there.
        main: whether this is the rank that claims it; the others do nothing.

    Raises:
        InputError: another process has claimed it, or it cannot be written.
    """
    if not main:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115 (held open as long as the claim)
    except FileExistsError as error:
        raise InputError(f"--output {output} is a file; choose another --output") from error
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error}); choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is writing to {output}; wait for it or choose another --output") from error
        yield


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Collective: yields an empty hidden directory beside `target` that takes `target`'s place when all ranks are done.

    Every rank flushes the files that it writes. If any rank fails, `target` stays as it was, and the hidden directory
    is left for the next attempt to remove. All ranks must see the same file system.
    """
    rank, _ = rank_and_size()
    staging = target.with_name(f".{target.name}.incomplete")
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    yield staging
    barrier()
    if rank == 0:
        sync_directory(staging)
        replaced = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
        sync_directory(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    barrier()
