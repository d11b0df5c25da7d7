"""Nulls of rows: which of them somebody said, and which Arrow put in.

Arrow gives each struct the keys of all others in its column, so that a message without tool calls
comes back with `tool_calls: null`, a call with the arguments of all other calls, and a tool with
the properties of all other tools. Templates that ask whether a key is there go wrong then, and the
nulls of arguments would be trained. `Dataset.to_json` writes such nulls into JSONL too.

Everywhere but in the arguments of tool calls a null says that a key is absent. An argument that is
null stays if the tool that the row declares has that parameter, and is taken out if the declared
tool has no such parameter. Where no declaration shows it, a JSON row keeps it, a row of Arrow's
structs loses it, and both are counted as doubtful. So is one that stays in a row of Arrow's
structs, as it may be padding all the same, and a variable of the chat template that is null in a
JSON row.
"""

import functools
import json
from collections.abc import Callable
from enum import Enum
from typing import Any

Object = dict[str, Any]  # of JSON
DOUBT = "doubtful-null"
# What may be null in the schema of a parameter.
MAY_BE_NULL = ("default", "const", "example", "examples", "enum")
Stays = Callable[[Any, str, str], bool]  # of a null, its key, and the key that its object is under
TOOL_KEYS = ("tools", "functions")
MESSAGE_KEYS = ("messages", "conversations", "prompt", "completion")


class Null(Enum):
    """A null that stands in a JSON value, where Arrow puts in none: in structs every absent key is
    null.
    """

    EXPLICIT = "null"


def is_null(value: Any) -> bool:
    """Return whether a value is a null, of either kind."""
    return value is None or value is Null.EXPLICIT


def in_lists(change: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that changes an object take any JSON value: of a list it changes each item,
    and what is neither stays.
    """

    @functools.wraps(change)
    def changed(value: Any, *arguments: Any) -> Any:
        if isinstance(value, list):
            return [changed(inner, *arguments) for inner in value]
        return change(value, *arguments) if isinstance(value, dict) else value

    return changed


def clean(row: Object, padded: bool) -> tuple[Object, tuple[str, ...]]:
    """Take out of a row the nulls that say nothing.

    Args:
        row: as it was read; nulls inside Arrow's JSON values are `Null.EXPLICIT`.
        padded: whether its objects were structs of Arrow, so that None may be padding.

    Returns:
        The row, and `doubtful-null` if a null may mean something or be padding.
    """

    def is_said(null: Any, *_: str) -> bool:
        """Return whether a null is no padding."""
        return null is Null.EXPLICIT or not padded

    def is_of_schema(null: Any, key: str, under: str) -> bool:
        """Return whether a null in the declaration of tools is one that a JSON schema may have."""
        return is_said(null) and key in MAY_BE_NULL and under != "properties"

    is_doubtful = False
    found = {}
    for key, value in row.items():
        if is_null(value):
            continue
        if not _may_hold_null(value):
            found[key] = value
        elif key in TOOL_KEYS:
            found[key] = _without_nulls(value, is_of_schema)
        elif key in MESSAGE_KEYS:
            messages = _Messages(_parameters_of_tools(row), padded)
            found[key] = messages.clean(value)
            is_doubtful |= messages.has_doubt
        else:
            found[key] = _without_nulls(value, is_said)
        if key == "chat_template_kwargs" and isinstance(value, dict) and not padded:
            is_doubtful |= None in value.values()  # a template may ask whether one is given
    return found, (DOUBT,) if is_doubtful else ()


def _may_hold_null(value: Any) -> bool:
    """Return False only if no null stands in a value; text that looks like one is taken for it.

    To write the value out is several times as fast as to go through it in Python.
    """
    if not isinstance(value, dict | list):
        return False
    written = repr(value)
    return "None" in written or "Null" in written


@in_lists
def _without_nulls(value: Object, stays: Stays, under: str = "") -> Object:
    """Return a value without nulls, but for those that stay.

    Args:
        under: the key that the value stands under; "" where that is the name of a parameter.
    """
    found = {}
    for key, inner in value.items():
        if not is_null(inner):
            inner_under = "" if under == "properties" else key
            found[key] = _without_nulls(inner, stays, inner_under)
        elif stays(inner, key, under):
            found[key] = None
    return found


# ---------------------------------------------------------------- tools


def _parameters_of_tools(row: Object) -> Object:
    """Return the schema of the parameters of each tool of a row that has one, by the tool's
    name.
    """
    found = {}
    for key in TOOL_KEYS:
        tools = _unpacked(row.get(key))
        for given in tools if isinstance(tools, list) else ():
            tool = _unpacked(given)
            if not isinstance(tool, dict):
                continue
            function = _unpacked(tool.get("function", tool))
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                continue
            parameters = _unpacked(function.get("parameters"))
            if isinstance(parameters, dict):
                # a property that is null is none
                found[function["name"]] = _without_nulls(parameters, lambda *_: False)
    return found


def _unpacked(value: Any) -> Any:
    """Return what stands in a string as JSON, as tools often do. What is no JSON is refused where
    it is used.
    """
    return _parsed(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=64)  # rows have the same tools, mostly
def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------- messages


class _Messages:
    """Takes nulls out of messages.

    Args:
        parameters: schema of the parameters of each declared tool.

    Attributes:
        has_doubt: whether a null was found that may mean something or be padding.
    """

    def __init__(self, parameters: Object, padded: bool) -> None:
        self.parameters = parameters
        self.padded = padded
        self.has_doubt = False

    def clean(self, value: Any) -> Any:
        """Return messages, or a value in them, without keys that are null, but for the arguments of
        their calls.
        """
        if isinstance(value, list):
            return [self.clean(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        found = {}
        for key, inner in value.items():
            if key == "arguments" and isinstance(inner, dict):
                name = value.get("name")
                schema = self.parameters.get(name) if isinstance(name, str) else None
                found[key] = self._clean_arguments(inner, schema)
            elif not is_null(inner):
                found[key] = self.clean(inner)
        return found

    def _clean_arguments(self, value: Any, schema: Any) -> Any:
        """Return arguments of a call, or what stands inside them, without padding.

        Args:
            schema: what the tool declares of them, None where it does not.
        """
        if isinstance(value, list):
            items = schema.get("items") if isinstance(schema, dict) else None
            return [self._clean_arguments(inner, items) for inner in value]
        if not isinstance(value, dict):
            return value
        properties = schema.get("properties") if isinstance(schema, dict) else None
        is_declared = isinstance(properties, dict)
        found = {}
        for key, inner in value.items():
            if not is_null(inner):
                inner_schema = properties.get(key) if is_declared else None
                found[key] = self._clean_arguments(inner, inner_schema)
                continue
            may_be_padding = inner is None and self.padded
            if not is_declared:
                self.has_doubt = True
                if not may_be_padding:
                    found[key] = None
            elif key in properties:
                found[key] = None
                self.has_doubt |= may_be_padding
        return found
