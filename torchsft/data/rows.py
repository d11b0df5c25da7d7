"""What one row is: an object, or in one sentence why not."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torchsft.config import InputError
from torchsft.data.nulls import Object, clean

Row = Object
Strings = tuple[str, ...]

JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True, eq=False)
class Example:
    """What a row holds.

    Attributes:
        notes: codes that are counted.
        ignored: keys of the row that mean nothing here.
    """

    id: str
    notes: Strings = field(default=(), kw_only=True)
    ignored: Strings = field(default=(), compare=False, kw_only=True)


class RowError(InputError):
    """A row that cannot be used.

    Its string is `<where>: <text>`.

    Attributes:
        reason: a code such as `not-json`.
        text: a sentence.
        where: its place, for the user; "" until somebody who knows it has called `at`.
    """

    def __init__(self, reason: str, text: str, where: str = "") -> None:
        text = " ".join(text.split())  # one line, whatever library or template it quotes
        # what pickle calls it with, as it comes back from other processes
        super().__init__(reason, text, where)
        self.reason = reason
        self.text = text
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"

    def at(self, place: str) -> "RowError":
        """Return the same error at a place, or at a part of it."""
        where = f"{place}, {self.where}" if self.where else place
        return RowError(self.reason, self.text, where)


Payload = bytes | Row | RowError  # what is read of a row
NumberedRow = tuple[int, Payload]
# row n of the f-th file of a source (both from 1) has the number f * ROWS_OF_A_FILE + n
ROWS_OF_A_FILE = 10**9


def place_of(places: Strings, number: int) -> str:
    """Return where row `number` is, for the user; `places`: of the source that it comes from."""
    file, row = divmod(number, ROWS_OF_A_FILE)
    return f"{places[max(file - 1, 0)]}{row}"


@contextmanager
def located(place: str) -> Iterator[None]:
    """In here, a RowError is raised at this place."""
    try:
        yield
    except RowError as error:
        raise error.at(place) from None


def load_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, has a key twice, or half a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    # json.loads would keep the last of them without a word
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is given twice in one object")
    return found


def read_row(payload: bytes | Row) -> tuple[Row, Strings]:
    """Return the object of one row as `Source.rows` yields it, without nulls that say nothing, and
    notes on those in doubt.

    Raises:
        RowError: not-utf-8, nul-bytes, not-json or surrogate.
    """
    if isinstance(payload, dict):
        return clean(payload, padded=True)
    row = _parse(payload)
    return clean(row, padded=False) if b"null" in payload else (row, ())


def _parse(payload: bytes) -> Row:
    """Return the object that is written in JSON."""
    try:
        # some editors begin a file with that mark
        row = load_json(payload.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise RowError(
            "not-utf-8", f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
        ) from None
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RowError(
            "surrogate", f"half a surrogate pair ({half:#x}); write whole characters"
        ) from None
    except ValueError as error:
        nul = payload.find(b"\0") + 1
        if nul:
            raise RowError(
                "nul-bytes", f"byte {nul} is NUL; convert the file to UTF-8, or repair it"
            ) from None
        raise RowError(
            "not-json", f"not JSON ({error}); each row must be one JSON object"
        ) from None
    if not isinstance(row, dict):
        raise RowError("not-json", f"not a JSON object, but {kind_of(row)}; each row must be one")
    return row


def kind_of(value: Any) -> str:
    """Return what a value is, in JSON's words."""
    kind = type(value)
    return JSON_NAMES.get(kind, kind.__name__)
