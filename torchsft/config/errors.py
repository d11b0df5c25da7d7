"""How options that cannot be used are refused."""

import math
from typing import Any


class InputError(ValueError):
    """Something that the user gave cannot be used: one sentence that names the thing, the numbers
    and the remedy.
    """


def at_least(options: Any, **least: float) -> None:
    """Refuse a field of `options` that is set and less than `least` says, or not finite."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not bound <= value < math.inf:  # also catches nan
            option = f"--{type(options).__name__.lower()}.{name.replace('_', '-')}"
            kind = "a finite number of " if value == math.inf else ""
            raise InputError(f"{option} is {value}, but it must be {kind}at least {bound}")
