"""Folders by path or URL: local ones, and through fsspec remote ones (s3://, gs://, memory://,
...).
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import xxhash

from torchsft.config import InputError

# Bytes are hashed and written in slabs that stay in the processor's cache in between.
SLAB_BYTES = 2**20
# A local file begins to go to the disk when so many bytes are waiting, not only when it is closed.
WRITEBACK_BYTES = 64 * 2**20


def in_one_line(failure: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0].removesuffix(": ")


def root_of(output: str | Path, remote: str | None) -> str:
    """Return where a run with these options keeps its checkpoints and exports: a directory or
    URL.
    """
    return remote.rstrip("/") if remote else str(Path(output))


class Output:
    """A file being written from start to end.

    Attributes:
        size: bytes so far.
        checksum: xxh3 of these bytes, 16 hexadecimal digits; "" where none is kept.
    """

    def __init__(self, file: BinaryIO, checksum: bool, local: bool) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64() if checksum else None
        self._writes_back = local and hasattr(os, "posix_fadvise")
        self._handed_over = 0  # bytes on their way to the disk
        self.size = 0

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest() if self._hash else ""

    def write(self, data: Any) -> int:
        """Append bytes (anything with the buffer interface) and return their number."""
        data = memoryview(data).cast("B")
        for start in range(0, data.nbytes, SLAB_BYTES):
            slab = data[start : start + SLAB_BYTES]
            if self._hash:
                self._hash.update(slab)
            while slab.nbytes:
                written = self._file.write(slab)
                self.size += written
                slab = slab[written:]
            if self._writes_back and self.size - self._handed_over >= WRITEBACK_BYTES:
                self._start_writeback()
        return data.nbytes

    def _start_writeback(self) -> None:
        """Let the disk write what has not been handed over to it, without waiting for that."""
        start, length = self._handed_over, self.size - self._handed_over
        os.posix_fadvise(self._file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        self._handed_over = self.size

    def flush(self) -> None:
        """Do nothing: leaving `Folder.writer` flushes."""


class Folder:
    """A directory, or the objects of a remote file system whose names begin alike; `remote` says
    which. Local files are flushed to the disk when they are closed. Remote file systems know no
    rename and no flush: an object is there when it is closed. Files are meant by their names in it;
    what cannot be read or written raises an OSError. `place` is a path, or a URL of any file system
    that fsspec knows; an InputError: fsspec lacks what it needs, or takes it for a pattern.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = self._root = str(place).rstrip("/") or "/"
        self.remote = "://" in self.place
        if not self.remote:
            return
        if any(sign in self.place for sign in "*?["):
            raise InputError(
                f"{self.place} has one of the signs * ? [, which mean several places; "
                f"choose another URL"
            )
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{self.place} cannot be reached ({error}); install what it needs or "
                f"use a local path"
            ) from error

    def __str__(self) -> str:
        return self.place

    @property
    def path(self) -> Path:
        """The directory; only of a local folder."""
        assert not self.remote
        return Path(self._root)

    def _of(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def child(self, name: str) -> "Folder":
        """Return the folder of this name in it."""
        child = copy.copy(self)  # with its connection: fsspec makes one for each thread
        child.place, child._root = f"{self.place}/{name}", self._of(name)
        return child

    def names(self) -> list[str]:
        """Return names of the files and folders in it, sorted; none where it does not exist."""
        if not self.remote:
            return sorted(os.listdir(self._root)) if os.path.isdir(self._root) else []
        self._system.invalidate_cache()
        entries = (
            self._system.ls(self._root, detail=False) if self._system.isdir(self._root) else []
        )
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries} - {""})

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (
            self._system.isfile(self._of(name)) if self.remote else os.path.isfile(self._of(name))
        )

    def size(self, name: str) -> int:
        """Return bytes of a file."""
        return self._system.size(self._of(name)) if self.remote else os.path.getsize(self._of(name))

    def make(self) -> None:
        """Make it and its parents where they are not there."""
        (self._system if self.remote else os).makedirs(self._root, exist_ok=True)

    def remove(self, name: str = "") -> None:
        """Remove it with all that is in it, or one file; nothing where that does not exist."""
        if self.remote:
            self._system.invalidate_cache()  # other ranks write too
            if self._system.exists(self._of(name)):
                self._system.rm(self._of(name), recursive=not name)
        elif name:
            Path(self._of(name)).unlink(missing_ok=True)
        else:
            shutil.rmtree(self._root, ignore_errors=True)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file."""
        if self.remote:
            return self._system.cat_file(self._of(name), start=start, end=end)
        with open(self._of(name), "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fill `target` (bytes) with what stands at `start` of a file; an OSError says how much it
        lacks.
        """
        done = 0
        if self.remote:
            done = len(data := self.read(name, start, start + target.nbytes))
            target[:done] = data
        else:
            with open(self._of(name), "rb", buffering=0) as file:
                file.seek(start)
                while done < target.nbytes and (count := file.readinto(target[done:])):
                    done += count
        if done < target.nbytes:
            raise OSError(f"{self}/{name} ends {target.nbytes - done} bytes too early")

    @contextmanager
    def writer(self, name: str, checksum: bool = True) -> Iterator[Output]:
        """A new file, written from start to end; complete, and on a local disk, when the context is
        left.
        """
        with (
            self._system.open(self._of(name), "wb")
            if self.remote
            else open(self._of(name), "wb", buffering=0) as file
        ):
            output = Output(file, checksum, local=not self.remote)
            yield output
            if not self.remote:
                os.fsync(file.fileno())

    def write_text(self, name: str, text: str) -> Output:
        """Return a whole UTF-8 file."""
        with self.writer(name) as out:
            out.write(text.encode())
        return out
