"""Tokenised samples on disk, memory-mapped: opened in milliseconds, in memory that does not grow
with the data.

- <cache>/<key>/tokens.bin: the tokens of all samples, one sample after the other.
- <cache>/<key>/runs.bin: stretches of equal loss weights other than 0, counted from the beginning
  of their sample.
- <cache>/<key>/index.bin: a record for each sample, and one behind the last.
- <cache>/<key>/meta.json: sizes and hashes of the three, and the report of the build.
- <cache>/<key>.partial: the same while it is built. <key>.lock: held by the one process that
  builds.
- <cache>/<hash of path, size and times>.fingerprint: of an unchanged source, so that a second start
  does not read it.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchsft.config import InputError
from torchsft.data.sources import Source
from torchsft.data.template import Sample

TOKEN = np.dtype("<i4")
RUN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
# row n of the f-th file of a source (both from 1) has the number f * ROWS_OF_A_FILE + n
ROWS_OF_A_FILE = 10**9
RECORD = np.dtype(
    [("token", "<i8"), ("run", "<i8"), ("row", "<i8"), ("length", "<i4"), ("part", "<i4")]
)
FILES = {"tokens.bin": TOKEN, "runs.bin": RUN, "index.bin": RECORD}
# bytes; of larger files only the size is checked: hashing is slower than all else of a start
HASHED_WHEN_OPENED = 2**26
# what opening a directory raises that is not whole
DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError)


class Block(NamedTuple):
    """N samples as they are kept: TOKEN [T], RUN [R] and RECORD [N + 1], the last one as of a
    further sample.
    """

    tokens: np.ndarray
    runs: np.ndarray
    index: np.ndarray


def pack_block(samples: Sequence[tuple[int, int, np.ndarray, np.ndarray]]) -> Block:
    """The block of some (row number, part, tokens [n], weights [n]) with n at least 1."""
    index = np.zeros(len(samples) + 1, RECORD)
    if not samples:
        return Block(np.zeros(0, TOKEN), np.zeros(0, RUN), index)
    tokens, weights = (np.concatenate([sample[i] for sample in samples]) for i in (2, 3))
    index["row"][:-1], index["part"][:-1], index["length"][:-1] = zip(
        *((s[0], s[1], len(s[2])) for s in samples), strict=True
    )
    first = index["token"] = np.cumsum(index["length"]) - index["length"]
    # where a weight differs from the one before it, and where a sample begins
    begins = np.ones(len(weights), bool)
    begins[1:] = weights[1:] != weights[:-1]
    begins[first[:-1]] = True
    starts = np.flatnonzero(begins)
    ends, trained = np.append(starts[1:], len(weights)), weights[starts] != 0
    starts, ends = starts[trained], ends[trained]
    index["run"] = np.searchsorted(starts, first)
    origin = first[np.searchsorted(first[:-1], starts, side="right") - 1]
    runs = np.empty(len(starts), RUN)
    runs["start"], runs["end"], runs["weight"] = starts - origin, ends - origin, weights[starts]
    return Block(tokens.astype(TOKEN, copy=False), runs, index)


def row_id(name: str, number: int) -> str:
    """`<source>:<row>`, or `<source>:<file>:<row>` where several files are one source."""
    file, row = divmod(number, ROWS_OF_A_FILE)
    return f"{name}:{file}:{row}" if file else f"{name}:{row}"


class Samples(Sequence[Sample]):
    """The samples of a source, each made of the arrays when it is asked for.

    Attributes:
        rows, parts: int64 [N] and int32 [N]; part 0: the sample is all that its row gave.
        lengths: int32 [N], tokens of each sample."""

    def __init__(self, name: str, block: Block) -> None:
        self.name, self.block = name, block
        self.rows, self.parts, self.lengths = (
            block.index[field][:-1] for field in ("row", "part", "length")
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, i: int) -> str:
        """That of its row, with `/<part>` behind it where the row gave several samples."""
        return row_id(self.name, int(self.rows[i])) + (
            f"/{part}" if (part := int(self.parts[i])) else ""
        )

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        here, behind = self.block.index[i : i + 2].tolist()
        tokens = self.block.tokens[here[0] : behind[0]].copy()
        weights = np.zeros(len(tokens), np.float32)
        for start, end, weight in self.block.runs[here[1] : behind[1]].tolist():
            weights[start:end] = weight
        return Sample(self.id(i), tokens, weights)


def open_or_build(
    directory: Path, key: str, name: str, build: Callable[[Callable[[Block], None]], dict[str, Any]]
) -> tuple[Samples, dict[str, Any], str]:
    """The samples of `key`, the report of their build, and a hash of their tokens, weights and row
    numbers.

    Where they are not there, or not whole, one process builds them, while the others wait for it:
    `build` is called with a function that takes the blocks, and returns the report. Raises
    InputError: `directory` (of all caches) cannot be used.
    """
    target, partial = directory / key, directory / f"{key}.partial"
    with _remedy(directory):
        with suppress(*DAMAGED):
            return _open(target, name)
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / f"{key}.lock", "a") as lock:
            # let go when the file is closed, also by the end of a process that is killed
            fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(*DAMAGED):
                return _open(target, name)
            if target.exists():
                warnings.warn(f"{target} is damaged; {name} is tokenised again", stacklevel=2)
                shutil.rmtree(target)
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                _write(partial, build)
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return _open(target, name)


def _open(directory: Path, name: str) -> tuple[Samples, dict[str, Any], str]:
    meta, maps = json.loads((directory / "meta.json").read_bytes()), []
    for (file, dtype), (size, digest) in zip(FILES.items(), meta["files"], strict=True):
        # asarray: slices of a memmap object cost ten times those of an array, and this is the same
        # memory.
        content = np.asarray(np.memmap(directory / file, np.uint8, mode="r"))
        if len(content) != size or (size <= HASHED_WHEN_OPENED and _hash(content) != digest):
            raise ValueError(f"{file} is not what was written")
        maps.append(content.view(dtype))
    return Samples(name, Block(*maps)), meta["report"], _hash(json.dumps(meta["files"]))


def _write(directory: Path, build: Callable[[Callable[[Block], None]], dict[str, Any]]) -> None:
    directory.mkdir()
    end, digests = np.zeros(1, RECORD), [hashlib.blake2b(digest_size=16) for _ in FILES]
    with ExitStack() as stack:
        files = [stack.enter_context((directory / file).open("wb")) for file in FILES]

        def append(*contents: np.ndarray) -> None:
            for file, digest, content in zip(files, digests, contents, strict=True):
                digest.update(content.tobytes())
                file.write(content.tobytes())

        def add(block: Block) -> None:
            index = block.index.copy()
            index["token"] += end["token"]
            index["run"] += end["run"]
            append(block.tokens, block.runs, index[:-1])
            end[:] = index[-1:]

        report = build(add)
        append(np.zeros(0, TOKEN), np.zeros(0, RUN), end)
        for file in files:
            file.flush()
            os.fsync(file.fileno())  # a directory that gets its name is whole
        written = [
            (file.tell(), digest.hexdigest()) for file, digest in zip(files, digests, strict=True)
        ]
    (directory / "meta.json").write_text(json.dumps({"files": written, "report": report}))


@contextmanager
def _remedy(directory: Path) -> Iterator[None]:
    """A full or foreign disk is the user's to mend: one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"the cache in {directory} cannot be used ({reason}); free space or set --data.cache"
        ) from error


def cache_directory(option: str | None) -> Path:
    """The directory of all caches, with `--data.cache` as given."""
    return Path(option or os.environ.get("TORCHSFT_CACHE") or "~/.cache/torchsft").expanduser()


def key_of(*parts: Any) -> str:
    """A name for what this version of the code makes of `parts` (JSON)."""
    return _hash(json.dumps([_code(), *parts], sort_keys=True))


@functools.cache
def _code() -> str:
    """Changes with the code that makes samples, so that no cache outlives a change of it."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _hash("\0".join(file.read_text() for file in files))


def _hash(content: str | np.ndarray) -> str:
    return hashlib.blake2b(
        content.encode() if isinstance(content, str) else content, digest_size=16
    ).hexdigest()


def fingerprint(directory: Path, source: Source) -> str:
    """The source's fingerprint; remembered in `directory` for files that have not changed since."""
    stats = [(os.path.abspath(file), os.stat(file)) for file in source.paths()]
    if not stats:  # a name on the hub
        return source.fingerprint()
    state = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file, s in stats]
    memo = directory / f"{_hash(json.dumps([source.kind, state, source.spec.split]))}.fingerprint"
    with suppress(OSError):
        return memo.read_text()
    found = source.fingerprint()
    with suppress(OSError):  # a directory that cannot be written: computed anew next time
        directory.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}")
        partial.write_text(found)
        os.replace(partial, memo)
    return found
