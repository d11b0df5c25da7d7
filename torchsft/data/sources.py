"""Where rows come from: JSONL, JSON arrays, Parquet and `datasets`, read in order and in bounded memory.

A row that cannot be read becomes a `RowError` in its place, and those behind it are read nevertheless; where nothing
behind it can be read, the error says so.
"""

import codecs
import contextlib
import gzip
import itertools
import os
import re
import threading
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from torchsft.config import InputError
from torchsft.data.arrow import rows_of
from torchsft.data.rows import Row, RowError
from torchsft.data.specs import HUB, Spec, is_saved

MAX_BYTES = 64 * 2**20  # of one line, or element of a JSON array
TOO_LONG = ("line-too-long", f"longer than {MAX_BYTES:,} bytes; split it or leave it out")
PATIENCE = 10  # seconds that the hub has for its first answer
DAMAGE = (OSError, EOFError, zlib.error, pyarrow.ArrowException)  # what reading a damaged file raises
# What may change the state of a scan through a JSON array: in a string, between elements, inside an element.
IN_STRING, BETWEEN, INSIDE = (re.compile(pattern) for pattern in (rb'["\\]', rb'["\[\]{},]', rb'["\[\]{}]'))


class Source:
    """One open source. Raises InputError: it does not exist or cannot be opened, or the split is missing or unknown.

    Attributes:
        name: the last part of the path, unless given.
        kind: `jsonl`, `json` (one array), `csv`, `tsv`, `parquet` or `datasets`.
        total_bytes, read_bytes: for a progress bar, of the file as it is stored; total_bytes None: not known."""

    def __init__(self, spec: Spec, name: str | None = None, streaming: bool = False) -> None:
        self.spec, self.kind, self.read_bytes, self.dataset = spec, "jsonl", 0, None
        self.given = f"{spec.path}:{spec.split}" if spec.split else spec.path
        self.name = name or os.path.basename(os.path.abspath(spec.path))
        stem = re.sub(r"\.(gz|zst)$", "", spec.path.lower())
        if not os.path.isfile(spec.path):
            self.kind, self.dataset = "datasets", _open_dataset(spec, self.given, streaming)
        elif spec.split or not os.access(spec.path, os.R_OK):
            said = "a file has no splits; give PATH:WEIGHT" if spec.split else "it cannot be read; check its permissions"
            raise InputError(f"{self.given} cannot be used, as {said}")
        elif stem.endswith((".parquet", ".pq")):
            self.kind = "parquet"
        elif stem.endswith((".csv", ".tsv")):
            self.kind = stem[-3:]
        elif stem.endswith(".json"):
            with contextlib.suppress(*DAMAGE):  # rows() tells it, with its place
                starts = (chunk.removeprefix(codecs.BOM_UTF8).lstrip()[:1] for chunk in self._chunks())
                self.kind = "json" if next(filter(None, starts), b"") == b"[" else "jsonl"
        data = getattr(self.dataset, "data", None)  # of a dataset that is no stream
        self.total_bytes = os.path.getsize(spec.path) if self.dataset is None else data.nbytes if data else None

    def places(self) -> tuple[str, ...]:
        """What stands in front of a row's number, to tell the user where it is."""
        word = "line" if self.kind in ("jsonl", "csv", "tsv") else "row"
        return (f"{self.given}, {word} ",)

    def where(self, number: int) -> str:
        """The place of row `number`, for the user."""
        return f"{self.places()[0]}{number}"

    def files(self) -> list[str]:
        """What is read, as paths without links; nothing for a dataset of the hub."""
        path = Path(self.spec.path).resolve()
        if path.is_dir():
            return sorted(str(file) for file in path.rglob("*") if file.is_file())
        return [str(path)] if path.is_file() else []

    def fingerprint(self) -> str:
        """A hash of the content: of the bytes of the files; for a dataset of the hub, what `datasets` gives it."""
        found, paths = blake2b(self.kind.encode(), digest_size=16), [self.spec.path]
        if self.kind == "datasets":
            paths = [file["filename"] for file in self.dataset.cache_files] if os.path.isdir(self.spec.path) else []
            found.update(b"" if paths else f"{self.given}:{getattr(self.dataset, '_fingerprint', '')}".encode())
        for path in paths:
            with open(path, "rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
        return found.hexdigest()

    def rows(self, start: int = 0) -> Iterator[tuple[int, bytes | Row | RowError]]:
        """Yield (number from 1, payload for `decode`) of all rows behind the first `start`, in order. Blank lines are
        numbered and left out. Where nothing behind a fault can be read, its RowError is the last one and says so."""
        arrow, self.read_bytes = self.kind in ("parquet", "datasets"), 0
        if self.kind in ("csv", "tsv"):
            yield from self._table_rows(start)
            return
        number = start if arrow else 0
        try:
            for number, row in enumerate(self._arrow_rows(start) if arrow else self._lines(), number + 1):  # noqa: B020
                if isinstance(row, tuple):
                    row = RowError(self.where(number), *row)
                if number > start and (not isinstance(row, bytes) or row.strip()):
                    yield number, row
        except DAMAGE as error:
            if number >= start:
                said = f"this and all that follows cannot be read ({error}); give the whole, undamaged file"
                yield number + 1, RowError(self.where(number + 1), "truncated-file", said)

    def _table_rows(self, start: int) -> Iterator[tuple[int, Row | RowError]]:
        """Of a table of text, as `rows`; the number of a row is that of its first line."""
        from torchsft.data.files import table_rows

        number = 1
        try:
            for number, row in table_rows(self._chunks(), "," if self.kind == "csv" else "\t"):
                if number > start:
                    yield number, RowError(self.where(number), *row) if isinstance(row, tuple) else row
        except DAMAGE as error:
            said = f"this and all that follows cannot be read ({error}); give the whole, undamaged file"
            yield number + 1, RowError(self.where(number + 1), "truncated-file", said)

    def _chunks(self) -> Iterator[bytes]:
        """The file in portions, decompressed. Raises one of DAMAGE where it is cut off or damaged."""
        with open(self.spec.path, "rb") as raw:
            read, size = raw.read, 2**20
            if self.spec.path.lower().endswith(".gz"):
                read = gzip.GzipFile(fileobj=raw).read1  # `read` would lose what lies in front of the damage
            elif self.spec.path.lower().endswith(".zst"):
                read, size = pyarrow.input_stream(raw, compression="zstd").read, 2**16  # a damaged portion is lost whole
            while chunk := read(size):
                self.read_bytes = raw.tell()
                yield chunk

    def _lines(self) -> Iterator[bytes | tuple[str, str]]:
        """The lines, or reason and sentence for one that is too long, which is read over without being kept."""
        parts, size = [], 0
        for chunk in itertools.chain(self._array_as_lines() if self.kind == "json" else self._chunks(), [b"\n"]):
            for i, piece in enumerate(chunk.split(b"\n")):
                if i:
                    yield b"".join(parts) if parts else TOO_LONG
                    parts, size = [], 0
                size += len(piece)
                parts = [*parts, piece] if size <= MAX_BYTES else []

    def _array_as_lines(self) -> Iterator[bytes]:
        """The chunks with each element of the JSON array on a line. Brackets are counted and nothing is parsed: a faulty
        element spoils none behind it, and no byte is read twice, however long the element."""
        depth, in_string, closed, at = 0, False, False, 0
        for chunk in self._chunks():
            lines = bytearray(chunk.replace(b"\n", b"\r"))  # white space as well, and as forbidden in strings
            while not closed and (match := (IN_STRING if in_string else BETWEEN if depth < 2 else INSIDE).search(chunk, at)):
                at, char = match.end(), match[0]
                if char == b'"':
                    in_string = not in_string
                elif char == b"\\":
                    at += 1  # what is escaped ends nothing; it may be the first byte of the next chunk
                else:
                    depth += 1 if char in b"[{" else -1 if char in b"]}" else 0
                    closed = depth == 0
                    if closed or (depth == 1 and char in b",[{"):  # the last two: the array begins
                        lines[at - 1] = ord("\n" if char in b",]}" else " ")
            yield bytes(lines)
            if closed and chunk[at:].strip():
                raise EOFError("text follows the end of the array")
            at = int(at > len(chunk))
        if not closed:
            raise EOFError("the array is not closed")

    def _arrow_rows(self, start: int) -> Iterator[Row | tuple[str, str]]:
        number, skip = start, 0
        if self.kind == "parquet":
            # So columns are streamed; as is the default, a row group is read whole, and it may be all of the file.
            file = pyarrow.parquet.ParquetFile(self.spec.path, buffer_size=2**20, pre_buffer=False)
            groups = range(file.num_row_groups)
            ends = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in groups)]).tolist()
            first = int(np.searchsorted(ends, start, side="right")) - 1
            count, skip, batches = ends[-1], start - ends[first], file.iter_batches(64, row_groups=groups[first:])
        else:
            table = self.dataset.with_format("arrow")  # which decodes nothing, such as images beside the text
            count = len(table) if hasattr(table, "data") else float("inf")
            batches = table.skip(start).iter(64) if start < count else ()
        for batch in batches:
            rows = _python(batch.slice(skip))
            yield from rows
            number, skip = number + len(rows), max(skip - batch.num_rows, 0)
            self.read_bytes = int((self.total_bytes or 0) * number // count)


def _python(batch: Any) -> list[Row | tuple[str, str]]:
    """The rows of an Arrow batch; where one is faulty, each is read alone."""
    try:
        return rows_of(batch)
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _python(batch.slice(i, 1))]
        reason = "not-utf-8" if isinstance(error, UnicodeError) else "unreadable"
        return [(reason, f"a value cannot be read ({error}); repair it or leave the row out")]


def unreachable() -> str:
    """Why the hub does not answer, asked as its libraries ask it (proxies, certificates), but once and within PATIENCE.

    Returns:
        Nothing where it answers, whatever it answers.
    """
    from huggingface_hub.constants import ENDPOINT  # slow, and mostly not needed
    from huggingface_hub.utils import get_session

    client, said = get_session(), [f"no answer within {PATIENCE} s"]

    def ask() -> None:
        try:
            client.head(ENDPOINT, timeout=PATIENCE)
            said[0] = ""
        except Exception as error:  # of whatever client huggingface_hub has
            said[0] = f"{type(error).__name__}: {error}".partition("\n")[0]

    asking = threading.Thread(target=ask, daemon=True)  # each address and the name server have timeouts of their own
    asking.start()
    asking.join(PATIENCE)
    return f"{ENDPOINT}: {said[0]}" if said[0] else ""


def _no_hub(given: str, said: str, offline: bool) -> str:
    """The sentence for a dataset of the hub without a network."""
    beforehand = "download it beforehand and name its files"
    if offline:
        fault = f"{given} cannot be opened, as the local cache does not hold it and HF_HUB_OFFLINE forbids the network ({said})"
        return f"{fault}; {beforehand}, or unset HF_HUB_OFFLINE"
    fault = f"{given} cannot be opened, as the hub of data sets cannot be reached ({said})"
    return f"{fault}; check the network, {beforehand}, or set HF_HUB_OFFLINE=1 to use the local cache"


def _open_dataset(spec: Spec, given: str, streaming: bool) -> Any:
    """The `datasets.Dataset`, or streamed `IterableDataset`, of a directory, or of NAME or NAME/CONFIG on the hub."""
    directory, hub = os.path.isdir(spec.path), HUB.fullmatch(spec.path)
    saved = is_saved(spec.path)
    if not saved and not (spec.split and (directory or hub)):
        said = "is a directory, but none of datasets' save_to_disk; name the files in it" if directory else "does not exist"
        raise InputError(f"{given} {said}; give an existing file or directory, or NAME:SPLIT for a dataset of the hub")
    import datasets  # slow, and mostly not needed

    of_hub, offline = not saved and not directory, datasets.config.HF_HUB_OFFLINE
    if of_hub and not offline and (reason := unreachable()):  # at once: the libraries would try for minutes
        raise InputError(_no_hub(given, reason, offline))
    try:
        if not saved:
            name, config = hub.groups() if of_hub else (spec.path, None)
            return datasets.load_dataset(name, config, split=spec.split, streaming=streaming)
        found = datasets.load_from_disk(spec.path)
    except Exception as error:  # of the network, of the hub, of any file format
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        if of_hub and (isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in said):  # not there, nor in the cache
            raise InputError(_no_hub(given, said, offline)) from None
        raise InputError(f"{given} cannot be opened as a dataset ({said}); check its name, split and files") from None
    splits = list(found) if isinstance(found, dict) else [None]
    if spec.split not in splits:
        has = f"the splits {', '.join(splits)}; give one as {spec.path}:{splits[0]}" if splits != [None] else "no splits"
        raise InputError(f"{given} cannot be used, as the dataset has {has}")
    return found[spec.split] if spec.split else found
