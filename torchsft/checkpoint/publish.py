"""Directories with one writer, and directories that appear only when they are complete."""

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchsft.checkpoint.manifest import MANIFEST
from torchsft.checkpoint.storage import Folder, in_one_line
from torchsft.config import InputError
from torchsft.parallel.collectives import gather_objects, rank_and_size

# What a run that was killed leaves beside its checkpoints.
_LEFT = re.compile(r"\.step-\d+\.(incomplete|removed)")


def sync_directory(path: Path) -> None:
    """Flush a directory's entries (names, not contents) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def output_lock(output: Path, main: bool) -> Iterator[None]:
    """On the `main` rank: make a run's directory and keep other runs out until this one leaves or
    its process ends.

    Raises:
        InputError: another process writes to it, or it cannot be written.
    """
    if not main:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115 (held open as long as the lock)
    except OSError as error:
        fault = (
            "is a file" if isinstance(error, FileExistsError) else f"cannot be written ({error})"
        )
        raise InputError(f"--output {output} {fault}; choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run is writing to {output}; wait for it or choose another --output"
            ) from error
        yield


@contextmanager
def read_lock(folder: Folder) -> Iterator[None]:
    """Keep a training checkpoint from being removed by its run while it is read. Of a remote one
    nothing is known.

    Raises:
        InputError: it was removed or replaced all the same, before or meanwhile.
    """
    if folder.remote or not (path := folder.path / "trainer.json").is_file():
        yield
        return
    with open(path) as file:

        def check() -> None:
            if not (path.is_file() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                raise InputError(
                    f"checkpoint {folder} has just been removed or replaced; use a newer one"
                )

        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        check()
        yield
        check()


def discard(folder: Folder) -> None:
    """Remove a folder, first what makes it complete: at no time does it look like a damaged
    checkpoint.
    """
    folder.remove(MANIFEST)
    folder.remove()


def remove_unread(folder: Folder) -> None:
    """Remove a training checkpoint, unless it is being read; never half of it.

    Raises:
        OSError: it cannot be removed.
    """
    if folder.remote:
        discard(folder)
        return
    # NFS locks exclusively only what may be written
    with open(folder.path / "trainer.json", "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            pass  # a file system without locks
        hidden = _hide(folder.path)
    shutil.rmtree(hidden)


def _hide(path: Path) -> Path:
    """Rename a directory that is to be removed; its new path."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def staging_of(target: Folder) -> Folder:
    """Return the folder in which what becomes `target` is written: a hidden one beside it; remote
    ones know no rename.
    """
    return (
        target
        if target.remote
        else Folder(target.path.with_name(f".{target.path.name}.incomplete"))
    )


def prepare_staging(target: Folder) -> None:
    """Make an empty staging folder for a training checkpoint. The directory that it lies in must
    be there; what killed runs left in that is removed.
    """
    staging = staging_of(target)
    discard(staging)
    if staging.remote:
        staging.make()
        return
    directory = target.path.parent
    for path in filter(lambda path: _LEFT.fullmatch(path.name), directory.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
    staging.path.mkdir()


def publish(staging: Folder, target: Folder) -> None:
    """Let a complete staging folder take `target`'s place, on the disk too; there is nothing left
    to do for a remote one. A `target` that is there already is exchanged in one step on Linux;
    elsewhere it is away for a moment.
    """
    if target.remote:
        return
    sync_directory(staging.path)
    old = staging.path  # where the old one is after an exchange
    if not target.path.exists():
        staging.path.rename(target.path)
    elif not _exchange(staging.path, target.path):
        old = _hide(target.path)
        staging.path.rename(target.path)
    sync_directory(target.path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories' names in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        renameat2 is not None
        and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    )


class SharedError(OSError):
    """A failure of one rank that is raised on every rank."""


@contextmanager
def together() -> Iterator[None]:
    """Collective: an OSError in here on one rank becomes a SharedError, when all ranks have come to
    the end.
    """
    failure = None
    try:
        yield
    except SharedError:  # the others know
        raise
    except OSError as error:
        failure = error
    problems = gather_objects(failure and in_one_line(failure))
    for rank, problem in enumerate(problems):
        if problem:
            raise SharedError(f"rank {rank}: {problem}") from failure


@contextmanager
def published(place: str | Path | Folder) -> Iterator[Folder]:
    """Collective: yields an empty folder that takes the place of `place` when all ranks are done,
    and have flushed their files. A remote `place` is emptied first and written in place: write last
    what makes it complete. An OSError on
    one rank is a SharedError on all of them: a local `place` stays as it was, and nothing is left
    beside it. After another failure, of which the other ranks do not learn, the next attempt
    removes the hidden directory.
    """
    main = rank_and_size()[0] == 0
    target = place if isinstance(place, Folder) else Folder(place)
    staging = staging_of(target)
    with together():
        if main:
            staging.remove()
            staging.make()
    try:
        with together():
            yield staging
        with together():
            if main:
                publish(staging, target)
    except SharedError:
        if main:
            with suppress(OSError):  # the place that cannot be written
                staging.remove()
        raise
