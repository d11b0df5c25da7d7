"""Tables of text: CSV and TSV."""

import codecs
import csv
import re
from collections.abc import Iterable, Iterator

from torchsft.data.columns import NUMBERS, number_of
from torchsft.data.rows import Object, RowError

_SURROGATES = re.compile("[\udc80-\udcff]")  # what bytes that are no UTF-8 become


def table_rows(
    chunks: Iterable[bytes], delimiter: str, max_bytes: int
) -> Iterator[tuple[int, Object | RowError]]:
    """Yield the rows of a CSV or TSV file: (line with which it begins, columns by name).

    Args:
        chunks: of the file, in UTF-8.
        delimiter: between columns.
        max_bytes: the longest field.
    """
    csv.field_size_limit(max_bytes)
    reader = csv.reader(_text_lines(chunks), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, RowError("csv", _csv_problem(error, is_header=header is None))
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
            yield line, RowError("csv-header", problem)
            return


def _table_row(header: list[str], fields: list[str]) -> Object | RowError:
    if any(_SURROGATES.search(field) for field in fields):
        return RowError("not-utf-8", "a field is not UTF-8; convert the file to UTF-8")
    if any("\0" in field for field in fields):
        return RowError("nul-bytes", "a field holds NUL; convert the file to UTF-8, or repair it")
    if len(fields) != len(header):
        return RowError(
            "csv-columns",
            f"{len(fields)} fields, but the header names {len(header)} columns; quote fields that "
            f"hold the delimiter",
        )
    row: Object = dict(zip(header, fields, strict=True))
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
