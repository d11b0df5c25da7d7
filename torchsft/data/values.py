"""Values of rows: of the expected kind or refused in one sentence."""

import json
from collections.abc import Mapping
from typing import Any

from torchsft.data.keys import WEIGHTS
from torchsft.data.rows import Row, RowError, Strings, kind_of, load_json

MAX_WEIGHT = 3e38  # of float32


def expect(kind: type, value: Any, what: str) -> Any:
    """Return the value, if it is of this kind; objects and lists may stand in a string as JSON.

    Raises:
        RowError: bad-WHAT, or not-json.
    """
    found = value if kind is str else unpacked(value, what)
    if isinstance(found, kind):
        return found
    reason = f"bad-{what}".replace(" ", "-")
    expected = kind_of(kind())
    raise RowError(reason, f"{what} must be {expected}, but it is {kind_of(found)}")


def unpacked(value: Any, what: str) -> Any:
    """Return what stands in a string as JSON: many files keep values in this way whose shapes
    differ from row to row.

    Raises:
        RowError: not-json.
    """
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except ValueError as error:
        raise RowError("not-json", f"{what} is a string that is not JSON ({error})") from None


def check_json(value: Any, what: str) -> None:
    """Check that a value can be written as JSON.

    Raises:
        RowError: not-json.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError("not-json", f"{what} cannot be written as JSON ({error})") from None


def row_weight(row: Row) -> float:
    """Return the weight of a row; 1 where it has none. Raises RowError, as `weight_of`."""
    weight = weight_of(row)
    return 1.0 if weight is None else weight


def weight_of(value: Mapping[str, Any], switches: Strings = ("train", "trainable")) -> float | None:
    """Return the weight that weights and switches of a message or row give together; None where it
    has none.

    A weight is a number that is finite and at least 0 (or true or false), a switch is true or false
    (or 1 or 0).

    Args:
        switches: names of switches that are read.

    Raises:
        RowError: bad-weight (no such value, or they contradict each other), negative-weight or
            non-finite-weight.
    """
    numbers = {key: value[key] for key in WEIGHTS if value.get(key) is not None}
    flags = {key: value[key] for key in switches if value.get(key) is not None}
    given = numbers | flags
    if not given:
        return None
    are_numbers = all(isinstance(each, int | float) for each in given.values())
    is_known = are_numbers and all(flag in (0, 1) for flag in flags.values())
    if not is_known or len(set(map(bool, given.values()))) > 1 or len(set(numbers.values())) > 1:
        listed = ", ".join(f"{key} is {each!r:.60}" for key, each in given.items())
        remedy = "give a number or true or false, and no contradiction"
        raise RowError("bad-weight", f"{listed}; {remedy}")
    weight = next(iter(given.values()))
    if not 0 <= weight < MAX_WEIGHT:
        reason = "negative-weight" if weight < 0 else "non-finite-weight"
        raise RowError(reason, f"weight is {weight!r:.60}, but must be finite and at least 0")
    return float(weight)
