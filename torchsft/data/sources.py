"""Where rows come from: JSONL, JSON arrays, Parquet and `datasets`, read in order and in bounded
memory.

A row that cannot be read becomes a `RowError` in its place, and those behind it are read
nevertheless; where nothing behind it can be read, the error says so.
"""

import codecs
import contextlib
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from torchsft.config import InputError
from torchsft.data.arrow import rows_of
from torchsft.data.hub import open_dataset
from torchsft.data.json_array import array_lines
from torchsft.data.rows import NumberedRow, Row, RowError, place_of
from torchsft.data.specs import Spec
from torchsft.data.tables import table_rows

MAX_BYTES = 64 * 2**20  # of one line, or element of a JSON array
TOO_LONG = RowError("line-too-long", f"longer than {MAX_BYTES:,} bytes; split it or leave it out")
# what reading a damaged file raises
DAMAGE = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
CHUNK_BYTES = 2**20
CHUNK_BYTES_ZSTD = 2**16  # a damaged portion is lost whole
ARROW_ROWS = 64  # that are read at once


class Source:
    """One open source.

    Args:
        name: the last part of the path, unless given.

    Attributes:
        kind: `jsonl`, `json` (one array), `csv`, `tsv`, `parquet` or `datasets`.
        total_bytes, read_bytes: for a progress bar, of the file as it is stored; total_bytes None:
            not known.

    Raises:
        InputError: it does not exist or cannot be opened, or the split is missing or unknown.
    """

    def __init__(self, spec: Spec, name: str | None = None, streaming: bool = False) -> None:
        self.spec = spec
        self.name = name or os.path.basename(os.path.abspath(spec.path))
        self.dataset: Any = None
        self.total_bytes: int | None = None
        self.read_bytes = 0
        self._open(streaming)

    def _open(self, streaming: bool) -> None:
        """Set `kind`, `total_bytes` and `dataset`."""
        path = self.spec.path
        if os.path.isfile(path):
            _check_file(self.spec)
            self.kind = self._kind_of_file()
            self.total_bytes = os.path.getsize(path)
        else:
            self.kind = "datasets"
            self.dataset = open_dataset(self.spec, streaming)
            table = getattr(self.dataset, "data", None)  # a stream has none
            self.total_bytes = table.nbytes if table else None

    def _kind_of_file(self) -> str:
        """Return the kind of a file by the ending of its name; of .json also by how it begins."""
        path = re.sub(r"\.(gz|zst)$", "", self.spec.path.lower())
        if path.endswith((".parquet", ".pq")):
            return "parquet"
        if path.endswith((".csv", ".tsv")):
            return path[-3:]
        if path.endswith(".json") and self._first_character() == b"[":
            return "json"
        return "jsonl"

    def _first_character(self) -> bytes:
        """Return the first character that is not white space; b"" where it cannot be read."""
        with contextlib.suppress(*DAMAGE):  # which `rows` raises again, with its place
            for chunk in self._chunks():
                text = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
                if text:
                    return text[:1]
        return b""

    def places(self) -> tuple[str, ...]:
        """Return what stands before a row's number where the user is told its place."""
        word = "line" if self.kind in ("jsonl", "csv", "tsv") else "row"
        return (f"{self.spec.given}, {word} ",)

    def where(self, number: int) -> str:
        """Return the place of row `number`, for the user."""
        return place_of(self.places(), number)

    def paths(self) -> list[str]:
        """Return what is read, directories of a data set too; nothing for a data set of the hub."""
        path = Path(self.spec.path)
        if path.is_dir():
            below = sorted(str(file) for file in path.rglob("*"))
            if below:
                return below
        return [str(path)] if path.exists() else []

    def fingerprint(self) -> str:
        """Return a hash of the content: of the bytes of the files; for a dataset of the hub, what
        `datasets` gives it.
        """
        digest = blake2b(self.kind.encode(), digest_size=16)
        paths = [self.spec.path]
        if self.kind == "datasets":
            is_local = os.path.isdir(self.spec.path)
            paths = [file["filename"] for file in self.dataset.cache_files] if is_local else []
        if not paths:
            digest.update(f"{self.spec.given}:{getattr(self.dataset, '_fingerprint', '')}".encode())
        for path in paths:
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def rows(self, start: int = 0) -> Iterator[NumberedRow]:
        """Yield (number from 1, payload for `read_row`) of all rows behind the first `start`, in
        order.

        Blank lines are numbered and left out. Where nothing behind a fault can be read, its
        RowError is the last one and says so.
        """
        self.read_bytes = 0
        number = 0  # of the last row; of a table that of its first line
        if self.kind in ("parquet", "datasets"):
            number = start
            rows = enumerate(self._arrow_rows(start), start + 1)
        elif self.kind in ("csv", "tsv"):
            number = 1
            rows = table_rows(self._chunks(), "," if self.kind == "csv" else "\t", MAX_BYTES)
        else:
            rows = enumerate(self._lines(), 1)
        try:
            for number, row in rows:
                is_blank = isinstance(row, bytes) and not row.strip()
                if number > start and not is_blank:
                    yield number, row
        except DAMAGE as error:
            if number >= start:
                yield (
                    number + 1,
                    RowError(
                        "truncated-file",
                        f"this and all that follows cannot be read ({error}); give the whole, "
                        f"undamaged file",
                    ),
                )

    def _chunks(self) -> Iterator[bytes]:
        """Yield the file in portions, decompressed. Raises one of DAMAGE where it is cut off or
        damaged.
        """
        path = self.spec.path.lower()
        size = CHUNK_BYTES
        with open(self.spec.path, "rb") as raw:
            read = raw.read
            if path.endswith(".gz"):
                # `read` would lose what lies before the damage
                read = gzip.GzipFile(fileobj=raw).read1
            elif path.endswith(".zst"):
                read = pyarrow.input_stream(raw, compression="zstd").read
                size = CHUNK_BYTES_ZSTD
            while chunk := read(size):
                self.read_bytes = raw.tell()
                yield chunk

    def _lines(self) -> Iterator[bytes | RowError]:
        """Yield the lines, or a fault for one that is too long, which is read over without being
        kept.
        """
        chunks = self._chunks()
        if self.kind == "json":
            chunks = array_lines(chunks)
        pieces: list[bytes] = []
        size = 0
        for chunk in itertools.chain(chunks, [b"\n"]):
            for i, piece in enumerate(chunk.split(b"\n")):
                follows_line_end = i > 0
                if follows_line_end:
                    yield b"".join(pieces) if size <= MAX_BYTES else TOO_LONG
                    pieces = []
                    size = 0
                size += len(piece)
                if size <= MAX_BYTES:
                    pieces.append(piece)
                else:
                    pieces.clear()

    def _arrow_rows(self, start: int) -> Iterator[Row | RowError]:
        """Yield the rows behind the first `start` of a Parquet file or data set."""
        if self.kind == "parquet":
            batches, count = self._parquet_batches(start)
        else:
            batches, count = self._dataset_batches(start)
        number = start
        for batch in batches:
            rows = _python_rows(batch)
            yield from rows
            number += len(rows)
            self.read_bytes = int((self.total_bytes or 0) * number // count)

    def _parquet_batches(self, start: int) -> tuple[Iterator[Any], int]:
        """Return the batches of rows behind the first `start`, and the number of all rows."""
        # So columns are streamed; as is the default, a row group is read whole, and it may be all
        # of the file.
        file = pyarrow.parquet.ParquetFile(self.spec.path, buffer_size=2**20, pre_buffer=False)
        groups = range(file.num_row_groups)
        sizes = [file.metadata.row_group(i).num_rows for i in groups]
        ends = np.cumsum([0, *sizes])
        first = int(np.searchsorted(ends, start, side="right")) - 1
        batches = file.iter_batches(ARROW_ROWS, row_groups=groups[first:])
        return _without_first(batches, start - int(ends[first])), int(ends[-1])

    def _dataset_batches(self, start: int) -> tuple[Iterator[Any], int | float]:
        """Return the batches of rows behind the first `start`, and the number of all rows."""
        # which decodes nothing, such as images beside the text
        table = self.dataset.with_format("arrow")
        count = len(table) if hasattr(table, "data") else float("inf")
        if start >= count:
            return iter(()), count
        return table.skip(start).iter(ARROW_ROWS), count


def _check_file(spec: Spec) -> None:
    """Raise InputError for a file that cannot be read as the spec asks for."""
    if spec.split:
        raise InputError(f"{spec.given} cannot be used, as a file has no splits; give PATH:WEIGHT")
    if not os.access(spec.path, os.R_OK):
        raise InputError(f"{spec.path} cannot be read; check its permissions")


def _without_first(batches: Iterator[Any], n: int) -> Iterator[Any]:
    """Yield Arrow batches without their first n rows.

    Args:
        n: may be more than the first batch has.
    """
    for batch in batches:
        yield batch.slice(n)
        n = max(n - batch.num_rows, 0)


def _python_rows(batch: Any) -> list[Row | RowError]:
    """Return the rows of an Arrow batch; where one is faulty, each is read alone."""
    try:
        return rows_of(batch)
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            single = (batch.slice(i, 1) for i in range(batch.num_rows))
            return [row for each in single for row in _python_rows(each)]
        reason = "not-utf-8" if isinstance(error, UnicodeError) else "unreadable"
        return [
            RowError(reason, f"a value cannot be read ({error}); repair it or leave the row out")
        ]
