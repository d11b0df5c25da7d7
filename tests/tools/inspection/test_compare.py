"""Our mask beside dumps made by hand, whose differences are known, and beside TRL's own."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data import chat
from tests.tools.inspection.samples import sample, source
from tools.inspection import compare, gather, others, terminal
from tools.inspection.reading import Reader
from torchsft.config import Data, InputError
from torchsft.data.tokenizer import load_tokenizer

TOKENIZER = chat.byte_tokenizer(chat.QWEN3)
READER = Reader(TOKENIZER)
START = "<|im_start|>assistant\n"
ASKED = "<|im_start|>user\nhello<|im_end|>\n" + START


def document(*pieces, **about):
    made = sample(TOKENIZER, *pieces)
    return others.Document("row 1", made.tokens.astype(np.int64), made.weights > 0, **about)


def beside(sources, documents, reader=READER):
    return compare.compare(others.Other("x", documents), sources, reader)


def compared(ours, theirs):
    """Of one sample and one document, both as pieces."""
    return beside([source(sample(TOKENIZER, *ours))], [document(*theirs)])


def tally(ours, theirs):
    [pair] = compared(ours, theirs).pairs
    return dict(pair.tally())


ANSWER = ("you and me<|im_end|>", 1.0)
OURS = [ASKED, ANSWER, "\n"]
DIFFERENT = {  # what the other tool trains: reason, side and tokens
    "equal": ([ASKED, ANSWER, "\n"], {}),
    "no end": ([ASKED, ("you and me", 1.0), "<|im_end|>\n"], {("end-of-turn", "ours"): 1}),
    "newline": ([ASKED, ("you and me<|im_end|>\n", 1.0)], {("newline-behind-end", "theirs"): 1}),
    "header": ([ASKED[: -len(START)], (START, 1.0), ANSWER, "\n"], {("header", "theirs"): 3}),
    "everything": ([(ASKED + ANSWER[0] + "\n", 1.0)], {("everything-trained", "theirs"): 9}),
    "context": (
        [("<|im_start|>user\nhello<|im_end|>\n", 1.0), START, ANSWER, "\n"],
        {("context", "theirs"): 3, ("header", "theirs"): 3},
    ),
    "bos": (["<bos>", ASKED, ANSWER, "\n"], {("bos", "theirs"): 1}),
    "eos": ([ASKED, ANSWER, "\n", ("<eos>", 1.0)], {("eos", "theirs"): 1}),
    "no newline": ([ASKED, ANSWER], {("eos", "ours"): 1}),
    "cut": ([ASKED, ("you", 1.0)], {("truncated", "ours"): 6}),
    "no answer": (
        [ASKED, "you and me<|im_end|>", "\n"],
        {("answer", "ours"): 3, ("end-of-turn", "ours"): 1},
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_reasons_of_known_differences(name):
    theirs, wanted = DIFFERENT[name]
    found = tally(OURS, theirs)
    assert found.keys() == wanted.keys()
    # whose tokens depend on the merges
    if name not in ("everything", "header", "context", "cut", "no answer"):
        assert found == wanted
    ours_only = sum(n for (_, who), n in found.items() if who == "ours")
    assert ours_only == compared(OURS, theirs).trained()["ours only"] + (
        name in ("no newline", "cut")
    )


def test_reasoning_tools_and_other_words():
    thinks = "<think>\nto say\n</think>\n\n"
    found = tally([ASKED, (thinks + ANSWER[0], 1.0)], [ASKED, thinks, ANSWER])
    assert found.keys() == {("reasoning", "ours")}
    assert tally([ASKED, (thinks + ANSWER[0], 1.0)], [ASKED, ANSWER]).keys() == {
        ("reasoning", "ours")
    }
    tokenizer = chat.byte_tokenizer(chat.LLAMA31)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    called = [head.format("assistant"), ('{"name": "f"}<|eot_id|>', 1.0), head.format("ipython")]
    ours = sample(tokenizer, *called, '"the"', "<|eot_id|>")
    made = sample(tokenizer, *called, ('"the"', 1.0), "<|eot_id|>")
    theirs = others.Document("row 1", made.tokens.astype(np.int64), made.weights > 0)
    [pair] = beside([source(ours)], [theirs], Reader(tokenizer)).pairs
    # the quote is the template's
    assert pair.tally() == {("tool-result", "theirs"): 2, ("header", "theirs"): 1}
    found = tally(OURS, [ASKED, ("you or me<|im_end|>", 1.0), "\n"])
    assert {reason for reason, _ in found} == {"other-tokens"} and {who for _, who in found} == {
        "ours",
        "theirs",
    }


def test_what_both_train_is_counted_by_tokens():
    found = compared(OURS, [ASKED, ("you and me", 1.0), "<|im_end|>\n"])
    n = len(sample(TOKENIZER, "you and me").tokens)
    assert found.trained() == {"both": n, "ours only": 1, "theirs only": 0}
    assert found.samples() == {"equal": 0, "different": 1, "only ours": 0, "only theirs": 0}
    [note] = found.findings()
    assert (
        note.level == "note"
        and note.text == "tokens, end-of-turn: 1 only ours"
        and note.sample == "chat.jsonl:1"
    )


def test_documents_find_their_samples():
    """In another order, one with other tokens, one missing on either side, two alike; and packed in
    one row.
    """
    words = [
        "the answer is hello",
        "and you and me",
        "to say hello hello",
        "is is is the answer",
        "the the the you",
    ]
    pieces = [[ASKED, (f"{word}<|im_end|>", 1.0), "\n"] for word in words]
    ours = source(*(sample(TOKENIZER, *p) for p in [*pieces, pieces[0]]))
    extra = document("<|im_start|>user\nme me me me me<|im_end|>\n", START, ANSWER)
    theirs = [
        document("<bos>", *pieces[2]),
        document(*pieces[1]),
        document(*pieces[0]),
        document(*pieces[0]),
        extra,
    ]
    found = beside([ours], theirs)
    found_by = {pair.ours.id: pair.theirs for pair in found.pairs if pair.ours is not None}
    assert (
        found_by["chat.jsonl:2"] is not None
        and found_by["chat.jsonl:3"].tokens[0] == TOKENIZER.bos_token_id
    )
    assert found_by["chat.jsonl:1"] is not None and found_by["chat.jsonl:6"] is not None
    assert found.samples() == {"equal": 3, "different": 1, "only ours": 2, "only theirs": 1}
    whole = document(*pieces[3], *pieces[1], *pieces[4])
    packed = beside([ours], [whole])
    assert packed.samples() == {"equal": 3, "different": 0, "only ours": 3, "only theirs": 0}


def test_parts_of_a_split_row_are_no_missing_rows():
    found = beside([source(sample(TOKENIZER, *OURS))], [document(*OURS, row=("chat.jsonl", 9))])
    assert found.samples() == {"equal": 0, "different": 0, "only ours": 1, "only theirs": 1}
    assert (
        "it has no such row" in found.pairs[0].missing
        and "no sample of ours" in found.pairs[1].missing
    )


def test_the_printed_view_marks_both_sides():
    found = compared(OURS, ["<bos>", ASKED, ("you and me", 1.0), "<|im_end|>", ("\n", 1.0)])
    plain = "\n".join(terminal.pair_lines(found.pairs[0], "x", READER, terminal.Pen(False)))
    assert "{-<bos>}" in plain and "⟦you and me⟧⟦+<|im_end|>⟧⟦-" in plain
    assert (
        "only ours end-of-turn: 1 token at" in plain
        and "only theirs newline-behind-end: 1 token" in plain
    )
    colour = "\n".join(terminal.pair_lines(found.pairs[0], "x", READER, terminal.Pen(True)))
    assert (
        f"\x1b[{terminal.STYLES['ours']}m<|im_end|>\x1b[0m" in colour
        and "⟦" not in colour.split("\n", 1)[1]
    )
    overview = "\n".join(terminal.comparison_lines(found, terminal.Pen(False)))
    assert "0 equal, 1 different, 0 only ours, 0 only theirs" in overview
    assert "end-of-turn, only ours: 1 sample, 1 token: End of turn" in overview


# ---------------------------------------------------------------- dumps


ROWS = [
    {
        "input_ids": [5, 6, 7, 8, 0, 0],
        "labels": [-100, -100, 7, 8, -100, -100],
        "attention_mask": [1, 1, 1, 1, 0, 0],
    },
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 7, 8, -100]},  # shifted
    {"input_ids": [[5, 6, 7, 8]], "completion_mask": [[0, 0, 1, 1]]},
    {
        "input_ids": [5, 6, 7, 8, 9, 9],
        "assistant_masks": [0, 0, 1, 1, 0, 1],
        "position_ids": [0, 1, 2, 3, 0, 1],
    },
    {
        "input_ids": [5, 6, 7, 8, 9, 9],
        "labels": [-100, -100, 7, 8, -100, 9],
        "attention_mask": [1, 1, 1, 1, 2, 2],
    },
    {"input_ids": [5, 6, 7, 8, 9, 9], "labels": [-100, -100, 7, 8, -100, 9], "seq_lengths": [4, 2]},
    {
        "input_ids": [5, 6, 7, 8, 9, 9],
        "labels": [-100, -100, 7, 8, -100, 9],
        "cu_seqlens": [0, 4, 6],
    },
]


@pytest.mark.parametrize("row", ROWS)
def test_a_dump_says_what_is_trained_in_many_ways(tmp_path, row):
    file = tmp_path / "dump.jsonl"
    file.write_text(json.dumps(row) + "\n")
    first, *more = others.read_dump(str(file))
    assert (first.tokens.tolist(), first.trained.tolist()) == (
        [5, 6, 7, 8],
        [False, False, True, True],
    )
    packed = np.size(row["input_ids"]) == 6 and row["input_ids"][-1] == 9
    assert [each.tokens.tolist() for each in more] == [[9, 9]] * packed
    assert [each.trained.tolist() for each in more] == [[False, True]] * packed


def test_kinds_of_files(tmp_path):
    import datasets

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    with (
        pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as out,
        pyarrow.ipc.new_file(out, table.schema) as writer,
    ):
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "saved", arrow, tmp_path / "b.arrow"):
        found = others.read_dump(str(path))
        assert [each.tokens.tolist() for each in found] == [[5, 6, 7], [8]]
        assert found[0].trained.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "a"}, "line 1: no input_ids (keys: text)"),
        ({"input_ids": [5, 6], "labels": [5]}, "2 input_ids, but 1 labels"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 9, 9]}, "label 9 of token 2 is neither"),
        ({"input_ids": [[5], [6, 7]]}, "input_ids is no list of numbers"),
        ({"input_ids": "5 6"}, "input_ids is no list of numbers"),
    ],
)
def test_bad_dumps_are_one_sentence(tmp_path, row, sentence):
    file = tmp_path / "dump.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as error:
        others.read_dump(str(file))
    assert (
        sentence in str(error.value)
        and str(file) in str(error.value)
        and "\n" not in str(error.value)
    )


def test_files_that_are_no_dump(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.arrow").write_text("no")
    for name, sentence in (
        ("empty.jsonl", "holds no rows"),
        ("bad.arrow", "Arrow file"),
        ("none.arrow", "none"),
        ("none", "none"),
    ):
        with pytest.raises(InputError, match=sentence):
            others.read_dump(str(tmp_path / name))


# ---------------------------------------------------------------- TRL


def test_trls_own_mask_of_the_same_rows(tmp_path):
    """With a template whose blocks hold the newline behind the end of turn, which TRL trains and a
    server never writes.
    """
    pytest.importorskip("trl", reason="TRL is not installed, and its own code is run here")
    turns = [
        ("user", "hello"),
        ("assistant", "you and me"),
        ("user", "and"),
        ("assistant", "the answer"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    weighed = [
        {**message, "weight": 0} if i == 1 else message for i, message in enumerate(messages)
    ]
    rows = [
        {"messages": messages},
        {"messages": weighed},
        {"messages": [messages[0], {**messages[1], "content": "you " * 99}]},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat.byte_tokenizer(chat.CHATML_GENERATION_WITH_NEWLINE).save_pretrained(tmp_path / "model")
    data = Data(train=(str(file),), seq_len=64, cache=str(tmp_path / "cache"))
    tokenizer = load_tokenizer(tmp_path / "model")
    sources, _ = gather.gather(tokenizer, data)
    theirs = others.run_trl(sources, str(tmp_path / "model"), data)
    assert theirs.name.startswith("TRL 1.") and theirs.refused == {} and len(theirs.documents) == 3
    found = compare.compare(theirs, sources, Reader(tokenizer))
    # the third is too long for us
    assert found.samples() == {"equal": 0, "different": 2, "only ours": 0, "only theirs": 1}
    assert dict(found.pairs[0].tally()) == {("newline-behind-end", "theirs"): 2}
    answer = len(tokenizer("you and me").input_ids)
    wanted = Counter(
        {
            ("answer", "theirs"): answer,
            ("end-of-turn", "theirs"): 1,
            ("newline-behind-end", "theirs"): 2,
        }
    )
    assert found.pairs[1].tally() == wanted
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    chat.byte_tokenizer(tools + chat.CHATML_GENERATION).save_pretrained(tmp_path / "tools")
    used = [
        {"messages": messages},
        {"messages": messages[:2], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in used))
    sources, _ = gather.gather(load_tokenizer(tmp_path / "tools"), data)
    found = compare.compare(
        others.run_trl(sources, str(tmp_path / "tools"), data), sources, Reader(tokenizer)
    )
    # a row with tools has them
    assert found.samples() == {"equal": 2, "different": 0, "only ours": 0, "only theirs": 0}
    chat.byte_tokenizer(chat.CHATML).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="TRL cannot mask this chat template"):
        others.run_trl(sources, str(tmp_path / "plain"), data)
