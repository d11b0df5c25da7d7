"""Values of rows: of the expected kind or refused in one sentence."""

import json
from collections.abc import Mapping
from typing import Any

from torchsft.data.keys import WEIGHTS
from torchsft.data.rows import RowError, kind_of, load_json

MAX_WEIGHT = 3e38  # of float32


def expect(kind: type, value: Any, what: str, where: str) -> Any:
    """The value, if it is of this kind; objects and lists may stand in a string as JSON.

    Raises:
        RowError: bad-WHAT, or not-json.
    """
    found = value if kind is str else unpacked(value, what, where)
    if not isinstance(found, kind):
        reason = f"bad-{what}".replace(" ", "-")
        raise RowError(
            where, reason, f"{what} must be {kind_of(kind())}, but it is {kind_of(found)}"
        )
    return found


def unpacked(value: Any, what: str, where: str) -> Any:
    """What stands in a string as JSON: many files keep values in this way whose shapes differ from
    row to row.

    Raises:
        RowError: not-json.
    """
    try:
        return load_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(
            where, "not-json", f"{what} is a string that is not JSON ({error})"
        ) from None


def check_json(value: Any, what: str, where: str) -> None:
    """Raises RowError (not-json): the value cannot be written as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError(where, "not-json", f"{what} cannot be written as JSON ({error})") from None


def weight_of(
    value: Mapping[str, Any], where: str, switches: tuple[str, ...] = ("train", "trainable")
) -> float | None:
    """What the weights and switches of a message or row say together; None where it has none.

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
    if not numbers and not flags:
        return None
    given = ", ".join(f"{key} is {said!r:.60}" for key, said in {**numbers, **flags}.items())
    good = all(isinstance(number, int | float) for number in numbers.values())
    good = good and all(isinstance(flag, int | float) and flag in (0, 1) for flag in flags.values())
    decisions = {bool(said) for said in [*numbers.values(), *flags.values()]} if good else set()
    if len(decisions) != 1 or len(set(numbers.values())) > 1:
        wanted = "give a number or true or false, and no contradiction"
        raise RowError(where, "bad-weight", f"{given}; {wanted}")
    weight = next(iter([*numbers.values(), *flags.values()]))
    if not 0 <= weight < MAX_WEIGHT:
        reason = "negative-weight" if weight < 0 else "non-finite-weight"
        raise RowError(
            where, reason, f"weight is {weight!r:.60}, but must be finite and at least 0"
        )
    return float(weight)
