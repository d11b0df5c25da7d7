"""Work on many files by several processes: shares for each, a progress bar, and a journal by which
it continues.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from torchsft.config import InputError

KEPT_BYTES = 2**28  # of freed memory, in a process
Progress = Callable[[int], None]
Item = TypeVar("Item")


def shares(
    items: Sequence[Item], sizes: Sequence[int], limit: float, multiple: int = 4
) -> list[list[Item]]:
    """Consecutive items in groups of about equal size, none above `limit` unless an item is.

    Args:
        sizes: bytes of each item.
        multiple: several groups are about a multiple of this, so that as many workers end together.
    """
    total = sum(sizes)
    count = max(1, -int(-total // limit))
    count = -(-count // multiple) * multiple if count > 1 else 1
    groups: list[list[Item]] = []
    before, size = 0, 0
    for item, n in zip(items, sizes, strict=True):
        if not groups or size + n > limit or before * count >= total * len(groups):
            groups.append([])
            size = 0
        groups[-1].append(item)
        before, size = before + n, size + n
    return groups


class Journal:
    """The records of finished files in a directory that is being filled, one JSON object a line. A
    context manager.

    Args:
        directory: made if it is not there. What it holds from other plans is removed.
        digest: of everything that the files follow from.

    Attributes:
        records: file -> record of what an earlier attempt with the same digest finished.

    Raises:
        InputError: another process is filling the directory.
    """

    NAME = ".journal"

    def __init__(self, directory: Path, digest: str) -> None:
        self.directory, self.digest = directory, digest
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = open(self.directory / self.NAME, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(
                f"another process is writing {self.directory}; wait for it or choose another output"
            ) from error
        except OSError:
            pass  # a file system without locks
        self._file.seek(0)
        first, *lines = self._file.read().splitlines() or [""]
        if first == self.digest:
            for line in lines:
                with suppress(ValueError):  # the last line of a process that was killed
                    record = json.loads(line)
                    path = self.directory / record["file"]
                    if path.is_file() and path.stat().st_size == record["bytes"]:
                        self.records[record["file"]] = record
        for path in sorted(self.directory.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
            elif path.name not in {self.NAME, *self.records}:
                path.unlink()
        self._file.truncate(0)
        self._write(self.digest, *map(json.dumps, self.records.values()))
        return self

    def add(self, record: dict[str, Any]) -> None:
        """Note that a file, `record["file"]`, is complete on the disk with `record["bytes"]`
        bytes.
        """
        self.records[record["file"]] = record
        self._write(json.dumps(record))

    def _write(self, *lines: str) -> None:
        self._file.writelines(line + "\n" for line in lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Bar:
    """A progress bar of bytes on stderr, with rate and time left; where that is no terminal, a line
    now and then.
    """

    SECONDS = 60  # between lines

    def __init__(self, what: str, total: int, shown: bool) -> None:
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what, total=total, unit="B", unit_scale=True, disable=not (shown and on_terminal)
        )
        self._what, self._total, self._lines = what, total, shown and not on_terminal
        self._done, self._told = 0, time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._bar.update(count)
        self._done += count
        if self._lines and time.monotonic() - self._told >= self.SECONDS:
            self._told = time.monotonic()
            print(
                f"{self._what}: {self._done / 1e9:.3f} of {self._total / 1e9:.3f} GB",
                file=sys.stderr,
                flush=True,
            )


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is allocated next. It gives large blocks back to the
    system, and to get one's pages anew takes ten times as long as to fill it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, KEPT_BYTES)
        mallopt(trim_threshold, KEPT_BYTES)


class Worker(Protocol):
    """Does tasks; it is sent to other processes."""

    def work(self, task: Any, progress: Progress) -> Any:
        """Do a task and return its result; `progress` is called with bytes that are done."""


def run(
    worker: Worker, tasks: Sequence[Any], workers: int, progress: Progress
) -> Iterator[tuple[Any, Any]]:
    """Do tasks in several processes, or in this one; yields each task and its result as they are
    done, in any order.

    Where a task fails, those that have begun are still brought to their end.

    Args:
        workers: 1 works in this process.
        progress: called with bytes that are done, by this process.

    Raises:
        InputError: a process has been killed.
        Exception: what a task raised.
    """
    workers = min(workers, len(tasks))
    if workers < 2:
        keep_freed_memory()
        for task in tasks:
            yield task, worker.work(task, progress)
        return
    # forks of a process that has these imports and no threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    count = context.Value("q", 0)
    shown, failure = 0, None
    with ProcessPoolExecutor(workers, context, _begin, (worker, count, workers)) as pool:
        tasks_of: dict[Future[Any], Any] = {pool.submit(_work, task): task for task in tasks}
        try:
            while tasks_of:
                done, _ = wait(tasks_of, timeout=0.2, return_when=FIRST_COMPLETED)
                now = count.value  # read once: the workers go on adding
                progress(now - shown)
                shown = now
                for future in done:
                    task = tasks_of.pop(future)
                    if future.cancelled():
                        continue
                    if future.exception() is None:
                        yield task, future.result()
                    elif failure is None:
                        failure = future.exception()
                        pool.shutdown(wait=False, cancel_futures=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        progress(count.value - shown)
    if isinstance(failure, BrokenProcessPool):
        raise InputError(
            "a worker process was killed from outside, by the system if memory ran out; give the "
            "same command again, which "
            "keeps what is finished (fewer --workers need less memory)"
        ) from failure
    if failure is not None:
        raise failure


IMPORTS = ["tools.conversion.verify"]  # what processes need

_worker: Worker
_count: Any


def _begin(worker: Worker, count: Any, workers: int) -> None:
    """In a new process: note what it is for, and end it with its parent, however that ends."""
    global _worker, _count
    _worker, _count = worker, count
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(task: Any) -> Any:
    return _worker.work(task, _add)


def _add(count: int) -> None:
    with _count.get_lock():
        _count.value += count
