"""What one row is: an object, or in one sentence why not."""

import codecs
import json
from collections import Counter
from typing import Any

from torchsft.config import InputError
from torchsft.data import nulls

Row = dict[str, Any]


class RowError(InputError):
    """A row that cannot be used: `reason` is a code such as `not-json`, str() a sentence that
    begins with the place.
    """

    def __init__(self, where: str, reason: str, text: str) -> None:
        text = " ".join(text.split())  # one line, whatever library or template it quotes
        # what pickle calls it with, as it comes back from other processes
        super().__init__(where, reason, text)
        self.where, self.reason, self.text = where, reason, text

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError: not JSON, nested too deeply, a key twice, half a
    surrogate pair.
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
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(
            f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given "
            f"twice in one object"
        )
    return found


def read_row(payload: bytes | Row, where: str) -> tuple[Row, tuple[str, ...]]:
    """The object of one row as `Source.rows` yields it, without nulls that say nothing, and notes
    on those in doubt.

    Raises:
        RowError: not-utf-8, nul-bytes, not-json or surrogate.
    """
    if isinstance(payload, dict):
        return nulls.clean(payload, padded=True)
    row = _object(payload, where)
    return nulls.clean(row, padded=False) if b"null" in payload else (row, ())


def decode(payload: bytes | Row, where: str) -> Row:
    """As `read_row`, without its notes."""
    return read_row(payload, where)[0]


def _object(payload: bytes, where: str) -> Row:
    """The object that is written in JSON."""
    try:
        # some editors begin a file with that mark
        row = load_json(payload.removeprefix(codecs.BOM_UTF8).decode())
        if isinstance(row, dict):
            return row
        reason, said = "not-json", f"not a JSON object, but {kind_of(row)}; each row must be one"
    except UnicodeDecodeError as error:
        reason, said = (
            "not-utf-8",
            f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8",
        )
    except UnicodeEncodeError as error:
        reason, said = (
            "surrogate",
            f"half a surrogate pair ({ord(error.object[error.start]):#x}); write whole characters",
        )
    except ValueError as error:
        reason, said = "not-json", f"not JSON ({error}); each row must be one JSON object"
        if nul := payload.find(b"\0") + 1:
            reason, said = (
                "nul-bytes",
                f"byte {nul} is NUL; convert the file to UTF-8, or repair it",
            )
    raise RowError(where, reason, said)


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
