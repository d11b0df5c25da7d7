"""Reads, changes and writes the options of a run, by their dotted names."""

from __future__ import annotations

import dataclasses
import operator
import shlex
from typing import Any

from torchsft.cli import Option, Values, flag_of
from torchsft.config import Config


def option(config: Config, name: str) -> Any:
    """Return the value of an option by its dotted name."""
    return operator.attrgetter(name)(config)


def changed(config: Config, values: Values) -> Config:
    """Return a configuration with other values of options.

    Raises:
        InputError: they do not go together.
    """
    sections: dict[str, Values] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    parts = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in sections.items()
    }
    return dataclasses.replace(config, **parts)


def written(setting: Option, value: Any) -> str:
    """Return an option as the command line has it."""
    if setting.kind is bool:
        return setting.flag if value else flag_of(setting.negation)
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([setting.flag, *(shlex.quote(str(each)) for each in values)])
