"""Arrow's values, not its storage: the same rows as JSONL, Parquet and a saved data set are the
same rows.
"""

import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_formats import read
from torchsft.data.arrow import rows_of
from torchsft.data.rows import RowError, read_row
from torchsft.data.sources import Source
from torchsft.data.specs import parse_spec

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    },
    {
        "type": "function",
        "function": {"name": "g", "parameters": {"properties": {"b": {"enum": [1, "one"]}}}},
    },
]


def read_all(path):
    """Every row as training sees it."""
    source = Source(parse_spec(str(path)))
    return [read_row(payload)[0] for number, payload in source.rows()]


def written(rows, tmp_path):
    """The rows as JSONL, and as `datasets` stores them: in a directory, as Parquet, as JSONL
    again.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    kept.save_to_disk(tmp_path / "saved")
    kept.to_parquet(tmp_path / "rows.parquet")
    kept.to_json(tmp_path / "again.jsonl")
    return [file, tmp_path / "saved", tmp_path / "rows.parquet", tmp_path / "again.jsonl"]


def a_row(rng):
    """A conversation whose values are of other types than those of its neighbours."""
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "it"}]
    question = rng.choice(["say it", parts, '"quoted"', "null", "3", "[1]", "{}"])
    arguments = rng.choice([{"a": 1.5}, {"b": "one"}, {"b": 1}, {}, '{"a": 2}'])
    call = {"type": "function", "function": {"name": rng.choice("fg"), "arguments": arguments}}
    answers = [
        {"role": "assistant", "content": rng.choice(["yes", '"yes"', "no\n", "true"])},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    messages = [{"role": "user", "content": question}, rng.choice(answers)]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "be brief"})
    row = {"messages": messages, "tools": rng.choice([TOOLS, TOOLS[:1], TOOLS[1:]])}
    if rng.random() < 0.3:
        row["weight"] = rng.choice([0.5, 1, 2])
    return row


@pytest.mark.parametrize("seed", range(6))
def test_the_same_rows_are_the_same_however_they_are_stored(seed, tmp_path):
    """`datasets` makes JSON columns of what differs in type from row to row, by itself."""
    rng = random.Random(seed)
    rows = [a_row(rng) for _ in range(12)]
    for path in written(rows, tmp_path):
        assert [read(row) for row in read_all(path)] == [read(row) for row in rows], path.name


def test_json_columns_in_nested_places_are_what_datasets_shows(tmp_path):
    features = datasets.Features(
        {
            "text": datasets.Json(),
            "deep": {
                "list": datasets.List({"value": datasets.Json(), "plain": datasets.Value("string")})
            },
        }
    )
    rows = [
        {
            "text": "hi",
            "deep": {
                "list": [
                    {"value": {"a": [1, None]}, "plain": '{"a": 1}'},
                    {"value": "x", "plain": "y"},
                ]
            },
        },
        {"text": "three", "deep": {"list": []}},
    ]
    kept = datasets.Dataset.from_list(rows, features=features)
    kept.save_to_disk(tmp_path / "saved")
    kept.to_parquet(tmp_path / "rows.parquet")
    wanted = [{"text": row["text"], "deep": row["deep"]} for row in kept]
    assert wanted == rows
    assert read_all(tmp_path / "saved") == read_all(tmp_path / "rows.parquet") == wanted
    # the extension type is lost where a tool rewrites the file; what datasets has noted in the
    # schema is not
    table = pq.read_table(tmp_path / "rows.parquet")
    column = pa.chunked_array([pa.array(['"hi"', '"three"'])])
    plain = table.set_column(0, pa.field("text", pa.string()), column)
    pq.write_table(plain.replace_schema_metadata(table.schema.metadata), tmp_path / "plain.parquet")
    assert [row["text"] for row in read_all(tmp_path / "plain.parquet")] == ["hi", "three"]


def test_maps_unions_dictionaries_and_extension_types(tmp_path):
    maps = pa.array([[("a", 1), ("b", None)], None], pa.map_(pa.string(), pa.int64()))
    inside = pa.StructArray.from_arrays([maps], ["arguments"])
    union = pa.UnionArray.from_sparse(
        pa.array([0, 1], pa.int8()), [pa.array(["x", "y"]), pa.array([1, 2])]
    )
    batch = pa.RecordBatch.from_arrays(
        [
            inside,
            union,
            pa.array(["p", "q"]).dictionary_encode(),
            pa.array(["large", None], pa.large_string()),
            pa.array(["view", "w"], pa.string_view()),
            pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, None], pa.binary(16))),
            pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "t", "v"), pa.array(["o", "p"])),
        ],
        names=["call", "union", "dictionary", "large", "view", "uuid", "opaque"],
    )
    from torchsft.data.nulls import Null, clean

    first, second = rows_of(batch)
    assert first["call"] == {"arguments": {"a": 1, "b": Null.EXPLICIT}}
    assert clean(first, padded=True)[0]["call"] == {"arguments": {"a": 1, "b": None}}
    assert (first["union"], second["union"]) == ("x", 2)
    assert (first["dictionary"], first["large"], first["view"], first["opaque"]) == (
        "p",
        "large",
        "view",
        "o",
    )
    assert first["uuid"] == "30303030-3030-3030-3030-303030303030" and second["uuid"] is None


def test_what_cannot_be_an_object_is_refused_with_its_row(tmp_path):
    keys = pa.array([[(1, "a")], [(2, "b")]], pa.map_(pa.int64(), pa.string()))
    pq.write_table(pa.table({"text": ["x", "y"], "more": keys}), tmp_path / "rows.parquet")
    source = Source(parse_spec(str(tmp_path / "rows.parquet")))
    assert all(isinstance(fault, RowError) for _, fault in source.rows())
    assert [str(fault.at(source.where(number))) for number, fault in source.rows()] == [
        f"{tmp_path / 'rows.parquet'}, row {n}: a value cannot be read (a map has the key {n}, but "
        f"keys must be text);"
        " repair it or leave the row out"
        for n in (1, 2)
    ]


def test_two_columns_of_one_name_are_refused_as_a_key_given_twice_is(tmp_path):
    table = pa.table({"text": ["x"]}).append_column("text", pa.array(["y"]))
    pq.write_table(table, tmp_path / "rows.parquet")
    [(_, fault)] = Source(parse_spec(str(tmp_path / "rows.parquet"))).rows()
    assert "a value cannot be read (two columns have the name 'text')" in str(fault)
