"""Reading rows of every kind of source: all of them, in order, each with its number; and faults
that cost no other row.
"""

import gzip
import json
import math
import pickle
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchsft.config import InputError
from torchsft.data import hub, sources
from torchsft.data.rows import RowError, located, read_row
from torchsft.data.sources import Source
from torchsft.data.specs import Spec, parse_spec

ROWS = [
    {
        "text": f'row {i} é "quoted" \\ [brackets}}, \u2028 😀',
        "n": i,
        "deep": {"a": [{"b": i}], "c": ["[]"]},
    }
    for i in range(150)
]
fuzzed = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def jsonl(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path, data):
    path.write_bytes(data)
    return str(path)


WRITERS = {
    "a.jsonl": lambda path: write(path, jsonl(ROWS)),
    "a.jsonl.gz": lambda path: write(path, gzip.compress(jsonl(ROWS))),
    "two.jsonl.gz": lambda path: write(
        path, gzip.compress(jsonl(ROWS[:70])) + gzip.compress(jsonl(ROWS[70:]))
    ),
    "a.jsonl.zst": lambda path: write(path, zstd(jsonl(ROWS))),
    "two.jsonl.zst": lambda path: write(path, zstd(jsonl(ROWS[:70])) + zstd(jsonl(ROWS[70:]))),
    "dense.json": lambda path: write(path, json.dumps(ROWS, separators=(",", ":")).encode()),
    "pretty.json": lambda path: write(
        path, b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode()
    ),
    "lines.json": lambda path: write(path, jsonl(ROWS)),
    "a.json.gz": lambda path: write(path, gzip.compress(json.dumps(ROWS).encode())),
    "a.parquet": lambda path: (
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=40) or str(path)
    ),
    "one.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path) or str(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path) or str(path),
    "shards": lambda path: (
        datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=3) or str(path)
    ),
    "numpy": lambda path: (
        datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(path) or str(path)
    ),
    "splits": lambda path: (
        datasets.DatasetDict(
            {
                "test": datasets.Dataset.from_list(ROWS[:1]),
                "train": datasets.Dataset.from_list(ROWS),
            }
        ).save_to_disk(path)
        or f"{path}:train"
    ),
}
KINDS = {
    ".json": "json",
    ".gz": "jsonl",
    ".jsonl": "jsonl",
    ".zst": "jsonl",
    ".parquet": "parquet",
    "": "datasets",
}


def read(source, start=0):
    """Rows and the reasons of faults, by number; numbers must rise."""
    found, last = {}, start
    for number, payload in source.rows(start):
        assert number > last
        last = number
        try:
            if isinstance(payload, RowError):
                raise payload
            found[number] = read_row(payload)[0]
        except RowError as error:
            assert "\n" not in str(error)
            found[number] = error.reason
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_all_rows_from_any_start(tmp_path, name):
    source = Source(parse_spec(WRITERS[name](tmp_path / name) + ":2.0"))
    assert source.kind == {"a.json.gz": "json", "lines.json": "jsonl"}.get(
        name, KINDS[(tmp_path / name).suffix]
    )
    assert source.name == name and source.spec.weight == 2.0
    everything = dict(enumerate(ROWS, start=1))
    assert read(source) == everything
    assert source.read_bytes == source.total_bytes > 0
    for start in (1, 39, 40, 63, 64, 65, 128, 149, 150, 151, 1000):
        assert read(source, start) == {
            number: row for number, row in everything.items() if number > start
        }


def test_streamed_datasets_give_the_same_rows(tmp_path):
    saved = Source(parse_spec(WRITERS["saved"](tmp_path / "saved")), name="web", streaming=True)
    assert read(saved, 70) == dict(enumerate(ROWS[70:], start=71)) and saved.name == "web"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_asked_for_by_name_configuration_and_split(monkeypatch, streaming):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        found = datasets.Dataset.from_list(ROWS)
        return found.to_iterable_dataset(num_shards=4) if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    for text in (
        "org/chats:train",
        "org/chats:train[:10%]:0.5",
        "org/chats/main:train",
        "squad:test",
    ):
        source = Source(parse_spec(text), streaming=streaming)
        assert source.kind == "datasets" and (source.total_bytes is None) == streaming
        assert read(source) == dict(enumerate(ROWS, start=1))
        assert read(source, 149) == {150: ROWS[149]} and read(source, 150) == {}
        assert source.fingerprint()
    assert source.where(7) == "squad:test, row 7"
    names = [
        ("org/chats", None, "train"),
        ("org/chats", None, "train[:10%]"),
        ("org/chats", "main", "train"),
    ]
    assert calls == [(*asked, streaming) for asked in [*names, ("squad", None, "test")]]


def test_what_the_hub_says_becomes_one_sentence(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(
        InputError,
        match=r"^a/b:train cannot be opened as a dataset "
        r"\(ConnectionError: no route\); check",
    ):
        Source(parse_spec("a/b:train"))


def test_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "odd:2.0", "odd:train"):
        write(tmp_path / name, b"")
    (tmp_path / "dir").mkdir()
    assert parse_spec("chats.jsonl") == Spec("chats.jsonl")
    assert parse_spec("chats.jsonl:2.0") == Spec("chats.jsonl", 2.0)
    assert (
        parse_spec("chats.jsonl:.5") == parse_spec("chats.jsonl:5e-1") == Spec("chats.jsonl", 0.5)
    )
    assert parse_spec("dir:2") == Spec("dir", 2.0)
    assert parse_spec("dir:train") == Spec("dir", 1.0, "train")
    assert parse_spec("org/name:split") == Spec("org/name", 1.0, "split")
    assert parse_spec("org/name:split:0.5") == Spec("org/name", 0.5, "split")
    assert parse_spec("org/name:train[10%:20%]:3") == Spec("org/name", 3.0, "train[10%:20%]")
    assert parse_spec("org/name:2024:1") == Spec("org/name", 1.0, "2024")
    assert parse_spec("odd:2.0") == Spec("odd:2.0")  # a path that exists wins
    assert parse_spec("odd:2.0:3") == Spec("odd:2.0", 3.0)
    assert parse_spec("odd:train") == Spec("odd:train")
    assert parse_spec("a:b/c.jsonl") == Spec("a:b/c.jsonl")
    for text in (
        "",
        ":",
        ":2",
        "chats.jsonl:0",
        "chats.jsonl:-1",
        "chats.jsonl:nan",
        "chats.jsonl:inf",
        "chats.jsonl:1e999",
    ):
        if text == ":":
            with pytest.raises(InputError, match="does not exist"):
                Source(parse_spec(text))
            continue
        with pytest.raises(InputError, match=r"names no data; give PATH, PATH:WEIGHT \(above 0\)"):
            parse_spec(text)


def test_what_cannot_be_opened_is_refused_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # must not be asked
    WRITERS["saved"](tmp_path / "saved")
    WRITERS["splits"](tmp_path / "splits")
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken" / "state.json", b"{}")
    says = {
        "absent.jsonl": "absent.jsonl does not exist; give",
        "absent.parquet:train": "absent.parquet:train does not exist; give",
        "absent": "absent does not exist; give",
        "a.jsonl/b.jsonl": "b.jsonl does not exist; give",
        "": "is a directory, but none of datasets' save_to_disk; name the files in it",
        "a.jsonl:train": "a.jsonl:train cannot be used, as a file has no splits",
        "saved:train": "saved:train cannot be used, as the dataset has no splits",
        "splits": "splits cannot be used, as the dataset has the splits test, train; give one as",
        "splits:dev": "splits:dev cannot be used, as the dataset has the splits test, train; give "
        "one as",
        "broken": r"broken cannot be opened as a dataset \(",
    }
    for text, sentence in says.items():
        with pytest.raises(InputError, match=sentence) as error:
            Source(parse_spec(f"{tmp_path}/{text}"))
        assert "\n" not in str(error.value)


def test_blank_lines_are_numbered_and_left_out_and_line_ends_may_be_of_any_system(tmp_path):
    text = '{"a": "x\\u2028y\x85"}'.encode()
    lines = [
        b"\xef\xbb\xbf" + text + b"\r",
        b"",
        b" \t\r",
        b"\xef\xbb\xbf" + text,
        text.replace(b": ", b":\r"),
    ]
    source = Source(parse_spec(write(tmp_path / "a.jsonl", b"\n".join(lines))))
    row = {"a": "x\u2028y\x85"}
    assert read(source) == {1: row, 4: row, 5: row}
    assert read(source, 2) == {4: row, 5: row}
    assert source.where(4) == f"{tmp_path}/a.jsonl, line 4"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "b.json"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    content = {"a.json": b" [ ]\n", "a.jsonl.gz": gzip.compress(b"")}.get(name, b"")
    if name == "a.parquet":
        pq.write_table(
            pa.Table.from_pylist([], pa.schema([("text", pa.string())])), tmp_path / name
        )
    else:
        write(tmp_path / name, content)
    assert read(Source(parse_spec(str(tmp_path / name)))) == {}


BAD_LINES = {
    "cut off": (
        b'{"messages": [{"role": "user", "con',
        "not-json",
        "not JSON (Unterminated string",
    ),
    "single quotes": (b"{'a': 1}", "not-json", "not JSON (Expecting property name"),
    "a list": (b"[1]", "not-json", "not a JSON object, but a list"),
    "null": (b"null", "not-json", "not a JSON object, but null"),
    "a string": (b'"x"', "not-json", "not a JSON object, but a string"),
    "two objects": (b"{} {}", "not-json", "not JSON (Extra data"),
    "not UTF-8": (b'{"a": "h\xff"}', "not-utf-8", "byte 9 is not UTF-8"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not-utf-8", "byte 8 is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not-utf-8", "byte 1 is not UTF-8"),
    "UTF-16 without mark": ('{"a": 1}'.encode("utf-16-le"), "nul-bytes", "byte 2 is NUL"),
    "zeroes of a crash": (b"\0" * 100, "nul-bytes", "byte 1 is NUL"),
    "NUL in a string": (b'{"a": "\0"}', "nul-bytes", "byte 8 is NUL"),
    "raw surrogate": (b'{"a": "\xed\xa0\x80"}', "not-utf-8", "byte 8 is not UTF-8"),
    "escaped surrogate": (b'{"a": ["\\uD83d"]}', "surrogate", "half a surrogate pair (0xd83d)"),
    "surrogate in a key": (b'{"\\udc00": 1}', "surrogate", "half a surrogate pair (0xdc00)"),
    "lists without end": (b"[" * 200_000, "not-json", "nested too deeply"),
    "deep": (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "not-json", "nested too deeply"),
    "a number of many digits": (
        b'{"a": ' + b"1" * 10_000 + b"}",
        "not-json",
        "not JSON (Exceeds the limit",
    ),
    "a key twice": (
        b'{"m": [{"role": 1, "x": 2, "role": 3}]}',
        "not-json",
        "key 'role' is given twice",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_one_fault_and_costs_no_other_row(tmp_path, name):
    line, reason, says = BAD_LINES[name]
    good = b'{"a": "\\ud83d\\ude00 \\u0000"}'  # a whole pair, and what only looks like the others
    path = write(tmp_path / "a.jsonl", b"\n".join([good, b"", line, good]))
    source = Source(parse_spec(path))
    assert read(source) == {1: {"a": "😀 \0"}, 3: reason, 4: {"a": "😀 \0"}}
    with pytest.raises(RowError) as error, located(source.where(3)):
        read_row(line)
    assert str(error.value).startswith(f"{path}, line 3: ") and says in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@fuzzed
@given(
    st.lists(st.one_of(st.sampled_from(ROWS), st.binary(max_size=30)), max_size=8),
    st.integers(0, 9),
    st.integers(1, 40),
)
def test_any_bytes_between_lines_cost_only_their_own_lines(tmp_path, lines, start, portion):
    junk = [line.replace(b"\n", b"") if isinstance(line, bytes) else line for line in lines]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in junk)
    )
    source = in_portions(Source(Spec(str(path))), portion)
    found = read(source, start)
    for number, line in enumerate(junk, start=1):
        if number <= start or (isinstance(line, bytes) and not line.strip()):
            assert number not in found
        elif not isinstance(line, bytes):
            assert found[number] == line
        else:
            assert isinstance(found[number], str | dict)  # a reason, or what json makes of it
            assert isinstance(found[number], str) or found[number] == json.loads(
                line.removeprefix(b"\xef\xbb\xbf")
            )


def in_portions(source, size):
    """The same source, read `size` bytes at a time: a multi-byte character or an escape may lie
    across two reads.
    """
    whole = source._chunks
    source._chunks = lambda: (
        chunk[i : i + size] for chunk in whole() for i in range(0, len(chunk), size)
    )
    return source


BALANCED = st.sampled_from(
    [
        b"{'a': 1}",
        b"{1: [}]",
        b'"\xff"',
        b'{"a": "\xff"}',
        b"[[[]]]",
        b"tru",
        b'{"a": "\\"}, {"}',
        b"{}{}",
        b'{"a": "x\ny"}',
    ]
)


@fuzzed
@given(
    st.lists(st.one_of(st.sampled_from(ROWS), BALANCED), max_size=8),
    st.sampled_from([b"", b" ", b"\r\n\t"]),
    st.integers(1, 60),
)
def test_a_bad_element_of_an_array_costs_no_other_row(tmp_path, elements, space, portion):
    texts = [
        e if isinstance(e, bytes) else json.dumps(e, indent=len(space) or None).encode()
        for e in elements
    ]
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + space + (space + b"," + space).join(texts) + space + b"]" + space)
    found = read(in_portions(Source(Spec(str(path))), portion))
    assert len(found) == len(elements)
    for number, element in enumerate(elements, start=1):
        if isinstance(element, bytes) and element != b'{"a": "\\"}, {"}':
            assert found[number] in ("not-json", "not-utf-8")
        else:
            assert found[number] == (json.loads(element) if isinstance(element, bytes) else element)


@fuzzed
@given(st.integers(1, len(json.dumps(ROWS[:9])) - 1), st.integers(1, 200))
def test_an_array_that_is_cut_off_gives_the_rows_before_the_cut(tmp_path, cut, portion):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(ROWS[:9]).encode()[:cut])
    found = read(in_portions(Source(Spec(str(path))), portion))
    whole = len(found) - 1
    assert found.pop(whole + 1) == "truncated-file" and found == dict(
        enumerate(ROWS[:whole], start=1)
    )
    # one byte for the bracket, or the comma in its place
    ends = [len(json.dumps(ROWS[:n])) for n in range(1, 10)]
    assert whole == sum(end <= cut for end in ends)


def test_text_behind_an_array_is_a_fault(tmp_path):
    for text in (
        b'[{"a": 1},\n{"a": 2}]\n[{"a": 3}]',
        b'[{"a": 1}, {"a": 2}}, {"a": 3}]',
        b'[{"a": 1}, {"a": 2}] x',
    ):
        source = Source(parse_spec(write(tmp_path / "a.json", text)))
        assert read(source) == {1: {"a": 1}, 2: {"a": 2}, 3: "truncated-file"}
        *_, (number, fault) = source.rows()
        assert number == 3
        assert "this and all that follows cannot be read (text follows the end" in fault.text


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_or_damaged_gives_the_rows_before_and_one_fault(
    tmp_path, kind
):
    rows = [{"text": f"{i} {(i * 7919) % 10007}"} for i in range(20_000)]
    whole = gzip.compress(jsonl(rows)) if kind == "gz" else zstd(jsonl(rows))
    path = tmp_path / f"a.jsonl.{kind}"
    counts = []
    for cut in [3, 20, *range(1000, len(whole), len(whole) // 9), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        found = read(Source(parse_spec(str(path))))
        counts.append(len(found) - 1)
        assert found.pop(len(found)) == "truncated-file"
        assert found == dict(enumerate(rows[: len(found)], start=1))
    assert counts == sorted(counts) and counts[-1] > 0.8 * len(rows)
    last = counts[-1]
    source = Source(parse_spec(str(path)))
    assert read(source, last) == {last + 1: "truncated-file"} and read(source, last + 1) == {}
    number, fault = next(Source(parse_spec(damaged(path, whole[:3]))).rows())
    assert number == 1 and "this and all that follows cannot be read" in fault.text
    path.write_bytes(whole + b"junk at the end")
    found = read(source)
    assert found.pop(len(found)) == "truncated-file" and found == dict(
        enumerate(rows[: len(found)], start=1)
    )
    assert len(found) > 0.8 * len(rows)


def damaged(path, data):
    path.write_bytes(data)
    return str(path)


@fuzzed
@given(st.integers(0, 3000), st.integers(1, 255))
def test_no_flipped_byte_of_a_compressed_file_ends_in_a_crash(tmp_path, place, flip):
    whole = bytearray(gzip.compress(jsonl(ROWS), mtime=0))
    whole[place % len(whole)] ^= flip
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole)
    found = read(Source(Spec(str(path))))
    if "truncated-file" not in found.values():  # only the header's time, name or flags were hit
        assert found == dict(enumerate(ROWS, start=1))


def test_a_parquet_file_that_is_cut_off_or_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"{i} {(i * 7919) % 10007} abcdefgh"} for i in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd")
    whole = path.read_bytes()
    for cut in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read(Source(parse_spec(str(path)))) == {1: "truncated-file"}
    chunk = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(2).column(0)
    hole = bytearray(whole)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    hole[begin : begin + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(hole)
    source = Source(parse_spec(str(path)))
    found = read(source)
    assert found.pop(len(found)) == "truncated-file"
    # of 2000; less than a batch is lost
    assert found == dict(enumerate(rows[: len(found)], start=1)) and len(found) >= 1900
    assert read(source, 3000) == dict(enumerate(rows[3000:], start=3001))
    assert read(source, 2500) == {2501: "truncated-file"}


def test_a_string_in_parquet_that_is_not_utf8_costs_only_its_row(tmp_path):
    texts = pa.array([b"a", b"b\xff", b"c", None, b"e"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts, "n": pa.array(range(5))}), tmp_path / "a.parquet")
    found = read(Source(parse_spec(str(tmp_path / "a.parquet"))))
    assert found == {
        1: {"text": "a", "n": 0},
        2: "not-utf-8",
        3: {"text": "c", "n": 2},
        4: {"n": 3},
        5: {"text": "e", "n": 4},
    }


def test_keys_that_arrow_filled_with_none_are_taken_out_and_those_inside_json_are_not():
    row = {"a": None, "b": [{"c": None, "d": 0, "e": [None, "", False]}], "f": {}}
    assert read_row(row)[0] == {"b": [{"d": 0, "e": [None, "", False]}], "f": {}}
    # a key of the row that is null says nothing
    assert read_row(json.dumps(row).encode())[0] == {"b": row["b"], "f": {}}
    assert math.isnan(read_row(b'{"score": NaN}')[0]["score"])  # which is refused where it is used


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_that_is_too_long_is_read_over(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    fits = {"a": "x" * 91}
    assert len(json.dumps(fits)) == 100
    rows = [{"a": 0}, fits, {"a": "x" * 92}, {"a": "x" * 5000}, {"a": 2}]
    data = jsonl(rows) if name == "a.jsonl" else json.dumps(rows, separators=(",", ": ")).encode()
    source = Source(parse_spec(write(tmp_path / name, data)))
    for portion in (7, 100, 10_000):
        found = read(in_portions(source, portion))
        assert found == {1: {"a": 0}, 2: fits, 3: "line-too-long", 4: "line-too-long", 5: {"a": 2}}


def test_memory_stays_flat_over_long_lines_and_large_files(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(300 * 2**20)  # a line of 300 MiB that takes no room on the disk
        file.seek(0, 2)
        file.write(b'\n{"a": 2}\n')
    tracemalloc.start()
    try:
        assert read(Source(parse_spec(str(path)))) == {1: {"a": 1}, 2: "line-too-long", 3: {"a": 2}}
        assert tracemalloc.get_traced_memory()[1] < 2 * sources.MAX_BYTES
        write(path, jsonl([{"a": "x" * 1000}] * 1000) * 50)
        tracemalloc.reset_peak()
        assert sum(1 for _ in Source(parse_spec(str(path))).rows()) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20  # of 50 MB
    finally:
        tracemalloc.stop()


def test_a_parquet_file_of_one_large_row_group_is_not_loaded_as_a_whole(tmp_path):
    texts = pa.array([f"{i}" * 500 for i in range(20_000)])
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False
    )
    del texts
    before, most = pa.total_allocated_bytes(), 0
    for _, _ in Source(parse_spec(str(tmp_path / "a.parquet"))).rows():
        most = max(most, pa.total_allocated_bytes() - before)
    assert (tmp_path / "a.parquet").stat().st_size > 40 * 2**20 and most < 12 * 2**20


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    def of(text):
        return Source(parse_spec(str(text))).fingerprint()

    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(one, jsonl(ROWS))
    write(other, jsonl(ROWS))
    assert of(one) == of(other) == of(f"{one}:3.0")
    write(other, jsonl(ROWS[:-1]))
    assert of(one) != of(other)
    write(tmp_path / "a.json", jsonl(ROWS)), write(tmp_path / "a.parquet", jsonl(ROWS))
    # the same bytes, read in another way
    assert of(tmp_path / "a.json") == of(one) != of(tmp_path / "a.parquet")
    for name, rows in (("same", ROWS), ("less", ROWS[:-1])):
        both = {
            "train": datasets.Dataset.from_list(rows),
            "test": datasets.Dataset.from_list(rows[:3]),
        }
        datasets.DatasetDict(both).save_to_disk(tmp_path / name)
    assert (
        of(f"{tmp_path}/same:test") == of(f"{tmp_path}/less:test") != of(f"{tmp_path}/same:train")
    )
    assert of(f"{tmp_path}/same:train") != of(f"{tmp_path}/less:train")
