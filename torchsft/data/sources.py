"""Where rows come from: JSONL, JSON arrays, Parquet and `datasets`, read in order and in bounded
memory.

A row that cannot be read becomes a `RowError` in its place, and those behind it are read
nevertheless; where nothing behind it can be read, the error says so.
"""

import codecs
import contextlib
import gzip
import http.client
import itertools
import os
import re
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet

from torchsft.config import InputError
from torchsft.data.arrow import rows_of
from torchsft.data.rows import Row, RowError
from torchsft.data.specs import HUB, Spec, is_saved

MAX_BYTES = 64 * 2**20  # of one line, or element of a JSON array
TOO_LONG = ("line-too-long", f"longer than {MAX_BYTES:,} bytes; split it or leave it out")
# what reading a damaged file raises
DAMAGE = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
# What may change the state of a scan through a JSON array: in a string, between elements, inside an
# element.
IN_STRING, BETWEEN, INSIDE = (
    re.compile(pattern) for pattern in (rb'["\\]', rb'["\[\]{},]', rb'["\[\]{}]')
)


class Source:
    """One open source. Raises InputError: it does not exist or cannot be opened, or the split is
    missing or unknown.

    Attributes:
        name: the last part of the path, unless given.
        kind: `jsonl`, `json` (one array), `csv`, `tsv`, `parquet` or `datasets`.
        total_bytes, read_bytes: for a progress bar, of the file as it is stored; total_bytes None:
            not known.
    """

    def __init__(self, spec: Spec, name: str | None = None, streaming: bool = False) -> None:
        self.spec, self.kind, self.read_bytes, self.dataset = spec, "jsonl", 0, None
        self.given = f"{spec.path}:{spec.split}" if spec.split else spec.path
        self.name = name or os.path.basename(os.path.abspath(spec.path))
        stem = re.sub(r"\.(gz|zst)$", "", spec.path.lower())
        if not os.path.isfile(spec.path):
            self.kind, self.dataset = "datasets", _open_dataset(spec, self.given, streaming)
        elif spec.split or not os.access(spec.path, os.R_OK):
            said = (
                "a file has no splits; give PATH:WEIGHT"
                if spec.split
                else "it cannot be read; check its permissions"
            )
            raise InputError(f"{self.given} cannot be used, as {said}")
        elif stem.endswith((".parquet", ".pq")):
            self.kind = "parquet"
        elif stem.endswith((".csv", ".tsv")):
            self.kind = stem[-3:]
        elif stem.endswith(".json"):
            with contextlib.suppress(*DAMAGE):  # rows() tells it, with its place
                starts = (
                    chunk.removeprefix(codecs.BOM_UTF8).lstrip()[:1] for chunk in self._chunks()
                )
                self.kind = "json" if next(filter(None, starts), b"") == b"[" else "jsonl"
        data = getattr(self.dataset, "data", None)  # of a dataset that is no stream
        self.total_bytes = (
            os.path.getsize(spec.path) if self.dataset is None else data.nbytes if data else None
        )

    def places(self) -> tuple[str, ...]:
        """What stands in front of a row's number, to tell the user where it is."""
        word = "line" if self.kind in ("jsonl", "csv", "tsv") else "row"
        return (f"{self.given}, {word} ",)

    def where(self, number: int) -> str:
        """The place of row `number`, for the user."""
        return f"{self.places()[0]}{number}"

    def paths(self) -> list[str]:
        """What is read, directories of a data set too; nothing for a data set of the hub."""
        path = Path(self.spec.path)
        below = sorted(str(file) for file in path.rglob("*")) if path.is_dir() else []
        return below or [str(path)] * path.exists()

    def fingerprint(self) -> str:
        """A hash of the content: of the bytes of the files; for a dataset of the hub, what
        `datasets` gives it.
        """
        found, paths = blake2b(self.kind.encode(), digest_size=16), [self.spec.path]
        if self.kind == "datasets":
            paths = (
                [file["filename"] for file in self.dataset.cache_files]
                if os.path.isdir(self.spec.path)
                else []
            )
            found.update(
                b""
                if paths
                else f"{self.given}:{getattr(self.dataset, '_fingerprint', '')}".encode()
            )
        for path in paths:
            with open(path, "rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
        return found.hexdigest()

    def rows(self, start: int = 0) -> Iterator[tuple[int, bytes | Row | RowError]]:
        """Yield (number from 1, payload for `decode`) of all rows behind the first `start`, in
        order. Blank lines are numbered and left out. Where nothing behind a fault can be read, its
        RowError is the last one and says so.
        """
        arrow, self.read_bytes = self.kind in ("parquet", "datasets"), 0
        if self.kind in ("csv", "tsv"):
            yield from self._table_rows(start)
            return
        number = start if arrow else 0
        try:
            rows = self._arrow_rows(start) if arrow else self._lines()
            for number, row in enumerate(rows, number + 1):  # noqa: B020
                if isinstance(row, tuple):
                    row = RowError(self.where(number), *row)
                if number > start and (not isinstance(row, bytes) or row.strip()):
                    yield number, row
        except DAMAGE as error:
            if number >= start:
                said = (
                    f"this and all that follows cannot be read ({error}); give the whole, "
                    f"undamaged file"
                )
                yield number + 1, RowError(self.where(number + 1), "truncated-file", said)

    def _table_rows(self, start: int) -> Iterator[tuple[int, Row | RowError]]:
        """Of a table of text, as `rows`; the number of a row is that of its first line."""
        from torchsft.data.files import table_rows

        number = 1
        try:
            for number, row in table_rows(self._chunks(), "," if self.kind == "csv" else "\t"):
                if number > start:
                    yield (
                        number,
                        RowError(self.where(number), *row) if isinstance(row, tuple) else row,
                    )
        except DAMAGE as error:
            said = (
                f"this and all that follows cannot be read ({error}); give the whole, undamaged "
                f"file"
            )
            yield number + 1, RowError(self.where(number + 1), "truncated-file", said)

    def _chunks(self) -> Iterator[bytes]:
        """The file in portions, decompressed. Raises one of DAMAGE where it is cut off or
        damaged.
        """
        with open(self.spec.path, "rb") as raw:
            read, size = raw.read, 2**20
            if self.spec.path.lower().endswith(".gz"):
                # `read` would lose what lies in front of the damage
                read = gzip.GzipFile(fileobj=raw).read1
            elif self.spec.path.lower().endswith(".zst"):
                # a damaged portion is lost whole
                read, size = pyarrow.input_stream(raw, compression="zstd").read, 2**16
            while chunk := read(size):
                self.read_bytes = raw.tell()
                yield chunk

    def _lines(self) -> Iterator[bytes | tuple[str, str]]:
        """The lines, or reason and sentence for one that is too long, which is read over without
        being kept.
        """
        parts, size = [], 0
        for chunk in itertools.chain(
            self._array_as_lines() if self.kind == "json" else self._chunks(), [b"\n"]
        ):
            for i, piece in enumerate(chunk.split(b"\n")):
                if i:
                    yield b"".join(parts) if parts else TOO_LONG
                    parts, size = [], 0
                size += len(piece)
                parts = [*parts, piece] if size <= MAX_BYTES else []

    def _array_as_lines(self) -> Iterator[bytes]:
        """The chunks with each element of the JSON array on a line. Brackets are counted and
        nothing is parsed: a faulty element spoils none behind it, and no byte is read twice,
        however long the element.
        """
        depth, in_string, closed, at = 0, False, False, 0
        for chunk in self._chunks():
            # white space as well, and as forbidden in strings
            lines = bytearray(chunk.replace(b"\n", b"\r"))
            while not closed and (
                match := (IN_STRING if in_string else BETWEEN if depth < 2 else INSIDE).search(
                    chunk, at
                )
            ):
                at, char = match.end(), match[0]
                if char == b'"':
                    in_string = not in_string
                elif char == b"\\":
                    # what is escaped ends nothing; it may be the first byte of the next chunk
                    at += 1
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
            # So columns are streamed; as is the default, a row group is read whole, and it may be
            # all of the file.
            file = pyarrow.parquet.ParquetFile(self.spec.path, buffer_size=2**20, pre_buffer=False)
            groups = range(file.num_row_groups)
            ends = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in groups)]).tolist()
            first = int(np.searchsorted(ends, start, side="right")) - 1
            count, skip, batches = (
                ends[-1],
                start - ends[first],
                file.iter_batches(64, row_groups=groups[first:]),
            )
        else:
            # which decodes nothing, such as images beside the text
            table = self.dataset.with_format("arrow")
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


def is_offline() -> bool:
    """Whether the user has told the libraries of the hub to use their local cache only."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def unreachable() -> str:
    """Why the hub cannot be reached, found out within seconds; "" where it can, or where that
    cannot be told (a proxy that urllib does not know, a certificate that it does not have), or is
    not wanted.
    """
    if is_offline() or "all" in urllib.request.getproxies():
        return ""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        # `urlopen` keeps the proxies of its first call
        urllib.request.build_opener().open(request, timeout=5).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except (ValueError, http.client.HTTPException):
        return ""  # no address, or an odd server: the libraries say more
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return ""
        return f"{urlsplit(address).hostname}: {getattr(reason, 'strerror', None) or reason}"
    return ""


def _open_dataset(spec: Spec, given: str, streaming: bool) -> Any:
    """The `datasets.Dataset`, or streamed `IterableDataset`, of a directory, or of NAME or
    NAME/CONFIG on the hub.
    """
    directory, hub = os.path.isdir(spec.path), HUB.fullmatch(spec.path)
    saved = is_saved(spec.path)
    if not saved and not (spec.split and (directory or hub)):
        said = (
            "is a directory, but none of datasets' save_to_disk; name the files in it"
            if directory
            else "does not exist"
        )
        raise InputError(
            f"{given} {said}; give an existing file or directory, or NAME:SPLIT for a "
            f"dataset of the hub"
        )
    of_hub = not saved and not directory
    if of_hub and (reason := unreachable()):  # the libraries would try for half a minute and more
        fault = f"{given} cannot be opened, as the hub of data sets cannot be reached ({reason})"
        remedy = (
            "download it beforehand and name its files, or set HF_HUB_OFFLINE=1 to use the local "
            "cache"
        )
        raise InputError(f"{fault}; check the network, {remedy}")
    import datasets  # slow, and mostly not needed

    try:
        if not saved:
            name, config = (spec.path, None) if directory else hub.groups()
            return datasets.load_dataset(name, config, split=spec.split, streaming=streaming)
        found = datasets.load_from_disk(spec.path)
    except Exception as error:  # of the network, of the hub, of any file format
        if of_hub and is_offline() and isinstance(error, OSError):
            fault = (
                f"{given} is not in the local cache, and offline mode (HF_HUB_OFFLINE) forbids the "
                f"network"
            )
            raise InputError(
                f"{fault}; download it beforehand without that, or name a local copy of its files"
            ) from None
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        network = "the network, " if of_hub and isinstance(error, OSError) else ""
        raise InputError(
            f"{given} cannot be opened as a dataset ({said}); check {network}its "
            f"name, split and files"
        ) from None
    splits = list(found) if isinstance(found, dict) else [None]
    if spec.split not in splits:
        has = (
            f"the splits {', '.join(splits)}; give one as {spec.path}:{splits[0]}"
            if splits != [None]
            else "no splits"
        )
        raise InputError(f"{given} cannot be used, as the dataset has {has}")
    return found[spec.split] if spec.split else found
