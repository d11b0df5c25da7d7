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
from enum import Enum
from typing import Any

DOUBT = "doubtful-null"
# What may be null in the schema of a parameter.
_MAY_BE_NULL = ("default", "const", "example", "examples", "enum")


class Null(Enum):
    """A null that stands in a JSON value, where Arrow puts in none: in structs every absent key is
    null.
    """

    EXPLICIT = "null"


def clean(row: dict[str, Any], padded: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row without nulls that say nothing.

    Args:
        row: as it was read; nulls inside Arrow's JSON values are `Null.EXPLICIT`.
        padded: whether its objects were structs of Arrow, so that None may be padding.

    Returns:
        The row, and `doubtful-null` if a null may mean something or be padding.
    """
    notes: set[str] = set()
    found = {}
    for key, value in row.items():
        if value is None or value is Null.EXPLICIT:
            continue
        if not _may_hold_null(value):
            found[key] = value
        elif key in ("tools", "functions"):
            found[key] = _schema(value, padded)
        elif key in ("messages", "conversations", "prompt", "completion"):
            tools = [*_listed(row.get("tools")), *_listed(row.get("functions"))]
            found[key] = _messages(value, _declared(tools), padded, notes)
        else:
            found[key] = _other(value, padded)
        if key == "chat_template_kwargs" and isinstance(value, dict) and None in value.values():
            notes.update(() if padded else {DOUBT})  # a template may ask whether one is given
    return found, tuple(sorted(notes))


def _may_hold_null(value: Any) -> bool:
    """Return False only if no null stands in a value; text that looks like one is taken for it.

    To write the value out is several times as fast as to go through it in Python.
    """
    if not isinstance(value, dict | list):
        return False
    written = repr(value)
    return "None" in written or "Null" in written


def _listed(value: Any) -> list[Any]:
    value = _unpacked(value)
    return value if isinstance(value, list) else []


def _unpacked(value: Any) -> Any:
    """What stands in a string as JSON, as tools often do. What is no JSON is refused where it is
    used.
    """
    return _parsed(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=64)  # rows have the same tools, mostly
def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _other(value: Any, padded: bool) -> Any:
    """Without padding; what JSON says stays."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if inner is not None or not padded}
        return {
            key: None if inner is Null.EXPLICIT else _other(inner, padded)
            for key, inner in kept.items()
        }
    return [_other(inner, padded) for inner in value] if isinstance(value, list) else value


def _schema(value: Any, padded: bool, key: str = "") -> Any:
    """The declaration of tools, without nulls that no JSON schema has."""
    if isinstance(value, dict):
        found = {}
        for name, inner in value.items():
            is_property = key == "properties"  # its keys are names of parameters
            if inner is Null.EXPLICIT or (inner is None and not padded):
                if name in _MAY_BE_NULL and not is_property:
                    found[name] = None
            elif inner is not None:
                found[name] = _schema(inner, padded, "" if is_property else name)
        return found
    return [_schema(inner, padded, key) for inner in value] if isinstance(value, list) else value


def _declared(tools: list[Any]) -> dict[str, Any]:
    """The schema of the parameters of each tool that has one, by the tool's name."""
    found = {}
    for given in tools:
        tool = _unpacked(given)
        function = _unpacked(tool.get("function", tool)) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        parameters = _unpacked(function.get("parameters"))
        if isinstance(parameters, dict):
            # a property that is null is none
            found[function["name"]] = _schema(parameters, padded=True)
    return found


def _messages(value: Any, declared: dict[str, Any], padded: bool, notes: set[str]) -> Any:
    """Messages without keys that are null, but for the arguments of their calls."""
    if isinstance(value, list):
        return [
            None if inner is Null.EXPLICIT else _messages(inner, declared, padded, notes)
            for inner in value
        ]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        if isinstance(inner, str):  # most values, so asked first
            found[key] = inner
        elif inner is None or inner is Null.EXPLICIT:
            continue
        elif key == "arguments" and isinstance(inner, dict):
            name = value.get("name")
            schema = declared.get(name) if isinstance(name, str) else None
            found[key] = _arguments(inner, schema, padded, notes)
        else:
            found[key] = _messages(inner, declared, padded, notes)
    return found


def _arguments(value: Any, schema: Any, padded: bool, notes: set[str]) -> Any:
    """Arguments of a call, or what stands inside them; `schema`: what the tool declares of it, None
    where it does not.
    """
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [
            None if inner is Null.EXPLICIT else _arguments(inner, items, padded, notes)
            for inner in value
        ]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") if isinstance(schema, dict) else None
    known = properties if isinstance(properties, dict) else None
    found = {}
    for key, inner in value.items():
        may_be_padding = inner is None and padded
        if inner is not None and inner is not Null.EXPLICIT:
            below = known.get(key) if known is not None else None
            found[key] = _arguments(inner, below, padded, notes)
        elif known is not None and key in known:
            found[key] = None
            notes.update({DOUBT} if may_be_padding else ())
        elif known is None:
            notes.add(DOUBT)
            if not may_be_padding:
                found[key] = None
    return found
