"""What one row is: an object, or in one sentence why not."""

import codecs
import json
from collections import Counter
from typing import Any, NamedTuple

from torchsft.config import InputError
from torchsft.data import nulls

Row = dict[str, Any]

JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class Fault(NamedTuple):
    """Why a row cannot be read, without its place; `reason` and `text` as of `RowError`."""

    reason: str
    text: str


class RowError(InputError):
    """A row that cannot be used.

    Its string is `<where>: <text>`.

    Attributes:
        where: its place, for the user.
        reason: a code such as `not-json`.
        text: a sentence.
    """

    def __init__(self, where: str, reason: str, text: str) -> None:
        text = " ".join(text.split())  # one line, whatever library or template it quotes
        # what pickle calls it with, as it comes back from other processes
        super().__init__(where, reason, text)
        self.where = where
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


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


def read_row(payload: bytes | Row, where: str) -> tuple[Row, tuple[str, ...]]:
    """Return the object of one row as `Source.rows` yields it, without nulls that say nothing, and
    notes on those in doubt.

    Raises:
        RowError: not-utf-8, nul-bytes, not-json or surrogate.
    """
    if isinstance(payload, dict):
        return nulls.clean(payload, padded=True)
    row = _parse(payload, where)
    return nulls.clean(row, padded=False) if b"null" in payload else (row, ())


def decode(payload: bytes | Row, where: str) -> Row:
    """Return the object of one row as `read_row`, without its notes."""
    return read_row(payload, where)[0]


def _parse(payload: bytes, where: str) -> Row:
    """Return the object that is written in JSON."""
    try:
        # some editors begin a file with that mark
        row = load_json(payload.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
        raise RowError(where, "not-utf-8", problem) from None
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        problem = f"half a surrogate pair ({half:#x}); write whole characters"
        raise RowError(where, "surrogate", problem) from None
    except ValueError as error:
        nul = payload.find(b"\0") + 1
        if nul:
            problem = f"byte {nul} is NUL; convert the file to UTF-8, or repair it"
            raise RowError(where, "nul-bytes", problem) from None
        problem = f"not JSON ({error}); each row must be one JSON object"
        raise RowError(where, "not-json", problem) from None
    if not isinstance(row, dict):
        problem = f"not a JSON object, but {kind_of(row)}; each row must be one"
        raise RowError(where, "not-json", problem)
    return row


def kind_of(value: Any) -> str:
    """Return what a value is, in JSON's words."""
    kind = type(value)
    return JSON_NAMES.get(kind, kind.__name__)
