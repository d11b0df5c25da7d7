"""Numbers of sources and plans against counts by hand, and the printed view."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tests.data import chat
from tests.tools.inspection.samples import sample, source
from tools.inspection import lint, report, terminal
from tools.inspection.lint import Finding, Linter
from tools.inspection.reading import Reader
from torchsft.config import Data, InputError

TOKENIZER = chat.byte_tokenizer(chat.CHATML)
READER = Reader(TOKENIZER)
ASKED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def of_length(n):
    """n tokens, the last two of them trained."""
    end = TOKENIZER("<|im_end|>", add_special_tokens=False).input_ids[0]
    made = sample(TOKENIZER, "z" * (n - 1))
    assert len(made.tokens) == n - 1  # one for each letter
    return type(made)("", [*made.tokens, end], [0.0] * (n - 2) + [1.0, 1.0])


def inspection(*sources, seq_len=64, findings=(), **training):
    options = {"global_batch_size": 2, "seed": 0, "steps": None, "epochs": None} | training
    data = Data(seq_len=seq_len)
    found = report.lint(
        Linter(READER, mask="assistant", seq_len=seq_len, vocab_size=None), sources, iter
    )
    plan = report.plan([s for s in sources if not s.evaluation], data, **options)
    return report.Inspection(
        "/model", data, options, READER, list(sources), [*findings, *found], plan
    )


def test_numbers_of_a_source():
    one = source(of_length(10), of_length(12), of_length(33))
    inspection(one)
    assert (one.tokens, one.supervised_tokens, one.longest) == (55, 6, 33)
    edges, counts = one.histogram
    assert sum(counts) == 3 and all(
        counts[np.searchsorted(edges, n, side="right") - 1] for n in (10, 12, 33)
    )


@pytest.mark.parametrize("longest", [1, 39, 40, 41, 1000, 4096])
def test_a_histogram_holds_every_length_in_at_most_so_many_bins(longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 500)
    lengths[0] = longest
    edges, counts = report.histogram(lengths)
    assert len(counts) <= report.BINS and len(edges) == len(counts) + 1
    assert counts == [((lengths >= a) & (lengths < b)).sum() for a, b in itertools.pairwise(edges)]
    assert sum(counts) == 500


def test_rows_and_steps_are_those_of_the_packing():
    """Lengths that fill rows of 64 exactly: 40 + 24, four times; and a source of weight 2."""
    plan = inspection(source(*[of_length(40)] * 4, *[of_length(24)] * 4)).plan
    assert sorted(len(row) for row in plan.rows) == [2, 2, 2, 2] and plan.fill(64) == 1.0
    assert (plan.steps, plan.epochs) == (2, 1)  # of 2 rows
    twice = inspection(source(of_length(64)), source(of_length(64), name="b", weight=2.0), epochs=3)
    assert sorted(key for row in twice.plan.rows for key in row) == [(0, 0), (1, 0), (1, 0)]
    assert (twice.plan.steps, twice.plan.epochs) == (6, 3)  # three rows an epoch: two steps
    half = inspection(source(*[of_length(64)] * 8), epochs=1.5)  # four steps, two steps
    assert half.plan.steps == 6 and half.plan_text() == "6 steps of 2 rows, 1.5 epochs"
    steps = inspection(source(of_length(64), of_length(64)), steps=5, global_batch_size=1).plan
    assert (steps.steps, steps.epochs) == (5, 2.5)
    assert inspection(source(of_length(64), evaluation=True)).plan.rows == []


def test_numbers_of_one_are_singular():
    found = inspection(source(of_length(9)), source(of_length(9), name="b", weight=2.0))
    printed = "\n".join(terminal.overview(found, terminal.Pen(False)))
    assert "  1 row, 1 sample, 9 tokens" in printed
    assert "1 time through chat.jsonl" in printed and "2 times through b" in printed


def test_json_holds_every_sample(tmp_path):
    text = sample(TOKENIZER, ASKED, ("the answer 🙂<|im_end|>", 0.5), "\n")
    report.write_json(
        tmp_path / "samples.jsonl",
        inspection(source(text, of_length(9)), source(of_length(8), name="b")),
    )
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["id"], line["source"]) for line in lines] == [
        ("chat.jsonl:1", "chat.jsonl"),
        ("chat.jsonl:2", "chat.jsonl"),
        ("b:1", "b"),
    ]
    assert set(lines[0]) == {"id", "source", "tokens", "weights", "text", "ignored"}
    assert (
        lines[0]["tokens"] == text.tokens.tolist() and lines[0]["weights"] == text.weights.tolist()
    )
    assert lines[0]["text"] == ASKED + "the answer 🙂<|im_end|>\n"


def test_stretches_of_weights():
    found = report.weight_runs(np.array([0, 1, 1, 0.1, 0, 2], np.float32))
    assert found == [[1, 3, 1.0], [3, 4, 0.1], [5, 6, 2.0]]


def test_what_is_printed_cannot_steer_the_terminal():
    hostile = "\x1b[2J\x1b]0;title\x07\u202e\x9b1m\r"
    said = sample(TOKENIZER, ASKED, (f"{hostile}hello<|im_end|>", 1.0))
    name = f"a{hostile}.jsonl"
    found = inspection(
        source(said, name=name),
        findings=[Finding("not-json", name, f"{hostile}line 1", f"said {hostile}")],
    )
    pen = terminal.Pen(False)
    lines = [
        *terminal.overview(found, pen),
        *terminal.sample_lines(found.sources[0].samples[0], READER, found.findings, pen),
    ]
    printed = "\n".join(lines)
    assert (
        not set(printed) & set("\x1b\x07\x9b\r\u202e")
        and "<U+001B>[2J" in printed
        and "<U+202E>" in printed
    )


def test_trained_tokens_are_coloured_or_in_brackets():
    said = sample(TOKENIZER, ASKED, ("hello\nyou<|im_end|>", 1.0), "\n")
    plain = "\n".join(terminal.sample_lines(said, READER, [], terminal.Pen(False)))
    assert "⟦hello\n           you<|im_end|>⟧" in plain and plain.count("⟦") == 1
    colour = "\n".join(terminal.sample_lines(said, READER, [], terminal.Pen(True)))
    on, off = f"\x1b[{terminal.STYLES['trained']}m", "\x1b[0m"
    assert f"{on}hello{off}\n           {on}you<|im_end|>{off}" in colour and colour.count(on) == 2
    half = sample(TOKENIZER, ASKED, ("hello<|im_end|>", 0.5))
    assert "⟦\u00d70.5 hello<|im_end|>⟧" in "\n".join(
        terminal.sample_lines(half, READER, [], terminal.Pen(False))
    )


def test_samples_are_chosen_by_id_or_number_with_findings_first():
    good = [
        sample(TOKENIZER, ASKED, (f"{word} you<|im_end|>", 1.0))
        for word in ("hello", "the", "answer")
    ]
    bad = sample(TOKENIZER, ASKED, (".<|im_end|>", 1.0))
    found = inspection(source(*good, bad))

    def ids(*wanted):
        return [chosen.id for _, chosen in terminal.choose(found, wanted)]

    assert ids("2") == ["chat.jsonl:4", "chat.jsonl:1"] and ids("0") == [] and len(ids("100")) == 4
    assert ids("chat.jsonl:3", "1") == ["chat.jsonl:3", "chat.jsonl:4"]
    with pytest.raises(
        InputError,
        match=r"no sample chat.jsonl:9; ids are of the kind "
        r"chat.jsonl:1",
    ):
        ids("chat.jsonl:9")


def test_findings_are_counted_and_only_the_first_are_printed():
    many = inspection(source(*[sample(TOKENIZER, ASKED, (f"hello {i}", 1.0)) for i in range(9)]))
    printed = "\n".join(terminal.overview(many, terminal.Pen(False)))
    assert (
        "error         9  no-end-of-turn: End of turn not trained" in printed
        and "and 6 more" in printed
    )
    assert "9 errors, 0 warnings" in printed and many.level("error") == 9


def test_notes_are_told_last_and_are_no_findings(monkeypatch):
    monkeypatch.setattr(lint, "NOTES", {"known-thing"})
    good, bad = (
        sample(TOKENIZER, ASKED, ("hello you<|im_end|>", 1.0)),
        sample(TOKENIZER, ASKED, (".<|im_end|>", 1.0)),
    )
    told = Finding("known-thing", "chat.jsonl", "chat.jsonl:1", "two users in a row")
    found = inspection(source(good), findings=[told])
    printed = list(terminal.overview(found, terminal.Pen(False)))
    assert "note          1  known-thing: Known thing" in printed and printed[-1] == "no findings"
    assert (found.level("error"), found.level("warning"), found.level("note")) == (0, 0, 1)
    both = inspection(source(good, bad), findings=[told])
    assert [level for level, *_ in both.tally()] == ["warning", "note"]
    assert list(terminal.overview(both, terminal.Pen(False)))[-1] == "0 errors, 1 warning"
    # a note is nothing to look at first
    assert [chosen.id for _, chosen in terminal.choose(both, ["1"])] == ["chat.jsonl:2"]
    shown = "\n".join(terminal.sample_lines(good, READER, [told], terminal.Pen(True)))
    assert "\x1b[34;1mnote\x1b[0m known-thing: two users in a row" in shown
