"""Directories and globs as one source, CSV and TSV, names of evaluation sets, and a hub that cannot
be reached.
"""

import csv
import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import chat
from torchsft.config import Data, InputError
from torchsft.data.cache import fingerprint
from torchsft.data.files import Files, open_source
from torchsft.data.hub import unreachable
from torchsft.data.prepare import open_sources, prepare
from torchsft.data.rows import RowError, read_row
from torchsft.data.specs import evaluation_sets, parse_spec
from torchsft.data.tables import table_rows

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}


def talk(said):
    return {"messages": [USER, {"role": "assistant", "content": said}]}


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source, start=0):
    """(place, row or reason) of every row."""
    return [
        (
            source.where(number),
            payload.reason if isinstance(payload, RowError) else read_row(payload)[0],
        )
        for number, payload in source.rows(start)
    ]


@pytest.fixture
def directory(tmp_path):
    """Files of several kinds, and some that are none."""
    where = tmp_path / "data"
    lines(where / "b.jsonl", talk("two"), talk("three"))
    lines(where / "a" / "first.jsonl", talk("one"))
    pq.write_table(pa.Table.from_pylist([talk("four")]), where / "c.parquet")
    for name in (".hidden.jsonl", "_SUCCESS", "_temporary/x.jsonl"):
        lines(where / name, talk("never"))
    return where


def test_a_directory_is_one_source_in_the_order_of_its_files(directory):
    source = open_source(parse_spec(str(directory)))
    wanted = [
        (f"{directory}/a/first.jsonl, line 1", talk("one")),
        (f"{directory}/b.jsonl, line 1", talk("two")),
        (f"{directory}/b.jsonl, line 2", talk("three")),
        (f"{directory}/c.parquet, row 1", talk("four")),
    ]
    assert isinstance(source, Files) and read(source) == wanted
    numbers = [number for number, _ in source.rows()]
    assert len(set(numbers)) == 4
    for i, number in enumerate(numbers):  # from any place on, as a run that continues does
        assert read(source, number) == wanted[i + 1 :]


def test_a_glob_is_one_source_and_what_is_no_data_is_told(directory):
    (directory / "README.md").write_text("about")
    with pytest.warns(UserWarning, match=r"left out, as no files of rows: README\.md"):
        assert len(read(open_source(parse_spec(str(directory))))) == 4
    assert [row for _, row in read(open_source(parse_spec(f"{directory}/*.jsonl")))] == [
        talk("two"),
        talk("three"),
    ]
    assert len(read(open_source(parse_spec(f"{directory}/**/*.jsonl")))) == 3
    spec = parse_spec(f"{directory}/*.jsonl:2.0")
    assert (spec.path, spec.weight) == (f"{directory}/*.jsonl", 2.0)
    for empty, says in (
        (f"{directory}/*.csv", "holds no file of rows"),
        (str(directory.parent / "none"), "does not exist"),
    ):
        (directory.parent / "other").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=says):
            open_source(parse_spec(empty))
    with pytest.raises(InputError, match="holds no file of rows"):
        open_source(parse_spec(str(directory.parent / "other")))


def test_the_fingerprint_of_a_glob_is_remembered_until_one_of_its_files_changes(
    directory, tmp_path
):
    found = []
    for change in (None, None, "other"):
        if change:
            lines(directory / "b.jsonl", talk(change))
        source = open_source(parse_spec(f"{directory}/*.jsonl"))
        made = source.fingerprint()
        source.fingerprint = lambda made=made: f"read again: {made}"
        found.append((fingerprint(tmp_path / "cache", source), made))
    (first, _), (second, _), (third, made) = found
    assert first == second != third and third == f"read again: {made}"


def test_directories_that_a_glob_matches_and_links_are_read_once(directory, tmp_path):
    lines(tmp_path / "elsewhere" / "z.jsonl", talk("five"))
    (directory / "linked").symlink_to(tmp_path / "elsewhere")
    (directory / "linked" / "circle").symlink_to(directory)
    wanted = [talk(said) for said in ("one", "two", "three", "four", "five")]
    for text in (str(directory), f"{directory}/*", f"{directory}/**"):
        assert [row for _, row in read(open_source(parse_spec(text)))] == wanted, text


def test_a_directory_that_cannot_be_read_is_refused(directory, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        InputError,
        match=r"/data/a cannot be read \(Permission denied\); check its "
        r"permissions$",
    ):
        open_source(parse_spec(str(directory)))


def test_samples_of_a_directory_are_cached_until_one_of_its_files_changes(directory, tmp_path):
    tokenizer, options = chat.byte_tokenizer(chat.CHATML), Data(cache=str(tmp_path / "cache"))
    [first] = prepare([str(directory)], tokenizer, options)
    assert [sample.id for sample in first.samples] == [
        "data:1:1",
        "data:2:1",
        "data:2:2",
        "data:3:1",
    ]
    assert first.report.rows == 4
    [again] = prepare([str(directory)], tokenizer, options)
    assert again.digest == first.digest
    lines(directory / "b.jsonl", talk("two"), talk("other"))
    [changed] = prepare([str(directory)], tokenizer, options)
    assert changed.digest != first.digest
    lines(directory / "b.jsonl", talk("two"), {"messages": []})
    with pytest.raises(InputError, match=f"^{directory}/b.jsonl, line 2: no assistant message"):
        prepare([str(directory)], tokenizer, options)


# ---------------------------------------------------------------- tables of text


def table(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_table_has_a_row_for_each_record_with_the_line_where_it_begins(tmp_path, name, delimiter):
    rows = [["question", "answer"], ["a, b\tc", 'say "x"'], ["two\nlines", "y"], ["", "z é 🙂"]]
    path = table(tmp_path / name, rows, delimiter)
    wanted = [
        (f"{path}, line 2", {"question": "a, b\tc", "answer": 'say "x"'}),
        (f"{path}, line 3", {"question": "two\nlines", "answer": "y"}),
        (f"{path}, line 5", {"question": "", "answer": "z é 🙂"}),
    ]
    assert read(open_source(parse_spec(path))) == wanted
    assert read(open_source(parse_spec(path)), 3) == wanted[2:]
    with gzip.open(path + ".gz", "wb") as file, open(path, "rb") as plain:
        file.write(b"\xef\xbb\xbf" + plain.read())
    packed = open_source(parse_spec(path + ".gz"))
    assert [row for _, row in read(packed)] == [row for _, row in wanted]


def test_what_is_no_row_of_the_table_is_told_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'question,answer\none\na,b,c\n"x"y,z\n\xff,b\n\nq,r\n')
    source = open_source(parse_spec(str(path)))
    found = read(source)
    assert [(place.rpartition(" ")[2], row) for place, row in found] == [
        ("2", "csv-columns"),
        ("3", "csv-columns"),
        ("4", "csv"),
        ("5", "not-utf-8"),
        ("7", {"question": "q", "answer": "r"}),
    ]
    [fault, *_] = [payload for _, payload in source.rows()]
    assert "1 fields, but the header names 2 columns" in str(fault)
    for header in ("a,a", "a,"):
        [(_, fault)] = table_rows([f"{header}\n1,2\n".encode()], ",", 1000)
        assert fault.reason == "csv-header" and "the header has" in fault.text


def test_a_table_is_trained_by_the_option_that_its_refusal_prints(tmp_path):
    path = table(tmp_path / "a.csv", [["question", "answer"], ["hello", "you"]])
    tokenizer, cache = chat.byte_tokenizer(chat.CHATML), str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"--data.map question=user,answer=assistant$"):
        prepare([path], tokenizer, Data(cache=cache))
    [made] = prepare([path], tokenizer, Data(cache=cache, map="question=user,answer=assistant"))
    [sample] = made.samples
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "you<|im_end|>"


@pytest.mark.parametrize("column", ["weight", "score"])
def test_weights_of_a_table_are_followed(tmp_path, column):
    """All cells of a table are text; an empty one says nothing."""
    rows = [["prompt", "completion", column], *(["a", "b", said] for said in ("0.5", "", "0", "2"))]
    path, tokenizer = table(tmp_path / "a.csv", rows), chat.byte_tokenizer(chat.CHATML)
    columns = {"map": f"{column}=weight"} if column != "weight" else {}
    [made] = prepare([path], tokenizer, Data(cache=str(tmp_path / "cache"), **columns))
    assert [sample.weights.max() for sample in made.samples] == [0.5, 1.0, 2.0]
    assert made.report.counts == {"no-targets": 1} and not made.report.ignored
    path = table(tmp_path / "b.csv", [["text", "train"], ["a", "True"], ["b", "no"]])
    with pytest.raises(InputError, match="line 3: train is 'no'; give a number or true or false"):
        prepare([path], tokenizer, Data(cache=str(tmp_path / "cache")))


def test_a_directory_of_training_and_test_rows_is_refused_until_one_is_named(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist([{"text": name}]), tmp_path / "data" / f"{name}.parquet"
        )
    (tmp_path / "dataset_infos.json").write_text("{}")  # the hub's, no row
    with pytest.raises(
        InputError,
        match=rf"holds the splits test, train; give {tmp_path}:test, "
        rf"name its files, or",
    ):
        open_source(parse_spec(str(tmp_path)))
    assert [
        row["text"] for _, row in read(open_source(parse_spec(f"{tmp_path}/data/train-*.parquet")))
    ] == [
        "train-00000-of-00002",
        "train-00001-of-00002",
    ]
    with pytest.warns(UserWarning, match="left out, as no files of rows: dataset_infos.json"):
        assert len(read(open_source(parse_spec(f"{tmp_path}/**/*")))) == 3


def test_a_link_that_leads_nowhere_is_not_left_out_in_silence(tmp_path):
    lines(tmp_path / "a.jsonl", talk("x"))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl does not exist"):
        open_source(parse_spec(str(tmp_path)))


def test_a_file_in_two_sources_is_refused(tmp_path):
    one = lines(tmp_path / "a.jsonl", talk("x"))
    with pytest.raises(
        InputError, match=rf"a\.jsonl is in both {tmp_path} and {one}; name it once"
    ):
        open_sources([str(tmp_path), str(one)])


def test_nul_is_no_text_of_a_table():
    assert next(table_rows([b"a,b\n1,\x00\n"], ",", 1000))[1].reason == "nul-bytes"


def test_what_lies_behind_a_broken_table_is_not_lost_in_silence():
    def told(text):
        return [
            (line, row.text if isinstance(row, RowError) else row)
            for line, row in table_rows([text], ",", 1000)
        ]

    good = (2, {"a": "1", "b": "2"})
    unclosed = "a quote is opened and not closed, so that all that follows belongs to it; close it"
    assert told(b'a,b\n1,2\n3,"x\n5,6\n') == [good, (3, unclosed)]
    for header in (b'"a"x,b\n1,2\n', b"\xe9,b\n1,2\n", b"a,b\r1,2\r"):
        [(line, said)] = told(header)
        assert line == 1 and "header" in said and "nothing behind it can be read" in said


# ---------------------------------------------------------------- names of evaluation sets


def test_evaluation_sets_of_one_file_name_are_told_apart(tmp_path):
    paths = [
        str(lines(tmp_path / where / "held.jsonl", talk("x"))) for where in ("a/x", "b/x", "c")
    ]
    assert evaluation_sets(paths) == {
        "a/x/held": paths[:1],
        "b/x/held": paths[1:2],
        "c/held": paths[2:],
    }
    assert evaluation_sets(paths[2:]) == {"held": paths[2:]}
    assert evaluation_sets([paths[0], f"mine={paths[1]}"]) == {
        "held": paths[:1],
        "mine": paths[1:2],
    }
    assert evaluation_sets(["org/name:test", "org/name:validation"]) == {
        "name:test": ["org/name:test"],
        "name:validation": ["org/name:validation"],
    }
    assert list(evaluation_sets(["org/name:test"])) == ["name"]


def test_what_differs_has_different_names_and_what_the_user_named_is_his(tmp_path):
    files = [
        str(lines(tmp_path / name, talk("x")))
        for name in ("a/held.jsonl", "a/held.json", "b/dev.jsonl")
    ]
    # only the ending tells them apart
    assert evaluation_sets(files[:2]) == {files[0]: files[:1], files[1]: files[1:2]}
    assert evaluation_sets([f"dev={files[0]}", files[2]]) == {"dev": files[:1], "b/dev": files[2:]}
    everything = [f"{tmp_path}/a/*.jsonl", f"{tmp_path}/b/**/*"]
    assert evaluation_sets(everything) == {"a": everything[:1], "b": everything[1:]}


# ---------------------------------------------------------------- the hub


def test_a_hub_that_cannot_be_reached_is_one_sentence_that_names_the_network(tmp_path):
    code = (
        "from torchsft.data.files import open_source\n"
        "from torchsft.data.specs import parse_spec\n"
        "try: open_source(parse_spec('org/name:train'))\n"
        "except ValueError as error: print(error)\n"
    )
    proxies = {name for name in os.environ if name.lower().endswith("_proxy")}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in proxies and name != "HF_HUB_OFFLINE"
    }
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    said = done.stdout.strip()
    assert said.startswith(
        "org/name:train cannot be opened, as the hub of data sets cannot be reached (127.0.0.1: "
    )
    assert "check the network" in said and "HF_HUB_OFFLINE=1" in said and "\n" not in said


def test_offline_without_a_copy_says_so(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        InputError,
        match=r"^org/name:train is not in the local cache, and offline "
        r"mode .* download it",
    ):
        open_source(parse_spec("org/name:train"))


def test_a_proxy_that_is_not_there_is_found_out_at_once_and_an_answer_of_any_kind_is_one(
    monkeypatch,
):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")] + [
        "HF_HUB_OFFLINE"
    ]:
        monkeypatch.delenv(name, raising=False)
    # which answers 501 to everything
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(BaseHTTPRequestHandler, "log_message", lambda *_: None)
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert unreachable() == ""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert unreachable() == "hub.example: Connection refused"
