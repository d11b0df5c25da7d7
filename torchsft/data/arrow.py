"""Values of Arrow tables as `datasets` shows them, which is not always how they are stored.

JSON columns are stored as text, maps as lists of pairs, and extension types as what they extend;
all of these may stand inside lists and structs.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from torchsft.data.nulls import Null, in_lists
from torchsft.data.rows import Object, load_json

Convert = Callable[[Any], Any]  # makes a value of what is stored

IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
IS_LIST = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def rows_of(batch: pa.RecordBatch | pa.Table) -> list[Object]:
    """Return the rows of a batch as objects.

    Raises:
        ValueError, OverflowError: one holds a value that cannot be read.
    """
    names = batch.schema.names
    for name in names:
        if names.count(name) > 1:  # `to_pylist` would keep one of them
            raise ValueError(f"two columns have the name {name!r}")
    rows = batch.to_pylist()
    for name, convert in _converters(batch.schema, _features(batch.schema)).items():
        for row in rows:
            row[name] = convert(row[name])
    return rows


def _converters(fields: Iterable[pa.Field], features: Any) -> dict[str, Convert]:
    """Find the columns of a table or fields of a struct whose values are not what they are stored
    as.

    Args:
        features: what `datasets` has written of them, by name; None where it has not.

    Returns:
        What makes the values of such a column or field, by its name.
    """
    known = features if isinstance(features, dict) else {}
    found = {field.name: _converter(field.type, known.get(field.name)) for field in fields}
    return {name: convert for name, convert in found.items() if convert}


def _features(schema: pa.Schema) -> Object:
    """Return what `datasets` has written of the columns into a schema: it shows which columns are
    JSON where the extension type is lost and they are text.
    """
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
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
        return _unless_null(lambda text: _with_marked_nulls(load_json(text)))
    if extension == "arrow.uuid":
        return _unless_null(str)
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type, None)
    if pa.types.is_map(kind):
        convert_item = _converter(kind.item_type, None)
        return _unless_null(lambda pairs: _object(pairs, convert_item))
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
    return _unless_null(lambda values: [convert_item(value) for value in values])


def _struct_converter(kind: pa.StructType, feature: Any) -> Convert | None:
    """Return what makes the fields of a struct; None where they are what they are stored as."""
    converters = _converters(kind, feature)
    if not converters:
        return None

    def convert(value: Object) -> Object:
        return value | {name: change(value[name]) for name, change in converters.items()}

    return _unless_null(convert)


def _unless_null(convert: Convert) -> Convert:
    """Return what makes a value, and leaves null as it is."""
    return lambda value: None if value is None else convert(value)


def _object(pairs: list[tuple[Any, Any]], convert_item: Convert | None) -> Object:
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


@in_lists
def _with_marked_nulls(value: Object) -> Object:
    """Return a JSON value whose nulls in objects are marked as explicit."""
    return {
        key: Null.EXPLICIT if inner is None else _with_marked_nulls(inner)
        for key, inner in value.items()
    }
