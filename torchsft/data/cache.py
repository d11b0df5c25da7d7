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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchsft.config import InputError
from torchsft.data.rows import ROWS_OF_A_FILE
from torchsft.data.sources import Source
from torchsft.data.template import Sample

TOKEN = np.dtype("<i4")
RUN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
RECORD = np.dtype(
    [("token", "<i8"), ("run", "<i8"), ("row", "<i8"), ("length", "<i4"), ("part", "<i4")]
)
FILES = {"tokens.bin": TOKEN, "runs.bin": RUN, "index.bin": RECORD}
# bytes; of larger files only the size is checked: hashing is slower than all else of a start
HASHED_WHEN_OPENED = 2**26
# what opening a directory raises that is not whole
DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError)


class RowSample(NamedTuple):
    """A sample and the row that gave it.

    Attributes:
        number: of the row.
        part: 0: the sample is all that its row gave; else counted from 1.
        tokens: int32 [n], n at least 1.
        weights: float32 [n]
    """

    number: int
    part: int
    tokens: np.ndarray
    weights: np.ndarray


@dataclass(slots=True)
class Block:
    """N samples as they are kept.

    Attributes:
        tokens: TOKEN [T]
        runs: RUN [R]
        index: RECORD [N + 1], the last one as of a further sample.
    """

    tokens: np.ndarray
    runs: np.ndarray
    index: np.ndarray


class Opened(NamedTuple):
    """What the cache has of a source.

    Attributes:
        report: of the build.
        digest: a hash of tokens, weights and row numbers.
    """

    samples: "Samples"
    report: dict[str, Any]
    digest: str


AddBlock = Callable[[Block], None]
Build = Callable[[AddBlock], dict[str, Any]]


def pack_block(samples: Sequence[RowSample]) -> Block:
    """Return the block of some samples."""
    index = np.zeros(len(samples) + 1, RECORD)
    if not samples:
        return Block(np.zeros(0, TOKEN), np.zeros(0, RUN), index)
    numbers, parts, tokens_of, weights_of = zip(*samples, strict=True)
    tokens = np.concatenate(tokens_of)
    weights = np.concatenate(weights_of)
    lengths = [len(each) for each in tokens_of]
    index["row"][:-1] = numbers
    index["part"][:-1] = parts
    index["length"][:-1] = lengths
    first = np.cumsum(index["length"]) - index["length"]  # token of each sample
    index["token"] = first

    # A run begins where a weight differs from the one before it, and where a sample begins.
    begins = np.ones(len(weights), bool)
    begins[1:] = weights[1:] != weights[:-1]
    begins[first[:-1]] = True
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(weights))
    is_trained = weights[starts] != 0
    starts = starts[is_trained]
    ends = ends[is_trained]
    index["run"] = np.searchsorted(starts, first)

    sample_of_run = np.searchsorted(first[:-1], starts, side="right") - 1
    origin = first[sample_of_run]
    runs = np.empty(len(starts), RUN)
    runs["start"] = starts - origin
    runs["end"] = ends - origin
    runs["weight"] = weights[starts]
    return Block(tokens.astype(TOKEN, copy=False), runs, index)


def row_id(name: str, number: int) -> str:
    """Return `<source>:<row>`, or `<source>:<file>:<row>` where several files are one source."""
    file, row = divmod(number, ROWS_OF_A_FILE)
    return f"{name}:{file}:{row}" if file else f"{name}:{row}"


class Samples(Sequence[Sample]):
    """The samples of a source, each made of the arrays when it is asked for.

    Attributes:
        rows: int64 [N], number of the row that gave each sample.
        parts: int32 [N], as of `RowSample`.
        lengths: int32 [N], tokens of each sample.
    """

    def __init__(self, name: str, block: Block) -> None:
        self.name = name
        self.block = block
        records = block.index[:-1]
        self.rows = records["row"]
        self.parts = records["part"]
        self.lengths = records["length"]

    def __len__(self) -> int:
        return len(self.lengths)

    def id(self, i: int) -> str:
        """Return the id of its row, with `/<part>` behind it where the row gave several samples."""
        part = int(self.parts[i])
        of_row = row_id(self.name, int(self.rows[i]))
        return f"{of_row}/{part}" if part else of_row

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        # of this sample and of the one behind it, in the order of RECORD
        (token, run, *_), (next_token, next_run, *_) = self.block.index[i : i + 2].tolist()
        tokens = self.block.tokens[token:next_token].copy()
        runs = self.block.runs[run:next_run]
        weights = np.zeros(len(tokens), np.float32)
        for start, end, weight in runs.tolist():
            weights[start:end] = weight
        return Sample(self.id(i), tokens, weights)


def open_or_build(directory: Path, key: str, name: str, build: Build) -> Opened:
    """Open the samples of `key`.

    Where they are not there, or not whole, one process builds them, while the others wait for it.

    Args:
        directory: of all caches.
        name: of the source.
        build: gets a function that takes the blocks, and returns the report.

    Raises:
        InputError: `directory` cannot be used.
    """
    target = directory / key
    partial = directory / f"{key}.partial"
    with _refusals_of_disk(directory):
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


def _open(directory: Path, name: str) -> Opened:
    """Map the files of a cache.

    Args:
        name: of the source.

    Raises:
        One of DAMAGED: it is not whole.
    """
    meta = json.loads((directory / "meta.json").read_bytes())
    arrays = []
    for (file, dtype), (size, digest) in zip(FILES.items(), meta["files"], strict=True):
        content = _mapped(directory / file)
        is_whole = len(content) == size
        if is_whole and size <= HASHED_WHEN_OPENED:
            is_whole = _hash(content) == digest
        if not is_whole:
            raise ValueError(f"{file} is not what was written")
        arrays.append(content.view(dtype))
    samples = Samples(name, Block(*arrays))
    return Opened(samples, meta["report"], _hash(json.dumps(meta["files"])))


def _write(directory: Path, build: Build) -> None:
    """Write the files of a cache from the blocks that `build` makes.

    Each block counts tokens and runs from 0; in the file they are counted from the beginning.
    """
    directory.mkdir()
    end = np.zeros(1, RECORD)  # as of the sample behind the last block
    with ExitStack() as stack:
        files = [stack.enter_context((directory / file).open("wb")) for file in FILES]

        def add(block: Block) -> None:
            """Write a block behind the others."""
            index = block.index.copy()
            index["token"] += end["token"]
            index["run"] += end["run"]
            for file, content in zip(files, (block.tokens, block.runs, index[:-1]), strict=True):
                file.write(content.tobytes())
            end[:] = index[-1:]

        report = build(add)
        files[-1].write(end.tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())  # a directory that gets its name is whole
    contents = [_mapped(directory / file) for file in FILES]
    written = [(len(content), _hash(content)) for content in contents]
    (directory / "meta.json").write_text(json.dumps({"files": written, "report": report}))


def _mapped(file: Path) -> np.ndarray:
    """Return the bytes of a file, uint8 [n], mapped."""
    # asarray: slices of a memmap object cost ten times those of an array, and this is the same
    # memory
    return np.asarray(np.memmap(file, np.uint8, mode="r"))


@contextmanager
def _refusals_of_disk(directory: Path) -> Iterator[None]:
    """Raise InputError, one sentence, for a disk that is full or not ours."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"the cache in {directory} cannot be used ({reason}); free space or set --data.cache"
        ) from error


def cache_directory(option: str | None) -> Path:
    """Return the directory of all caches, with `--data.cache` as given."""
    return Path(option or os.environ.get("TORCHSFT_CACHE") or "~/.cache/torchsft").expanduser()


def key_of(*parts: Any) -> str:
    """Return a name for what this version of the code makes of some options.

    Args:
        parts: JSON.
    """
    return _hash(json.dumps([_code(), *parts], sort_keys=True))


@functools.cache
def _code() -> str:
    """Return a hash of the code that makes samples, so that no cache outlives a change of it."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _hash("\0".join(file.read_text() for file in files))


def _hash(content: str | np.ndarray) -> str:
    if isinstance(content, str):
        content = content.encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def fingerprint(directory: Path, source: Source) -> str:
    """Return the source's fingerprint.

    Args:
        directory: of all caches, where it is remembered for files that have not changed since.
    """
    state = []
    for file in source.paths():
        stat = os.stat(file)
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        state.append((os.path.abspath(file), stat.st_size, *times, stat.st_ino))
    if not state:  # a name on the hub
        return source.fingerprint()
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
