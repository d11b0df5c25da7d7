"""Several files as one source, and tables of text: a directory or a glob, CSV and TSV."""

import codecs
import csv
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

from torchsft.config import InputError
from torchsft.data.cache import ROWS_OF_A_FILE
from torchsft.data.columns import NUMBERS, number_of
from torchsft.data.rows import Fault, Row, RowError
from torchsft.data.sources import MAX_BYTES, Source
from torchsft.data.specs import LISTED, Spec, files_of, is_several, nothing_in

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLITS = {
    "train": "train",
    "test": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_SURROGATES = re.compile("[\udc80-\udcff]")  # what bytes that are no UTF-8 become


def open_source(spec: Spec, name: str | None = None, streaming: bool = False) -> "Source | Files":
    """Open a source of one file or data set, or of the files in a directory or of a glob.

    Raises:
        InputError: see `Source` and `Files`.
    """
    return Files(spec, name, streaming) if is_several(spec) else Source(spec, name, streaming)


class Files:
    """Files of rows that are one source, in the order of their names; each is read as what it is.

    Attributes:
        spec, name, kind, total_bytes, read_bytes: as of `Source`.
        members: the files.

    Raises:
        InputError: no file of rows is there, or one cannot be opened.
    """

    def __init__(self, spec: Spec, name: str | None = None, streaming: bool = False) -> None:
        self.spec = spec
        self.given = spec.given
        self.kind = "files"
        self.name = name or os.path.basename(os.path.abspath(spec.path))
        self.dataset = None
        self.read_bytes = 0
        paths, others = files_of(spec.path)
        if not paths:
            raise InputError(f"{spec.path} {nothing_in(others)}; name another place")
        if os.path.isdir(spec.path):
            _check_one_split(spec.path, paths)
        if others and os.environ.get("RANK", "0") == "0":  # once, not by every rank
            more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
            warnings.warn(
                f"{spec.path}: left out, as no files of rows: {', '.join(others[:LISTED])}{more}",
                stacklevel=2,
            )
        self.members = [Source(Spec(path), streaming=streaming) for path in paths]
        self.total_bytes = sum(member.total_bytes or 0 for member in self.members)

    def paths(self) -> list[str]:
        """Return the paths of the files."""
        return [member.spec.path for member in self.members]

    def places(self) -> tuple[str, ...]:
        """Return what stands before a row's number, for each file."""
        return tuple(place for member in self.members for place in member.places())

    def where(self, number: int) -> str:
        """Return the place of row `number`, for the user."""
        return place_of(self.places(), number)

    def fingerprint(self) -> str:
        """Return a hash of the names and contents of all files."""
        digest = blake2b(digest_size=16)
        for member in self.members:
            digest.update(f"{os.path.basename(member.spec.path)}:{member.fingerprint()}".encode())
        return digest.hexdigest()

    def rows(self, start: int = 0) -> Iterator[tuple[int, bytes | Row | RowError]]:
        """Yield rows as `Source.rows`; their numbers include that of the file."""
        first_file, rows_before = divmod(start, ROWS_OF_A_FILE)
        bytes_before = 0
        for file, member in enumerate(self.members, start=1):
            if file >= first_file:
                for number, payload in member.rows(rows_before if file == first_file else 0):
                    self.read_bytes = bytes_before + member.read_bytes
                    yield file * ROWS_OF_A_FILE + number, payload
            bytes_before += member.total_bytes or 0


def place_of(places: tuple[str, ...], number: int) -> str:
    """Return where row `number` is, for the user; `places`: of the source that it comes from."""
    file, row = divmod(number, ROWS_OF_A_FILE)
    return f"{places[max(file - 1, 0)]}{row}"


def _check_one_split(directory: str, paths: list[str]) -> None:
    """Check that files are not named train and test, or the like, which nobody wants to train
    together unasked.
    """
    splits = set()
    for path in paths:
        stem = _SHARD.sub("", os.path.basename(path).partition(".")[0])
        if stem in _SPLITS:
            splits.add(_SPLITS[stem])
    if len(splits) > 1:
        names = sorted(splits)
        every = os.path.join(directory, "**/*")
        raise InputError(
            f"{directory} holds the splits {', '.join(names)}; give {directory}:{names[0]}, name "
            f"its files, or give '{every}' to take all as one"
        )


def table_rows(
    chunks: Iterable[bytes], delimiter: str
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Yield the rows of a CSV or TSV file: (line with which it begins, columns by name).

    Args:
        chunks: of the file, in UTF-8.
        delimiter: between columns.
    """
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(_text_lines(chunks), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Fault("csv", _csv_problem(error, is_header=header is None))
            if header is None:
                return
            continue
        if not fields:
            continue  # a blank line
        if header is not None:
            yield line, _table_row(header, fields)
            continue
        header = [name.strip() for name in fields]
        problem = _header_problem(header)
        if problem:
            yield line, Fault("csv-header", problem)
            return


def _table_row(header: list[str], fields: list[str]) -> dict[str, Any] | Fault:
    if any(_SURROGATES.search(field) for field in fields):
        return Fault("not-utf-8", "a field is not UTF-8; convert the file to UTF-8")
    if any("\0" in field for field in fields):
        return Fault("nul-bytes", "a field holds NUL; convert the file to UTF-8, or repair it")
    if len(fields) != len(header):
        return Fault(
            "csv-columns",
            f"{len(fields)} fields, but the header names {len(header)} columns; quote fields that "
            f"hold the delimiter",
        )
    row: dict[str, Any] = dict(zip(header, fields, strict=True))
    for name in NUMBERS:
        if name in row:
            row[name] = number_of(row[name])
    return row


def _csv_problem(error: csv.Error, is_header: bool) -> str:
    if str(error) == "unexpected end of data":
        return "a quote is opened and not closed, so that all that follows belongs to it; close it"
    problem = (
        f"not a row of a table ({error}); quote fields that hold quotes, delimiters or line ends"
    )
    if is_header:
        return f"the header is {problem}, and nothing behind it can be read"
    return problem


def _header_problem(header: list[str]) -> str:
    """Return what is wrong with the names of columns; "" for nothing."""
    for name in header:
        if _SURROGATES.search(name):
            return (
                "the header is not UTF-8, and nothing behind it can be read; convert the file to "
                "UTF-8"
            )
        if not name or header.count(name) > 1:
            what = f"the column {name!r} twice" if name else "a column without a name"
            return (
                f"the header has {what}, and nothing behind it can be read; name each column once"
            )
    return ""


def _text_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield lines with their ends; bytes that are no UTF-8 become surrogates, by which `_table_row`
    finds them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    rest = ""
    is_first = True
    for chunk in chunks:
        text = rest + decoder.decode(chunk)
        if is_first and text:
            text = text.removeprefix("\ufeff")
            is_first = False
        lines = text.split("\n")
        rest = lines.pop()
        yield from (line + "\n" for line in lines)
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest
