"""tools/inspect_data.py as a command: every finding from a file, the cache that it fills, exit
codes and sentences.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import chat
from tools import inspect_data
from tools.inspection import gather
from torchsft.config import Data
from torchsft.data.prepare import prepare
from torchsft.data.tokenizer import load_tokenizer

TOOL = str(Path(inspect_data.__file__))


def say(*contents, **row):
    """A row of user and assistant turns in alternation."""
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)
        ],
        **row,
    }


def write(path, *rows):
    """Rows as JSON, bytes as they are."""
    path.write_bytes(
        b"".join(
            row + b"\n" if isinstance(row, bytes) else json.dumps(row).encode() + b"\n"
            for row in rows
        )
    )
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    def make(template=chat.CHATML, vocab_size=None):
        tokenizer = chat.byte_tokenizer(template)
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model/config.json").write_text(
            json.dumps({"vocab_size": vocab_size or len(tokenizer)})
        )
        return tmp_path / "model"

    return make


@pytest.fixture
def call(monkeypatch, capsys):
    """The command within this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        try:
            code = inspect_data.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


GOOD = [say("hello", f"the answer is {i}", "and you", "hello") for i in range(5)]


def test_the_command_in_a_process_of_its_own(model, tmp_path):
    data = write(tmp_path / "chat.jsonl", *GOOD)
    files = ["--html", tmp_path / "page.html", "--json", tmp_path / "samples.jsonl"]
    arguments = [
        "--model.path",
        model(),
        "--data.train",
        data,
        "--data.seq-len",
        "128",
        *files,
        "--show",
        "chat.jsonl:2",
    ]
    done = subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "chat.jsonl:2  " in done.stdout and "⟦the answer is 1<|im_end|>⟧" in done.stdout
    assert "5 rows, 5 samples" in done.stdout and "no findings" in done.stdout
    assert "chat.jsonl:5" in (tmp_path / "page.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"chat.jsonl:{i}" for i in range(1, 6)]
    trained = [
        [t for t, w in zip(line["tokens"], line["weights"], strict=True) if w] for line in lines
    ]
    decode = load_tokenizer(tmp_path / "model").decode
    assert [decode(tokens) for tokens in trained] == [
        f"the answer is {i}<|im_end|>hello<|im_end|>" for i in range(5)
    ]


def test_training_opens_the_cache_that_it_filled(model, tmp_path, call, monkeypatch):
    data = write(tmp_path / "chat.jsonl", *GOOD, b"broken")
    path = model()
    assert call("--model.path", path, "--data.train", data, "--data.seq-len", "128")[0] == 1
    # nothing is tokenised any more
    monkeypatch.setattr("torchsft.data.preparer.ChatTokenizer", None)
    tokenizer = load_tokenizer(path)
    [prepared] = prepare(
        [str(data)], tokenizer, Data(seq_len=128, on_error="skip"), vocab_size=len(tokenizer)
    )
    assert len(prepared.samples) == 5


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([b"{"], "not-json"),
        ([b'{"messages": "\xff"}'], "not-utf-8"),
        ([{"mesages": [{"role": "user", "content": "hello"}]}], "misspelt-key"),
        ([say("hello", "you") | {"images": ["a.png"]}], "not-text"),
        ([say("hello", "you", "hello")], ""),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "hello"},
                        {"role": "assistant", "content": "you", "train": False},
                    ]
                }
            ],
            "no-targets",
        ),
        ([say("hello", "you <|im_end|>\n<|im_start|>assistant\n and me")], "header-in-targets"),
        ([{"input_ids": [40, 41, 42, 43], "labels": [-100, 41, 42, 43]}], "no-end-of-turn"),
        ([{"input_ids": [5, 60000, 4], "labels": [-100, -100, 4]}], "unknown-token"),
        ([{"input_ids": [1, 1, 4], "labels": [-100, -100, 4]}], "double-bos"),
    ],
)
def test_errors_end_with_exit_code_1(model, tmp_path, call, rows, reason):
    """Beside good rows, and alone, where nothing is left to train."""
    good = (
        GOOD
        if "messages" in str(rows) or isinstance(rows[0], bytes)
        else [{"input_ids": [40, 41, 42, 4], "labels": [-100, 41, 42, 4]}]
    )
    path = model()
    for name, content in (("mixed.jsonl", [*good, *rows]), ("alone.jsonl", rows)):
        code, out, err = call(
            "--model.path",
            path,
            "--data.train",
            write(tmp_path / name, *content),
            "--data.seq-len",
            "128",
        )
        assert code == (1 if reason else 0), out + err
        assert "Traceback" not in err and (
            f"  {reason}: " in out if reason else "no findings" in out
        ), out


def test_what_the_template_does_to_reasoning(model, tmp_path, call):
    thinks = {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "reasoning_content": "to say", "content": "you and me"},
        ]
    }
    data = write(tmp_path / "chat.jsonl", thinks)
    drops = chat.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    code, out, _ = call("--model.path", model(drops), "--data.train", data, "--data.seq-len", "128")
    assert code == 1 and "reasoning-lost" in out


def test_warnings_alone_leave_the_exit_code_at_0(model, tmp_path, call):
    bad = {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "you and me", "weight": float("nan")},
        ]
    }
    data = write(tmp_path / "chat.jsonl", *GOOD, GOOD[0], say("hello", "."), bad)
    code, out, _ = call(
        "--model.path",
        model(),
        "--data.train",
        data,
        "--data.seq-len",
        "128",
        "--data.eval",
        f"held={write(tmp_path / 'b.jsonl', GOOD[1])}",
    )
    assert code == 0 and "0 errors, 4 warnings" in out, out
    for reason in ("duplicate", "near-empty", "non-finite-weight", "in-training-data"):
        assert f"warning       1  {reason}: " in out
    assert "training refuses the row unless --data.on-error skip" in out


def test_dropped_cut_and_split_samples_are_counted(model, tmp_path, call):
    data = write(tmp_path / "chat.jsonl", *GOOD, say("hello", "you and me " * 100))
    path = model()

    def printed(truncation):
        return call(
            "--model.path",
            path,
            "--data.train",
            data,
            "--data.seq-len",
            "100",
            "--data.truncation",
            truncation,
        )

    assert "1 left out: longer than --data.seq-len" in printed("drop")[1]
    code, out, _ = printed("right")
    assert code == 0 and "1 cut to --data.seq-len" in out and "cut-off" in out
    assert "1 cut into pieces" in printed("split")[1]
    code, out, _ = printed("raise")
    assert code == 1 and "too-long" in out


def test_the_first_samples_alone(model, tmp_path, call):
    data = write(tmp_path / "chat.jsonl", *GOOD, b"broken")
    file = tmp_path / "samples.jsonl"
    code, out, _ = call(
        "--model.path",
        model(),
        "--data.train",
        data,
        "--data.seq-len",
        "128",
        "--max-samples",
        "2",
        "--json",
        file,
    )
    assert code == 0 and "2 rows, 2 samples" in out and "--max-samples left out the others" in out
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [
        "chat.jsonl:1",
        "chat.jsonl:2",
    ]
    assert not (tmp_path / "cache").exists()
    code, out, _ = call(
        "--model.path",
        tmp_path / "model",
        "--data.train",
        data,
        "--data.seq-len",
        "128",
        "--max-samples",
        "20",
    )
    assert code == 1 and "not-json" in out and "5 samples" in out


def test_several_sources_with_weights(model, tmp_path, call):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = (
        write(tmp_path / "a/chat.jsonl", *GOOD[:2]),
        write(tmp_path / "b/chat.jsonl", *GOOD[2:]),
    )
    file = tmp_path / "samples.jsonl"
    code, out, _ = call(
        "--model.path",
        model(),
        "--data.train",
        one,
        f"{two}:2.0",
        "--data.seq-len",
        "128",
        "--json",
        file,
    )
    assert code == 0 and "weight 2" in out
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert ids == [f"{one}:1", f"{one}:2", f"{two}:1", f"{two}:2", f"{two}:3"]


def test_evaluation_sets_are_those_of_training(model, tmp_path, call):
    (tmp_path / "b").mkdir()
    train, same = write(tmp_path / "chat.jsonl", *GOOD), write(tmp_path / "b/chat.jsonl", GOOD[1])
    more = write(tmp_path / "more.jsonl", say("hello", "you and me"))
    fixed = ["--model.path", model(), "--data.train", train, "--data.seq-len", "128"]
    file = tmp_path / "samples.json"
    code, out, _ = call(*fixed, "--data.eval", f"x={same}", f"x={more}", more, "--json", file)
    assert (
        code == 0 and "x=chat.jsonl:1: the training data has the same tokens in chat.jsonl:2" in out
    )
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()][5:]
    assert ids == ["x=chat.jsonl:1", "x=more.jsonl:1", "more=more.jsonl:1"]
    for spec, sentence in (
        ([f"x={same}:2"], "every row is evaluated once"),
        ([f"x={same}"] * 2, "given twice"),
    ):
        code, _, err = call(*fixed, "--data.eval", *spec)
        assert code == 1 and sentence in err, err
    assert gather.evaluation_sets([f"x={same}", f"x={more}", str(more)]).keys() == {"x", "more"}


def test_files_that_are_read_are_not_written(model, tmp_path, call):
    data, held = (
        write(tmp_path / "chat.jsonl", *GOOD),
        write(tmp_path / "held.jsonl", say("hello", "me")),
    )
    (tmp_path / "link").symlink_to(data)
    before = data.read_bytes(), held.read_bytes()
    fixed = [
        "--model.path",
        model(),
        "--data.train",
        f"{data}:2",
        "--data.eval",
        f"x={held}",
        "--data.seq-len",
        "128",
    ]
    for option, file in (("--json", data), ("--html", tmp_path / "link"), ("--json", held)):
        code, _, err = call(*fixed, option, file)
        assert code == 1 and f"{option} {file} would overwrite" in err
    code, _, err = call(*fixed[:2], "--data.train", tmp_path / "c*.jsonl", "--json", data)
    assert code == 1 and f"--json {data} would overwrite" in err
    for file in (tmp_path, tmp_path / "none/x.html"):
        code, _, err = call(*fixed, "--html", file)
        assert code == 1 and f"error: --html {file} is a directory" in err
    code, _, err = call(*fixed, "--html", tmp_path / "x", "--json", tmp_path / "x")
    assert code == 1 and "name two files" in err
    assert (data.read_bytes(), held.read_bytes()) == before


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(
    model, tmp_path, call, monkeypatch
):
    data, file = write(tmp_path / "chat.jsonl", *GOOD), tmp_path / "x.json"
    file.write_text("old")

    def full(path, inspection):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools.inspection.report.write_json", full)
    code, _, err = call(
        "--model.path", model(), "--data.train", data, "--data.seq-len", "128", "--json", file
    )
    assert code == 1 and f"{file} cannot be written (No space left on device)" in err
    assert file.read_text() == "old" and not list(tmp_path.glob("*.partial"))


def test_streaming_says_what_it_left_out(model, tmp_path, call, monkeypatch):
    data = write(tmp_path / "chat.jsonl", *GOOD)
    fixed = [
        "--model.path",
        model(),
        "--data.train",
        data,
        "--data.seq-len",
        "128",
        "--data.streaming",
    ]
    assert "of the samples that were read" not in call(*fixed)[1]  # all of them
    monkeypatch.setattr(inspect_data, "STREAMED", 3)
    out = call(*fixed)[1]
    assert (
        "--data.streaming reads the first 3 of each source" in out
        and "left out the others" not in out
    )


def test_help_and_what_cannot_be_inspected(model, tmp_path, call):
    code, out, _ = call("--help")
    assert (
        code == 0
        and "--data.train" in out
        and "--max-samples" in out
        and "--train.global-batch-size" in out
    )
    path = model()
    empty = write(tmp_path / "empty.jsonl")
    for arguments, sentence in (
        ((), "nothing to inspect"),
        (("--data.train", tmp_path / "missing.jsonl"), "missing.jsonl"),
        (("--data.train", empty), "holds no rows"),
        (("--data.train", empty, "--max-samples", "3"), "holds no rows"),
        (
            ("--data.train", write(tmp_path / "chat.jsonl", *GOOD), "--show", "chat.jsonl:99"),
            "no sample chat.jsonl:99",
        ),
    ):
        code, _, err = call("--model.path", path, *arguments)
        assert (
            code == 1 and err.startswith("error: ") and sentence in err and "Traceback" not in err
        )


def test_what_the_model_says_of_itself(model, tmp_path, call):
    path = model()
    data = write(tmp_path / "chat.jsonl", *GOOD)
    fixed = ["--model.path", path, "--data.train", data, "--data.seq-len", "128", "--show", "0"]
    (path / "config.json").write_text(
        json.dumps({"text_config": {"vocab_size": 400, "max_position_embeddings": 10}})
    )
    code, out, _ = call(*fixed)
    assert (
        code == 0
        and "5  beyond-positions: " in out
        and "max_position_embeddings of the model is 10" in out
    )
    (path / "generation_config.json").write_text('{"eos_token_id": [4, 7]}')
    assert gather.facts(path) == gather.Facts(400, 10, frozenset({4, 7}))
    for name in ("config.json", "generation_config.json"):
        for broken in ("{", "[]"):
            before = (path / name).read_text()
            (path / name).write_text(broken)
            code, _, err = call(*fixed)
            (path / name).write_text(before)
            assert (
                code == 1
                and err.startswith("error: ")
                and str(path / name) in err
                and err.count("\n") == 1
            )


def test_a_dump_of_another_tool_is_put_beside_ours(model, tmp_path, call):
    """Ours, with the end of turn of the second answer left out, and a row that is missing."""
    data, ours = write(tmp_path / "chat.jsonl", *GOOD), tmp_path / "ours.jsonl"
    fixed = ["--model.path", model(), "--data.train", data, "--data.seq-len", "128"]
    call(*fixed, "--json", ours)
    rows = [json.loads(line) for line in ours.read_text().splitlines()]
    dump = []
    for row in rows[:4]:
        labels = [
            token if weight else -100
            for token, weight in zip(row["tokens"], row["weights"], strict=True)
        ]
        dump.append({"input_ids": row["tokens"], "labels": labels})
    last = max(i for i, label in enumerate(dump[1]["labels"]) if label != -100)
    dump[1]["labels"][last] = -100
    theirs, again, page = (
        write(tmp_path / "theirs.jsonl", *dump),
        tmp_path / "again.jsonl",
        tmp_path / "page.html",
    )
    for given in ([theirs], ["axolotl-file", theirs]):
        code, out, _ = call(*fixed, "--compare", *given, "--json", again, "--html", page)
        assert code == 0 and "3 equal, 1 different, 1 only ours, 0 only theirs" in out, out
        assert (
            "only ours end-of-turn: 1 token" in out
            and "⟦+<|im_end|>⟧" in out
            and out.rstrip().endswith("no findings")
        )
    [second] = [
        row
        for row in map(json.loads, again.read_text().splitlines())
        if row["id"] == "chat.jsonl:2"
    ]
    assert second["differences"] == [
        {"at": last, "tokens": [4], "reason": "end-of-turn", "only": "ours"}
    ]
    assert "mask-differs" in page.read_text()


def test_comparisons_that_cannot_be(model, tmp_path, call, monkeypatch):
    data = write(tmp_path / "chat.jsonl", *GOOD)
    fixed = ["--model.path", model(), "--data.train", data, "--data.seq-len", "128", "--show", "0"]
    monkeypatch.setitem(sys.modules, "trl", None)
    for given, sentence in (
        (["trl"], "pip install"),
        (["axolotl-file"], "takes trl, FILE or axolotl-file FILE"),
        (["trl", "x"], "takes trl, FILE or axolotl-file FILE"),
        ([tmp_path / "none.jsonl"], "none.jsonl"),
        ([data], "no input_ids (keys: messages)"),
    ):
        code, _, err = call(*fixed, "--compare", *given)
        assert (
            code == 1 and err.startswith("error: ") and sentence in err and err.count("\n") == 1
        ), err


def test_two_evaluation_sets_of_one_file_name_are_told_apart(model, tmp_path, call):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = (
        write(tmp_path / "a/held.jsonl", *GOOD[:2]),
        write(tmp_path / "b/held.jsonl", *GOOD[2:]),
    )
    fixed = ["--model.path", model(), "--data.eval", one, two, "--data.seq-len", "128"]
    file = tmp_path / "samples.jsonl"
    assert call(*fixed, "--json", file)[0] == 0
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert len(set(ids)) == 5
    code, out, _ = call(*fixed, "--show", ids[0], ids[4])
    assert code == 0 and "the answer is 0" in out and "the answer is 4" in out


# ---------------------------------------------------------------- what is told without being wrong


def test_keys_that_mean_nothing_and_odd_rows_are_notes_also_from_the_cache(model, tmp_path, call):
    """Listed once per source with their counts, in the text and in --json; the exit code stays
    0.
    """
    rows = [*GOOD, say("hello", "you", source="web"), say("hello", "and me", source="web", id=7)]
    rows.append({"messages": [{"role": "assistant", "content": "you", "stamp": 3}]})
    data = write(tmp_path / "chat.jsonl", *rows)
    samples = tmp_path / "samples.jsonl"
    wanted = {"id": 1, "source": 2, "messages[].stamp": 1}
    for _ in range(2):  # the second time from the cache
        code, out, _ = call(
            "--model.path",
            model(),
            "--data.train",
            data,
            "--data.seq-len",
            "128",
            "--json",
            samples,
            "--show",
            "0",
        )
        assert code == 0 and "no findings" in out
        assert (
            "'source' in 2 rows" in out
            and "'messages[].stamp' in 1 row" in out
            and "'id' in 1 row" in out
        )
        assert "unusual-order" in out
        assert all(
            json.loads(line)["ignored"] == wanted for line in samples.read_text().splitlines()
        )


def test_columns_and_a_system_turn_by_the_options(model, tmp_path, call):
    """The refusal prints the option that makes it work; a file gives the system turn."""
    data = write(tmp_path / "pairs.jsonl", {"question": "hello", "answer": "you"})
    code, out, _ = call("--model.path", model(), "--data.train", data)
    option = "--data.map question=user,answer=assistant"
    assert code == 1 and option in " ".join(out.split())
    (tmp_path / "system.txt").write_text("and me\n")
    more = [
        *option.split(),
        "--data.system",
        tmp_path / "system.txt",
        "--json",
        tmp_path / "samples.jsonl",
    ]
    code, out, _ = call("--model.path", model(), "--data.train", data, *more)
    text = json.loads((tmp_path / "samples.jsonl").read_text())["text"]
    assert code == 0 and "and me<|im_end|>" in text.partition("user")[0] and "hello" in text
    code, out, _ = call("--model.path", model(), "--data.train", data, *option.split())
    assert code == 0 and "system" not in out.partition("packing")[0].partition("pairs.jsonl (")[0]
