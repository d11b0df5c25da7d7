"""Values of Arrow tables as `datasets` shows them, which is not always how they are stored.

JSON columns are stored as text, maps as lists of pairs, and extension types as what they extend;
all of these may stand inside lists and structs.
"""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from torchsft.data.nulls import Null
from torchsft.data.rows import load_json

Convert = Callable[[Any], Any]


def rows_of(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows of a batch as objects. Raises ValueError or OverflowError: one holds a value that
    cannot be read.
    """
    names = batch.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        # `to_pylist` would keep one of them
        raise ValueError(f"two columns have the name {twice!r}")
    rows = batch.to_pylist()
    for name, convert in _conversions(batch.schema).items():
        for row in rows:
            row[name] = convert(row[name])
    return rows


def _conversions(schema: pa.Schema) -> dict[str, Convert]:
    """For the columns whose values are not what they are stored as: what makes the value."""
    features = _features(schema)
    found = {field.name: _conversion(field.type, features.get(field.name)) for field in schema}
    return {name: convert for name, convert in found.items() if convert}


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` has written of the columns into a schema: JSON columns are text where the
    extension type is lost.
    """
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _conversion(kind: pa.DataType, feature: Any) -> Convert | None:
    """What makes values of a type; None: they are what `to_pylist` gives."""
    is_text = (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
    marked = isinstance(feature, dict) and feature.get("_type") == "Json" and is_text
    if marked or getattr(kind, "extension_name", "") == "arrow.json":
        return _or_null(_json_value)
    if getattr(kind, "extension_name", "") == "arrow.uuid":
        return _or_null(str)
    if isinstance(kind, pa.BaseExtensionType):
        return _conversion(kind.storage_type, None)
    if pa.types.is_map(kind):
        inner = _conversion(kind.item_type, None)
        return _or_null(lambda pairs: _object(pairs, inner))
    if pa.types.is_struct(kind):
        return _struct(kind, feature)
    if pa.types.is_dictionary(kind):
        return _conversion(kind.value_type, feature)
    if any(is_list(kind) for is_list in _LISTS):
        below = feature.get("feature") if isinstance(feature, dict) else None
        below = feature[0] if isinstance(feature, list) and feature else below
        inner = _conversion(kind.value_type, below)
        return inner and _or_null(lambda values: [inner(value) for value in values])
    return None


_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def _struct(kind: pa.StructType, feature: Any) -> Convert | None:
    below = feature if isinstance(feature, dict) else {}
    fields = {field.name: _conversion(field.type, below.get(field.name)) for field in kind}
    changed = {name: convert for name, convert in fields.items() if convert}
    if not changed:
        return None

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        return value | {name: make(value[name]) for name, make in changed.items()}

    return _or_null(convert)


def _or_null(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _object(pairs: list[tuple[Any, Any]], inner: Convert | None) -> dict[str, Any]:
    """A map as an object, whose nulls are said, as a map has no padding."""
    found = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"a map has the key {key!r:.60}, but keys must be text")
        if key in found:
            raise ValueError(f"a map has the key {key!r:.60} twice")
        value = inner(value) if inner else value
        found[key] = Null.SAID if value is None else value
    return found


def _json_value(text: str) -> Any:
    return _said(load_json(text))


def _said(value: Any) -> Any:
    """A JSON value with its nulls marked."""
    if isinstance(value, dict):
        return {key: Null.SAID if inner is None else _said(inner) for key, inner in value.items()}
    return [_said(inner) for inner in value] if isinstance(value, list) else value
