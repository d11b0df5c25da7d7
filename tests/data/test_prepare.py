# ruff: noqa: E501 (programs in strings)
"""Sources to samples: policies, counts, what is refused, the cache, further processes, streams; and
GSM8K.
"""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext as nothing
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import tqdm

from recipes.answers import answer_prompts
from tests.data import chat
from tests.data.chat import byte_tokenizer
from torchsft.config import Data, InputError
from torchsft.data import pool
from torchsft.data import prepare as module
from torchsft.data.packing import pack
from torchsft.data.prepare import open_sources, open_streams, prepare, prepare_eval
from torchsft.data.preparer import Preparer
from torchsft.data.report import Report
from torchsft.data.rows import RowError
from torchsft.data.template import ChatTokenizer

TOKENIZER = byte_tokenizer(chat.DEEPSEEK_V3)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_file(), reason=f"{GSM8K} is not there: GSM8K is not part of the project"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def many_processes(monkeypatch):
    """Chunks of 4 rows, tokenised by two further processes whatever the machine and however little
    there is to do.
    """
    monkeypatch.setattr(pool, "FEW_CHUNKS", 1)
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def row(*turns):
    return {"messages": chat.conversation(*turns).messages}


def write(path, *rows):
    path.write_text(
        "".join(json.dumps(each) + "\n" if isinstance(each, dict) else each + "\n" for each in rows)
    )
    return str(path)


# Tokens: <bos> <|User|> 4 2 <|Assistant|> <answer, a token for each digit> <eos>
def talk(digits):
    return row("42", "7" * digits)


def shown(samples):
    """(id, tokens, weights) of each sample, to compare."""
    return [(sample.id, sample.tokens.tolist(), sample.weights.tolist()) for sample in samples]


def one(path, *arguments, **options):
    [prepared] = prepare([path], TOKENIZER, Data(*arguments, **options))
    return prepared


# ---------------------------------------------------------------- counts and policies


def test_counts_and_the_line_that_is_shown(tmp_path):
    first = write(tmp_path / "first.jsonl", talk(1), talk(20), talk(3))
    second = write(tmp_path / "second.jsonl", talk(2))
    a, b = prepare([first, f"{second}:2.5"], TOKENIZER, Data(seq_len=16))
    assert [sample.id for sample in [*a.samples, *b.samples]] == [
        "first.jsonl:1",
        "first.jsonl:3",
        "second.jsonl:1",
    ]
    assert (a.name, a.weight, b.name, b.weight) == ("first.jsonl", 1.0, "second.jsonl", 2.5)
    largest = int(max(a.samples[1].tokens))
    ends = {str(TOKENIZER.eos_token_id): 2}  # of the two turns that are trained
    numbers = (3, 2, (6 + 1) + (6 + 3), 2 + 4, 9, largest)
    assert a.report == Report(
        "first.jsonl", first, "messages", *numbers, {"too-long": 1}, ends=ends
    )
    assert str(a.report) == (
        "first.jsonl (messages): 3 rows, 2 samples, 16 tokens (37.5 % "
        "supervised), longest 9; too-long 1"
    )
    assert a.digest != b.digest


def test_samples_are_compact_arrays(tmp_path):
    [sample] = one(write(tmp_path / "a.jsonl", talk(5)), seq_len=16).samples
    assert (sample.tokens.dtype, sample.weights.dtype) == (np.int32, np.float32)
    assert TOKENIZER.decode(sample.tokens[sample.weights > 0]) == "77777<eos>"


@pytest.mark.parametrize(
    ("truncation", "expected", "counts"),
    [
        ("drop", {"a:1": "77"}, {"too-long": 2}),
        ("right", {"a:1": "77", "a:2": "345"}, {"truncated": 2, "no-targets": 1}),
        ("left", {"a:1": "77", "a:2": "9012345", "a:3": "7"}, {"truncated": 2}),
        # Of a:3 the first piece is question alone; the first token of a piece is predicted from
        # nothing.
        (
            "split",
            {"a:1": "77", "a:2/1": "345", "a:2/2": "7890123", "a:2/3": "5", "a:3": "7"},
            {"split": 2, "no-targets": 1},
        ),
    ],
)
def test_truncation(tmp_path, truncation, expected, counts):
    """Of <bos> <|User|> 4 2 <|Assistant|> 3456789012345 <eos> and <bos> <|User|> 44444444
    <|Assistant|> 7 <eos>, in eights.
    """
    path = write(
        tmp_path / "a.jsonl", row("42", "77"), row("42", "3456789012345"), row("4" * 8, "7")
    )
    seq_len = {"left": 9}.get(truncation, 8)
    prepared = one(path, seq_len=seq_len, truncation=truncation)
    trained = {
        s.id.replace(".jsonl", ""): TOKENIZER.decode(s.tokens[s.weights > 0])
        for s in prepared.samples
    }
    ends = {"a:1", "a:3", "a:2" if truncation == "left" else "a:2/3"}
    assert trained == {name: text + "<eos>" * (name in ends) for name, text in expected.items()}
    assert prepared.report.counts == counts
    assert all(len(s.tokens) <= seq_len and s.weights[0] == 0 for s in prepared.samples)


def test_a_sample_of_exactly_seq_len_tokens_is_kept_whole(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(10))
    for truncation in ("drop", "left", "right", "split", "raise"):
        report = one(path, seq_len=16, truncation=truncation).report
        assert (report.samples, report.tokens, report.supervised_tokens, report.counts) == (
            1,
            16,
            11,
            {},
        )


def test_truncation_raise_names_the_line_and_both_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(3), talk(20))
    with pytest.raises(
        InputError,
        match=r"a\.jsonl, line 2: 26 tokens, but --data\.seq-len is 16; "
        r".* --data\.truncation",
    ):
        one(path, seq_len=16, truncation="raise")


def test_a_source_without_a_supervised_token_is_refused_with_its_counts(tmp_path):
    with pytest.raises(
        InputError, match=r"no supervised token is left: .*; too-long 1 .*seq-len 8"
    ):
        one(write(tmp_path / "a.jsonl", talk(20)), seq_len=8)
    with pytest.raises(InputError, match=r"no supervised token is left: .*; no-targets 1"):
        one(write(tmp_path / "b.jsonl", row("4" * 20, "7")), seq_len=8, truncation="right")
    with pytest.raises(
        InputError,
        match=r"no supervised token is left: .*; skipped 1 .*; first "
        r"fault: .*line 1: not JSON",
    ):
        one(write(tmp_path / "c.jsonl", "{]"), on_error="skip")


def test_an_empty_file_and_a_file_given_twice_are_refused(tmp_path):
    empty, path = write(tmp_path / "empty.jsonl", "", ""), write(tmp_path / "a.jsonl", talk(2))
    with pytest.raises(InputError, match=r"empty\.jsonl holds no rows"):
        prepare([path, empty], TOKENIZER, Data())
    (tmp_path / "link.jsonl").symlink_to(path)
    assert one(tmp_path / "link.jsonl").samples[0].id == "link.jsonl:1"
    for again in (path, f"{path}:2.0", str(tmp_path / "link.jsonl"), f"{tmp_path}/./a.jsonl"):
        with pytest.raises(InputError, match=r"jsonl is given twice"):
            prepare([path, again], TOKENIZER, Data())


def test_token_ids_that_the_model_does_not_have_are_refused_with_their_row(tmp_path):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 7, 2], "labels": [-100, 7, 2]},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    assert one(path).report.max_id == 7
    assert prepare([path], TOKENIZER, Data(), vocab_size=8)[0].report.max_id == 7
    with pytest.raises(
        InputError,
        match=r"a\.jsonl, line 2: token id 7, but the model's "
        r"vocabulary has 7;",
    ):
        prepare([path], TOKENIZER, Data(), vocab_size=7)


def test_files_of_one_name_in_two_directories_keep_distinct_ids(tmp_path):
    paths = []
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        paths.append(write(tmp_path / directory / "chat.jsonl", talk(2)))
    prepared = prepare(paths, TOKENIZER, Data())
    assert [s.id for each in prepared for s in each.samples] == [f"{path}:1" for path in paths]
    assert [each.report.name for each in prepared] == paths


def test_the_same_rows_give_the_same_samples_from_any_kind_of_source(tmp_path):
    rows = [talk(2), row("42", "77", "2", "7"), talk(5)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    splits = {
        "train": datasets.Dataset.from_list(rows),
        "test": datasets.Dataset.from_list(rows[:2]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "a")
    found = prepare(
        [f"{tmp_path}/a{end}" for end in (".jsonl", ".json", ".parquet", ":train", ":test")],
        TOKENIZER,
        Data(),
    )
    *same, shorter = found
    assert len({each.digest for each in same}) == 1 < len({each.digest for each in found})
    assert [each.name for each in found[-2:]] == [f"{tmp_path}/a:train", f"{tmp_path}/a:test"]
    assert [(s.tokens.tolist(), s.weights.tolist()) for s in shorter.samples] == [
        (s.tokens.tolist(), s.weights.tolist()) for s in same[0].samples[:2]
    ]


# ---------------------------------------------------------------- faults


BAD = ("{]", {"text": "another format"}, row("refuse", "me"))
REFUSING = byte_tokenizer(
    "{% if 'refuse' in messages[0]['content'] %}{{ raise_exception('I refuse') }}{% endif %}"
    + chat.DEEPSEEK_V3
)


def test_every_fault_names_file_and_line_and_ends_the_run(tmp_path):
    for bad, said in zip(
        BAD, ("not JSON", "format text where the rows before are messages", "I refuse"), strict=True
    ):
        path = write(tmp_path / "a.jsonl", talk(2), bad, talk(3))
        with pytest.raises(RowError, match=rf"^{path}, line 2: .*{said}"):
            prepare([path], REFUSING, Data())


def test_skipped_rows_are_counted_and_listed_and_the_others_are_all_there(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(2), BAD[0], talk(3), BAD[1], BAD[2], talk(4))
    options = Data(on_error="skip", truncation="raise", seq_len=10)
    for _ in range(2):  # from the cache too
        [prepared] = prepare([path], REFUSING, options)
        assert [s.id for s in prepared.samples] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:6"]
        assert (prepared.report.rows, prepared.report.counts["skipped"]) == (6, 3)
        assert [fault.split(":")[0] for fault in prepared.report.faults] == [
            f"{path}, line {n}" for n in (2, 4, 5)
        ]
    os.rename(path, tmp_path / "b.jsonl")
    [moved] = prepare([str(tmp_path / "b.jsonl")], REFUSING, options)
    assert moved.samples[0].id == "b.jsonl:1"
    assert moved.report.faults[0].startswith(f"{tmp_path}/b.jsonl, line 2: not JSON")
    # what was skipped then is raised now
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: not JSON"):
        prepare([str(tmp_path / "b.jsonl")], REFUSING, Data(truncation="raise", seq_len=10))


def test_a_row_that_is_bad_for_its_length_does_not_spoil_its_neighbours(tmp_path):
    prepared = one(
        write(tmp_path / "a.jsonl", talk(2), talk(50), talk(3)),
        seq_len=16,
        truncation="raise",
        on_error="skip",
    )
    assert [s.id for s in prepared.samples] == ["a.jsonl:1", "a.jsonl:3"]
    assert "line 2: 56 tokens" in prepared.report.faults[0]


def test_no_more_than_a_hundred_faults_are_listed_but_all_are_counted(tmp_path):
    report = one(write(tmp_path / "a.jsonl", talk(2), *["{]"] * 250), on_error="skip").report
    assert (report.counts["skipped"], len(report.faults), report.rows) == (250, 100, 251)


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_cached(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", talk(2))
    encode = ChatTokenizer.encode

    def change(chat_tokenizer, examples):
        write(Path(path), talk(2), talk(3))
        return encode(chat_tokenizer, examples)

    monkeypatch.setattr(ChatTokenizer, "encode", change)
    with pytest.raises(InputError, match=r"a\.jsonl changed while it was read"):
        one(path)
    monkeypatch.undo()
    assert len(one(path, cache=str(tmp_path / "cache")).samples) == 2


# ---------------------------------------------------------------- the cache


def test_a_second_start_reads_and_tokenises_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", talk(2), talk(3))
    first = one(path)
    monkeypatch.setattr(ChatTokenizer, "__init__", None)
    monkeypatch.setattr(module.Source, "rows", None)
    monkeypatch.setattr(module.Source, "fingerprint", None)
    second = one(path)
    assert shown(second.samples) == shown(first.samples)
    assert (second.report, second.digest) == (first.report, first.digest)


def keys(tmp_path):
    return {path.parent.name for path in (tmp_path / "cache").glob("*/meta.json")}


def test_whatever_decides_the_samples_decides_the_key(tmp_path):
    path = write(tmp_path / "a.jsonl", row("42", "77", "42", "777"))
    changes = [
        {"seq_len": 100},
        {"mask": "last-turn"},
        {"reasoning": "mask"},
        {"truncation": "right"},
        {"template_kwargs": '{"eos_token": "<pad>"}'},  # a variable that the template reads
        {"on_lost_context": "keep"},
    ]
    one(path)
    found = keys(tmp_path)
    for change in changes:
        one(path, **change)
        assert len(keys(tmp_path)) == len(found) + 1, change
        found = keys(tmp_path)
    special = byte_tokenizer(chat.DEEPSEEK_V3)
    special.bos_token = "<pad>"
    words = byte_tokenizer(chat.DEEPSEEK_V3)
    words.add_tokens(["42"])
    for tokenizer in (
        byte_tokenizer(chat.CHATML),
        byte_tokenizer(chat.DEEPSEEK_V3, add_bos=True),
        special,
        words,
    ):
        prepare([path], tokenizer, Data())
        assert len(keys(tmp_path)) == len(found) + 1
        found = keys(tmp_path)
    write(Path(path), row("42", "77", "42", "778"))
    one(path)
    assert len(keys(tmp_path)) == len(found) + 1


def test_whatever_does_not_decide_the_samples_does_not_decide_the_key(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(2))
    one(path)
    os.utime(path, ns=(1, 1))
    one(path)
    one(path, on_error="skip", packing="none", packing_buffer=7, balance="attention", workers=3)
    os.rename(path, tmp_path / "b.jsonl")
    one(f"{tmp_path}/b.jsonl:3.0")
    used = byte_tokenizer(chat.DEEPSEEK_V3)
    used(["a", "b c d"], padding=True, truncation=True, max_length=3)
    prepare([f"{tmp_path}/b.jsonl"], used, Data())
    assert len(keys(tmp_path)) == 1


def test_data_cache_names_another_directory(tmp_path):
    one(write(tmp_path / "a.jsonl", talk(2)), cache=str(tmp_path / "elsewhere"))
    assert not keys(tmp_path)
    assert len(list((tmp_path / "elsewhere").glob("*/meta.json"))) == 1


# ---------------------------------------------------------------- further processes


def mixed_rows(n):
    """Some are bad, some are cut, some have no target in their first piece."""
    return [
        "{]" if i % 9 == 4 else row("4" * i, "7", "2", "7" * 9) if i % 5 == 3 else talk(1 + i % 29)
        for i in range(n)
    ]


def test_further_processes_give_the_same(tmp_path, many_processes):
    path = write(tmp_path / "a.jsonl", *mixed_rows(61))
    options = dict(seq_len=20, truncation="split", on_error="skip")
    there = one(path, **options, cache=str(tmp_path / "there"))
    pool.FEW_CHUNKS = 10**6
    here = one(path, **options, cache=str(tmp_path / "here"))
    assert shown(here.samples) == shown(there.samples)
    assert (here.report, here.digest) == (there.report, there.digest)
    assert here.report.counts["skipped"] > 4


def test_further_processes_are_used_and_end(tmp_path, many_processes, monkeypatch):
    started, Popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **o: started.append(Popen(*a, **o)) or started[-1]
    )
    one(write(tmp_path / "a.jsonl", *[talk(3)] * 40))
    assert len(started) == 2
    assert all(child.poll() is not None for child in started)


def test_a_fault_in_another_process_names_the_first_bad_line(tmp_path, many_processes):
    path = write(tmp_path / "a.jsonl", *[talk(3)] * 30, "{]", *[talk(3)] * 9, BAD[1])
    with pytest.raises(RowError, match=r"a\.jsonl, line 31: not JSON"):
        one(path)


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit", "import os, sys; sys.stdin.buffer.read(1000); os.kill(os.getpid(), 9)"],
)
def test_a_killed_process_is_one_sentence(tmp_path, many_processes, monkeypatch, code):
    monkeypatch.setattr(pool, "WORKER", [sys.executable, "-c", code])
    with pytest.raises(InputError, match=r"^a process that tokenises a\.jsonl ended"):
        one(write(tmp_path / "a.jsonl", *[talk(3)] * 40))
    assert not keys(tmp_path)


BUILD = """
import os, sys
from torchsft.data import pool, prepare as module
from tests.data.test_prepare import TOKENIZER
from torchsft.config import Data
pool.FEW_CHUNKS, module.CHUNK_ROWS = 1, 4
os.sched_getaffinity = lambda pid: {0, 1}
tokenise = module.tokenise
def dies(preparer, chunks):
    for i, block in enumerate(tokenise(preparer, chunks)):
        yield block
        if i == 5:
            os.kill(os.getpid(), 9)
module.tokenise = dies
pool.WORKER[2] = f"import os; print(os.getpid(), file=open({sys.argv[1]!r}, 'a'), flush=True); " + pool.WORKER[2]
module.prepare(sys.argv[2:], TOKENIZER, Data())
"""


def test_a_builder_that_is_killed_leaves_no_process_and_the_next_one_builds(tmp_path):
    path, pids = write(tmp_path / "a.jsonl", *[talk(3)] * 60), tmp_path / "pids"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    died = subprocess.run([sys.executable, "-c", BUILD, pids, path], env=environment)
    assert died.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob("*.partial"))) == 1
    left = [int(pid) for pid in pids.read_text().split()]
    assert len(left) == 2
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in left):
        assert time.monotonic() < deadline, "a process outlives the one that started it"
        time.sleep(0.1)
    assert [s.id for s in one(path).samples] == [f"a.jsonl:{n}" for n in range(1, 61)]


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """In one process; what a source keeps is its own matter."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    line = json.dumps(row("42" * 100, "7" * 500)).encode()

    def peak(rows):
        monkeypatch.setattr(
            module.Source,
            "rows",
            lambda source, start: ((n, line + b" ") for n in range(1, rows + 1)),
        )
        path = write(tmp_path / f"{rows}.jsonl", talk(rows))
        tracemalloc.start()
        assert len(one(path).samples) == rows
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(200)  # what is kept for good: skeletons, modules
    few, many = peak(200), peak(800)
    # The lines of 600 rows more are 500 kB, their tokens 1.7 MB, as arrays.
    assert many < few + 200_000, f"{few} bytes at most for 200 rows, {many} for 800"


# ---------------------------------------------------------------- evaluation sets, streams, the bar


def test_evaluation_sets_have_names_and_several_sources(tmp_path):
    a, b, c = (
        write(tmp_path / name, talk(n))
        for n, name in enumerate(("a.jsonl", "b.jsonl", "a=b.jsonl"), start=1)
    )
    sets = prepare_eval([f"test={a}", b, f"test={b}", c], TOKENIZER, Data())
    assert {name: [each.name for each in found] for name, found in sets.items()} == {
        "test": ["a.jsonl", "b.jsonl"],
        "b": ["b.jsonl"],
        "a=b": ["a=b.jsonl"],
    }
    with pytest.raises(
        InputError,
        match=r"a\.jsonl:2\.0 has weight 2, but every row is evaluated "
        r"once",
    ):
        prepare_eval([f"test={a}:2.0"], TOKENIZER, Data())
    with pytest.raises(InputError, match="does not exist"):
        prepare_eval([f"test={tmp_path}/none.jsonl"], TOKENIZER, Data())


@pytest.mark.parametrize("start", [0, 1, 5, 60])
def test_a_stream_gives_what_the_cache_gives_from_any_row_on(tmp_path, monkeypatch, start):
    monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    path = write(tmp_path / "a.jsonl", *mixed_rows(61))
    options = Data(seq_len=20, truncation="split", on_error="skip")
    [prepared] = prepare([path], TOKENIZER, options)
    [stream] = open_streams([f"{path}:0.5"], TOKENIZER, options)
    assert (stream.name, stream.weight) == ("a.jsonl", 0.5)
    with (
        pytest.warns(UserWarning, match=r"^skipped: .*line \d+: not JSON")
        if start < 58
        else nothing()
    ):
        found = list(stream.open(start))
    expected = [
        s for s, n in zip(prepared.samples, prepared.samples.rows, strict=True) if n > start
    ]
    assert shown(sample for _, _, sample in found) == shown(expected)
    assert [f"a.jsonl:{number}" + f"/{part}" * (part > 0) for number, part, _ in found] == [
        s.id for s in expected
    ]
    if start == 0:
        assert stream.report == prepared.report


def test_a_stream_that_continues_behind_the_first_row_knows_the_format(tmp_path):
    path = write(tmp_path / "a.jsonl", "{]", talk(2), BAD[1], talk(3))
    [stream] = open_streams([path], TOKENIZER, Data(streaming=True))
    with pytest.raises(RowError, match=r"line 3: format text where the rows before are messages"):
        list(stream.open(2))


def test_a_stream_raises_what_it_does_not_skip(tmp_path):
    [stream] = open_streams([write(tmp_path / "a.jsonl", talk(2), "{]")], TOKENIZER, Data())
    with pytest.raises(RowError, match=r"a\.jsonl, line 2: not JSON"):
        list(stream.open(0))


def test_a_preparer_tells_what_became_of_each_row(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(2), "{]", talk(50), row("4" * 20, "7"))
    [source] = open_sources([path])
    results = Preparer(TOKENIZER, Data(seq_len=16, truncation="right"), source)(list(source.rows()))
    assert [(r.number, len(r.samples), r.notes, r.fault and r.fault.reason) for r in results] == [
        (1, 1, (), None),
        (2, 0, (), "not-json"),
        (3, 1, ("truncated",), None),
        (4, 0, ("truncated", "no-targets"), None),
    ]


def test_progress_is_shown_on_a_terminal_only_when_asked_for(tmp_path, capfd, monkeypatch):
    path = write(tmp_path / "a.jsonl", talk(2))
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)

    def shown_by(progress):
        prepare(
            [path],
            TOKENIZER,
            Data(cache=str(tmp_path / str(time.monotonic_ns()))),
            progress=progress,
        )
        return capfd.readouterr().err

    assert shown_by(True) == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert shown_by(False) == ""
    assert "tokenising a.jsonl: 100%" in shown_by(True)
    prepare([path], TOKENIZER, Data())
    capfd.readouterr()
    prepare([path], TOKENIZER, Data(), progress=True)
    assert capfd.readouterr().err == ""  # opened


# ---------------------------------------------------------------- GSM8K


@needs_gsm8k
@pytest.mark.parametrize("template", [chat.DEEPSEEK_V3, chat.CHATML, chat.LLAMA3_GENERATION])
def test_gsm8k_trains_every_answer_with_its_end_and_nothing_else(tmp_path, template):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:60]]
    path = write(
        tmp_path / "train.jsonl", *[row(each["question"], each["answer"]) for each in rows]
    )
    tokenizer = byte_tokenizer(template)
    [prepared] = prepare([path], tokenizer, Data(seq_len=4096), vocab_size=len(tokenizer))
    assert len(prepared.samples) == len(rows)
    for each, sample in zip(rows, prepared.samples, strict=True):
        [(prompt, answer)] = answer_prompts(sample)
        messages = [{"role": "user", "content": each["question"]}]
        assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        target = tokenizer.decode(answer)
        assert target.startswith(each["answer"])
        assert target.removeprefix(each["answer"]) in ("<eos>", "<|im_end|>", "<|eot_id|>")


@needs_gsm8k
def test_gsm8k_fills_rows_of_4096_tokens_to_99_percent():
    """All 7,473 rows; about four characters a token, as large vocabularies have it."""
    lengths = []
    for line in GSM8K.read_text().splitlines():
        each = json.loads(line)
        lengths.append(6 + (len(each["question"]) + len(each["answer"])) // 4)
    rows = pack(lengths, np.random.default_rng(0).permutation(len(lengths)), 4096)
    assert sum(lengths) / (len(rows) * 4096) >= 0.99
