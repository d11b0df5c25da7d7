"""Directories and globs as one source, CSV and TSV, names of evaluation sets, and a hub that cannot be reached."""

import csv
import gzip
import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import chat
from torchsft.config import Data, InputError
from torchsft.data.cache import fingerprint
from torchsft.data.files import Files, open_source, table_rows
from torchsft.data.prepare import open_sources, prepare
from torchsft.data.rows import RowError, decode
from torchsft.data.specs import evaluation_sets, parse_spec

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
        (source.where(number), payload.reason if isinstance(payload, RowError) else decode(payload, ""))
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
    assert [row for _, row in read(open_source(parse_spec(f"{directory}/*.jsonl")))] == [talk("two"), talk("three")]
    assert len(read(open_source(parse_spec(f"{directory}/**/*.jsonl")))) == 3
    spec = parse_spec(f"{directory}/*.jsonl:2.0")
    assert (spec.path, spec.weight) == (f"{directory}/*.jsonl", 2.0)
    for empty, says in ((f"{directory}/*.csv", "holds no file of rows"), (str(directory.parent / "none"), "does not exist")):
        (directory.parent / "other").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=says):
            open_source(parse_spec(empty))
    with pytest.raises(InputError, match="holds no file of rows"):
        open_source(parse_spec(str(directory.parent / "other")))


def test_the_fingerprint_of_a_glob_is_remembered_until_one_of_its_files_changes(directory, tmp_path):
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
    with pytest.raises(InputError, match=r"/data/a cannot be read \(Permission denied\); check its permissions$"):
        open_source(parse_spec(str(directory)))


def test_a_file_in_two_sources_is_refused(directory):
    assert len(open_sources([f"{directory}/*.jsonl", f"{directory}/a:2.0"])) == 2
    with pytest.raises(InputError, match=f"^{directory}/b.jsonl is given twice, by {directory} and by {directory}/b.jsonl; "):
        open_sources([str(directory), f"{directory}/b.jsonl:2.0"])


def test_two_splits_of_one_data_set_are_two_sources(tmp_path):
    splits = {name: datasets.Dataset.from_list([talk(name)]) for name in ("train", "extra")}
    path = str(tmp_path / "saved")
    datasets.DatasetDict(splits).save_to_disk(path)
    opened = open_sources([f"{path}:train", f"{path}:extra:2.0"])
    assert [(source.name, source.spec.weight) for source in opened] == [(f"{path}:train", 1.0), (f"{path}:extra", 2.0)]
    assert [row for source in opened for _, row in read(source)] == [talk("train"), talk("extra")]
    with pytest.raises(InputError, match="given twice"):
        open_sources([f"{path}:train", f"{path}:train:2.0"])


def test_samples_of_a_directory_are_cached_until_one_of_its_files_changes(directory, tmp_path):
    tokenizer, options = chat.byte_tokenizer(chat.CHATML), Data(cache=str(tmp_path / "cache"))
    [first] = prepare([str(directory)], tokenizer, options)
    assert [sample.id for sample in first.samples] == ["data:1:1", "data:2:1", "data:2:2", "data:3:1"]
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


@pytest.mark.parametrize(
    ("header", "reason", "says"),
    [
        (b"a,a", "csv-header", "the header has the column 'a' twice"),
        (b"a,", "csv-header", "the header has a column without a name"),
        (b'"a"x,b', "csv", "not a row of a table"),
        (b"\xff,b", "not-utf-8", "a field is not UTF-8"),
        ("a,b".encode("utf-16"), "not-utf-8", "a field is not UTF-8"),
    ],
)
def test_no_row_is_taken_for_a_header_that_is_faulty(header, reason, says):
    [(line, (found, said))] = table_rows([header + b"\n1,2\n3,4\n"], ",")
    assert (line, found) == (1, reason) and said.startswith(says) and "no row behind it can be read" in said


def test_a_quote_that_is_not_closed_says_how_far_it_reaches():
    rows = list(table_rows([b'a,b\n1,2\n"3,4\n5,6\n7,8\n'], ","))
    assert rows[0] == (2, {"a": "1", "b": "2"})
    [(line, (reason, said))] = rows[1:]
    assert (line, reason) == (3, "csv") and said.startswith("lines 3 to 5 are not a row")
    assert next(table_rows([b"a,b\n1,\x00\n"], ","))[1][0] == "nul-bytes"


def test_a_table_is_trained_by_the_option_that_its_refusal_prints(tmp_path):
    path = table(tmp_path / "a.csv", [["question", "answer"], ["hello", "you"]])
    tokenizer, cache = chat.byte_tokenizer(chat.CHATML), str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"--data.map question=user,answer=assistant$"):
        prepare([path], tokenizer, Data(cache=cache))
    [made] = prepare([path], tokenizer, Data(cache=cache, map="question=user,answer=assistant"))
    [sample] = made.samples
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "you<|im_end|>"


# ---------------------------------------------------------------- names of evaluation sets


def test_evaluation_sets_of_one_file_name_are_told_apart(tmp_path):
    paths = [str(lines(tmp_path / where / "held.jsonl", talk("x"))) for where in ("a/x", "b/x", "c")]
    assert evaluation_sets(paths) == {"a/x/held": paths[:1], "b/x/held": paths[1:2], "c/held": paths[2:]}
    assert evaluation_sets(paths[2:]) == {"held": paths[2:]}
    assert evaluation_sets([paths[0], f"mine={paths[1]}"]) == {"held": paths[:1], "mine": paths[1:2]}
    assert evaluation_sets(["org/name:test", "org/name:validation"]) == {
        "name:test": ["org/name:test"],
        "name:validation": ["org/name:validation"],
    }
    assert list(evaluation_sets(["org/name:test"])) == ["name"]


def test_no_two_files_get_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"a/held.jsonl": "a/held.jsonl", "a/held.csv": "held.csv", "b/held.jsonl": "b/held"}
    assert evaluation_sets(list(names)) == {name: [path] for path, name in names.items()}
    assert evaluation_sets(["held=x.jsonl", "y/held.jsonl"]) == {"held": ["x.jsonl"], "y/held": ["y/held.jsonl"]}
    assert evaluation_sets(["held=x.jsonl", "held=y.jsonl"]) == {"held": ["x.jsonl", "y.jsonl"]}


# ---------------------------------------------------------------- the hub


CODE = """
from torchsft.data.files import open_source
from torchsft.data.specs import parse_spec
try: open_source(parse_spec('org/name:train'))
except ValueError as error: print(error)
"""


@pytest.mark.parametrize(
    ("settings", "says", "remedy"),
    [
        (
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "the hub of data sets cannot be reached (http://127.0.0.1:9: ",
            "check the network",
        ),
        (
            {"HF_ENDPOINT": "http://127.0.0.2:9", "HTTP_PROXY": "http://127.0.0.1:9"},
            "the hub of data sets cannot be reached (http://127.0.0.2:9: ",
            "or set HF_HUB_OFFLINE=1 to use the local cache",
        ),
        ({"HF_HUB_OFFLINE": "1"}, "the local cache does not hold it and HF_HUB_OFFLINE forbids", "or unset HF_HUB_OFFLINE"),
    ],
    ids=["none", "proxy", "offline"],
)
def test_a_hub_that_cannot_be_reached_is_one_sentence_that_names_the_network(tmp_path, settings, says, remedy):
    ours = ("HF_", "TRANSFORMERS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(tmp_path)} | settings
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, env=environment)
    said = done.stdout.strip()
    assert said.startswith(f"org/name:train cannot be opened, as {says}") and remedy in said, done
    assert "download it beforehand" in said and "\n" not in said and "Retrying" not in done.stderr
