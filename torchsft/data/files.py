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
from torchsft.data.rows import Row, RowError
from torchsft.data.sources import MAX_BYTES, Source
from torchsft.data.specs import LISTED, Spec, files_of, is_several, nothing_in

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLITS = {
    "train": "train",
    "test": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
}
_SPLITS |= {"val": "validation", "dev": "validation"}


def open_source(spec: Spec, name: str | None = None, streaming: bool = False) -> "Source | Files":
    """A source of one file or data set, or of the files in a directory or of a glob.

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
        self.spec, self.kind, self.read_bytes, self.dataset = spec, "files", 0, None
        self.given = spec.path
        self.name = name or os.path.basename(os.path.abspath(spec.path))
        paths, others = files_of(spec.path)
        if not paths:
            raise InputError(f"{spec.path} {nothing_in(others)}; name another place")
        if os.path.isdir(spec.path):
            _one_split(spec.path, paths)
        if others and os.environ.get("RANK", "0") == "0":  # once, not by every rank
            more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
            warnings.warn(
                f"{spec.path}: left out, as no files of rows: {', '.join(others[:LISTED])}{more}",
                stacklevel=2,
            )
        self.members = [Source(Spec(path), streaming=streaming) for path in paths]
        self.total_bytes = sum(member.total_bytes or 0 for member in self.members)

    def paths(self) -> list[str]:
        """The files."""
        return [member.spec.path for member in self.members]

    def places(self) -> tuple[str, ...]:
        """What stands in front of a row's number in each file."""
        return tuple(place for member in self.members for place in member.places())

    def where(self, number: int) -> str:
        """The place of row `number`, for the user."""
        return place_of(self.places(), number)

    def fingerprint(self) -> str:
        """A hash of the names and contents of all files."""
        found = blake2b(digest_size=16)
        for member in self.members:
            found.update(f"{os.path.basename(member.spec.path)}:{member.fingerprint()}".encode())
        return found.hexdigest()

    def rows(self, start: int = 0) -> Iterator[tuple[int, bytes | Row | RowError]]:
        """As `Source.rows`; numbers tell the file too."""
        first, behind = divmod(start, ROWS_OF_A_FILE)
        before = 0
        for file, member in enumerate(self.members, start=1):
            if file >= first:
                for number, payload in member.rows(behind if file == first else 0):
                    self.read_bytes = before + member.read_bytes
                    yield file * ROWS_OF_A_FILE + number, payload
            before += member.total_bytes or 0


def place_of(places: tuple[str, ...], number: int) -> str:
    """Where row `number` is, for the user; `places`: of the source that it comes from."""
    file, line = divmod(number, ROWS_OF_A_FILE)
    return f"{places[max(file - 1, 0)]}{line}"


def _one_split(directory: str, paths: list[str]) -> None:
    """Raises InputError: files are named train and test, or the like, which nobody wants to train
    together unasked.
    """
    stems = (_SHARD.sub("", os.path.basename(path).partition(".")[0]) for path in paths)
    splits = sorted({_SPLITS[stem] for stem in stems if stem in _SPLITS})
    if len(splits) > 1:
        every = os.path.join(directory, "**/*")
        remedy = (
            f"give {directory}:{splits[0]}, name its files, or give '{every}' to take all as one"
        )
        raise InputError(f"{directory} holds the splits {', '.join(splits)}; {remedy}")


def table_rows(
    chunks: Iterable[bytes], delimiter: str
) -> Iterator[tuple[int, dict[str, Any] | tuple[str, str]]]:
    """The rows of a CSV or TSV file: (line with which it begins, columns by name, or reason and
    sentence of a fault).

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
            said = (
                f"not a row of a table ({error}); quote fields that hold quotes, delimiters or "
                f"line ends"
            )
            if str(error) == "unexpected end of data":
                said = (
                    "a quote is opened and not closed, so that all that follows belongs to it; "
                    "close it"
                )
            elif header is None:
                said = f"the header is {said}, and nothing behind it can be read"
            yield line, ("csv", said)
            if header is None:
                return
            continue
        if not fields:
            continue  # a blank line
        if header is None:
            header = [name.strip() for name in fields]
            if fault := _header_fault(header):
                yield line, ("csv-header", fault)
                return
            continue
        if any(re.search("[\udc80-\udcff]", field) for field in fields):
            yield line, ("not-utf-8", "a field is not UTF-8; convert the file to UTF-8")
        elif any("\0" in field for field in fields):
            yield line, ("nul-bytes", "a field holds NUL; convert the file to UTF-8, or repair it")
        elif len(fields) != len(header):
            said = (
                f"{len(fields)} fields, but the header names {len(header)} columns; quote fields "
                f"that hold the delimiter"
            )
            yield line, ("csv-columns", said)
        else:
            row = dict(zip(header, fields, strict=True))
            yield line, row | {name: number_of(row[name]) for name in NUMBERS if name in row}


def _header_fault(header: list[str]) -> str:
    for name in header:
        if re.search("[\udc80-\udcff]", name):
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
    """Lines with their ends; bytes that are no UTF-8 become surrogates, which their row is told
    of.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    rest, is_first = "", True
    for chunk in chunks:
        text = rest + decoder.decode(chunk)
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        lines = text.split("\n")
        rest = lines.pop()
        yield from (line + "\n" for line in lines)
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest
