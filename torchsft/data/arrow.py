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

Convert = Callable[[Any], Any]  # makes a value of what is stored

IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
IS_LIST = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def rows_of(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a batch as objects.

    Raises:
        ValueError, OverflowError: one holds a value that cannot be read.
    """
    names = batch.schema.names
    for name in names:
        if names.count(name) > 1:  # `to_pylist` would keep one of them
            raise ValueError(f"two columns have the name {name!r}")
    rows = batch.to_pylist()
    for name, convert in _converters(batch.schema).items():
        for row in rows:
            row[name] = convert(row[name])
    return rows


def _converters(schema: pa.Schema) -> dict[str, Convert]:
    """Find the columns whose values are not what they are stored as.

    Returns:
        What makes the values of such a column, by its name.
    """
    features = _features(schema)
    found = {}
    for field in schema:
        convert = _converter(field.type, features.get(field.name))
        if convert:
            found[field.name] = convert
    return found


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what `datasets` has written of the columns into a schema: it shows which columns are
    JSON where the extension type is lost and they are text.
    """
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _converter(kind: pa.DataType, feature: Any) -> Convert | None:
    """Find what makes the values of a type.

    Args:
        kind: how they are stored.
        feature: what `datasets` has written of them, None where it has not.

    Returns:
        None where they are what `to_pylist` gives.
    """
    extension = getattr(kind, "extension_name", "")
    if extension == "arrow.json" or _is_json_text(kind, feature):
        return _unless_null(_json_value)
    if extension == "arrow.uuid":
        return _unless_null(str)
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type, None)
    if pa.types.is_map(kind):
        return _map_converter(kind)
    if pa.types.is_struct(kind):
        return _struct_converter(kind, feature)
    if pa.types.is_dictionary(kind):
        return _converter(kind.value_type, feature)
    if any(is_list(kind) for is_list in IS_LIST):
        return _list_converter(kind, feature)
    return None


def _is_json_text(kind: pa.DataType, feature: Any) -> bool:
    """Return whether values are JSON by their feature, and stored as text."""
    is_marked = isinstance(feature, dict) and feature.get("_type") == "Json"
    return is_marked and any(is_text(kind) for is_text in IS_TEXT)


def _map_converter(kind: pa.MapType) -> Convert:
    """Return what makes an object of a map, which is stored as pairs."""
    convert_item = _converter(kind.item_type, None)

    def convert(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        return _object(pairs, convert_item)

    return _unless_null(convert)


def _list_converter(kind: pa.DataType, feature: Any) -> Convert | None:
    """Return what makes the values of a list; None where they are what they are stored as."""
    inner_feature = None
    if isinstance(feature, dict):
        inner_feature = feature.get("feature")
    elif isinstance(feature, list) and feature:
        inner_feature = feature[0]
    convert_item = _converter(kind.value_type, inner_feature)
    if not convert_item:
        return None

    def convert(values: list[Any]) -> list[Any]:
        return [convert_item(value) for value in values]

    return _unless_null(convert)


def _struct_converter(kind: pa.StructType, feature: Any) -> Convert | None:
    """Return what makes the fields of a struct; None where they are what they are stored as."""
    features = feature if isinstance(feature, dict) else {}
    converters = {}
    for field in kind:
        convert_field = _converter(field.type, features.get(field.name))
        if convert_field:
            converters[field.name] = convert_field
    if not converters:
        return None

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        changed = dict(value)
        for name, convert_field in converters.items():
            changed[name] = convert_field(value[name])
        return changed

    return _unless_null(convert)


def _unless_null(convert: Convert) -> Convert:
    """Return what makes a value, and leaves null as it is."""
    return lambda value: None if value is None else convert(value)


def _object(pairs: list[tuple[Any, Any]], convert_item: Convert | None) -> dict[str, Any]:
    """Return a map as an object. Its nulls are marked as explicit, as a map has no padding.

    Args:
        convert_item: makes the values; None: they are as they are stored.

    Raises:
        ValueError: a key is no text, or is there twice.
    """
    found = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"a map has the key {key!r:.60}, but keys must be text")
        if key in found:
            raise ValueError(f"a map has the key {key!r:.60} twice")
        if convert_item:
            value = convert_item(value)
        found[key] = Null.EXPLICIT if value is None else value
    return found


def _json_value(text: str) -> Any:
    """Return the value of a JSON column, which is stored as text."""
    return _with_marked_nulls(load_json(text))


def _with_marked_nulls(value: Any) -> Any:
    """Return a JSON value whose nulls in objects are marked as explicit."""
    if isinstance(value, list):
        return [_with_marked_nulls(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        found[key] = Null.EXPLICIT if inner is None else _with_marked_nulls(inner)
    return found
