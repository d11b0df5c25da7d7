"""Each finding on samples written by hand, with faults put in one by one; good samples have
none.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.data import chat
from tests.tools.inspection.samples import sample, source
from tools.inspection.lint import Finding, Linter, beyond_positions, runs_of
from tools.inspection.reading import Reader
from torchsft.data.template import Sample

CHATML = chat.byte_tokenizer(chat.CHATML)
START = "<|im_start|>assistant\n"
ASKED = "<|im_start|>user\nyou and me<|im_end|>\n"
GOOD = {  # template: pieces of a sample whose mask is right
    "CHATML": [ASKED, START, ("hello you<|im_end|>", 1.0), "\n"],
    "LLAMA3": [
        "<bos><|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("the answer<|eot_id|>", 1.0),
    ],
    "DEEPSEEK_V3": [
        "<bos>system<|User|>hello<|Assistant|>",
        ("the answer<eos>", 1.0),
        "<|User|>and<|Assistant|>",
        ("you<eos>", 0.5),
    ],
    "DEEPSEEK_R1": [
        "<bos><|User|>hello<|Assistant|><think>\n",
        ("to say hello</think>the answer<eos>", 1.0),
    ],
    "QWEN3": [ASKED, START, ("<think>\nto say\n</think>\n\nhello you<|im_end|>", 1.0), "\n"],
    "MISTRAL": ["<bos>[INST] hello [/INST]", (" you and me <eos>", 1.0)],
}


def linter(tokenizer=CHATML, mask="assistant", seq_len=512, vocab_size=None):
    return Linter(Reader(tokenizer), mask=mask, seq_len=seq_len, vocab_size=vocab_size)


def reasons(*pieces, tokenizer=CHATML, kind="messages", **options):
    return [
        f.reason
        for f in linter(tokenizer, **options).check(
            [sample(tokenizer, *pieces)], "chat.jsonl", kind
        )
    ]


@pytest.mark.parametrize("name", GOOD)
def test_a_right_mask_has_no_findings(name):
    assert reasons(*GOOD[name], tokenizer=chat.byte_tokenizer(getattr(chat, name))) == []


@pytest.mark.parametrize("name", GOOD)
def test_an_end_of_turn_that_is_not_trained(name):
    tokenizer = chat.byte_tokenizer(getattr(chat, name))
    good = sample(tokenizer, *GOOD[name])
    for _, end in runs_of(good.weights):
        weights = good.weights.copy()
        weights[end - 1] = 0
        [found] = linter(tokenizer).check(
            [Sample("chat.jsonl:1", good.tokens, weights)], "chat.jsonl"
        )
        assert (found.reason, found.level) == ("no-end-of-turn", "error")


# which has no generation prompt
@pytest.mark.parametrize("name", [name for name in GOOD if name != "MISTRAL"])
def test_a_mask_that_begins_any_number_of_tokens_too_early(name):
    """Down to the last line end of the header, and up to all of it."""
    tokenizer = chat.byte_tokenizer(getattr(chat, name))
    reader = Reader(tokenizer)
    good = sample(tokenizer, *GOOD[name])
    header = len(tokenizer(reader.prompt, add_special_tokens=False).input_ids)
    assert header
    for early in range(1, header + 1):
        weights = good.weights.copy()
        begin = runs_of(weights)[-1][0]
        weights[begin - early : begin] = 1
        found = linter(tokenizer).check(
            [Sample("chat.jsonl:1", good.tokens, weights)], "chat.jsonl"
        )
        assert "header-in-targets" in [finding.reason for finding in found], early


def test_headers_of_other_roles_in_the_targets():
    for role in ("system", "user", "assistant"):
        said = (f"hello you<|im_end|>\n<|im_start|>{role}\nthe answer<|im_end|>", 1.0)
        assert reasons(ASKED, START, said) == ["header-in-targets"]
    # the words alone are no header
    assert reasons(ASKED, START, ("hello user you<|im_end|>", 1.0)) == []


def test_everything_is_trained_on_purpose():
    everything = [(ASKED + START + "hello you<|im_end|>\n", 1.0)]
    assert reasons(*everything, mask="all") == []
    assert reasons("x", ("hello you", 1.0), mask="all") == ["no-end-of-turn"]


def test_plain_text_and_given_tokens_are_judged_by_what_they_are():
    assert reasons("hello ", ("you and me<eos>", 1.0), kind="text") == []
    assert reasons("hello ", ("you and me", 1.0), kind="text") == ["no-end-of-turn"]
    # weights of single tokens within an answer
    given = [ASKED, START, ("hello ", 1.0), "and ", ("you<|im_end|>", 1.0)]
    assert reasons(*given, kind="tokens") == []
    assert "no-end-of-turn" in reasons(*given, kind="messages")
    assert reasons(ASKED, (START + "hello you<|im_end|>", 1.0), kind="tokens") == [
        "header-in-targets"
    ]


def test_an_answer_that_is_cut_is_a_warning():
    pieces = [ASKED, START, ("hello you and me", 1.0)]
    n = len(sample(CHATML, *pieces).tokens)
    assert reasons(*pieces, seq_len=n) == ["cut-off"]
    assert reasons(*pieces, seq_len=n + 1) == ["no-end-of-turn"]


def test_the_line_end_behind_the_end_of_turn():
    assert reasons(ASKED, START, ("hello you<|im_end|>\n", 1.0)) == ["after-end-of-turn"]


def test_two_bos_tokens():
    tokenizer = chat.byte_tokenizer(chat.LLAMA3)
    assert reasons("<bos>", *GOOD["LLAMA3"], tokenizer=tokenizer) == ["double-bos"]


def test_ids_and_the_vocabulary():
    largest = int(sample(CHATML, *GOOD["CHATML"]).tokens.max())
    assert reasons(*GOOD["CHATML"], vocab_size=largest) == ["unknown-token"]
    assert reasons(*GOOD["CHATML"], vocab_size=largest + 1) == []


def test_nothing_trained():
    assert reasons(ASKED, START, "hello<|im_end|>") == ["no-targets"]
    assert reasons(ASKED, START, ("hello you<|im_end|>", -1.0)) == ["negative-weight", "no-targets"]
    assert Finding("negative-weight", "a", "a:1", "").level == "error"  # training refuses it


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(weight):
    good = sample(CHATML, *GOOD["CHATML"])
    good.weights[0] = weight
    [found] = [f for f in linter().check([good], "chat.jsonl") if f.reason == "non-finite-weight"]
    assert found.level == "warning" and "token 0" in found.text


def test_an_end_of_turn_within_an_answer():
    assert reasons(ASKED, START, ("hello<|im_end|>\nyou<|im_end|>", 1.0), "\n") == [
        "special-token-in-content"
    ]
    assert reasons(ASKED, START, ("hello<eos> you<|im_end|>", 1.0), "\n") == [
        "special-token-in-content"
    ]
    two = [ASKED, START, ("hello<|im_end|>", 1.0), "\n", ASKED, START, ("you<|im_end|>", 1.0), "\n"]
    assert reasons(*two) == []
    given = ("hello<|im_end|> you<|im_end|>", 1.0)
    assert reasons(given, kind="tokens") == [] and reasons(given, mask="all") == []


@pytest.mark.parametrize("opening", ["<think>", "</think>"])
def test_answers_behind_a_question_without_an_end_token(opening):
    tokenizer = chat.byte_tokenizer(chat.DEEPSEEK_V31)
    lint = Linter(
        Reader(tokenizer, {"thinking": opening == "<think>"}),
        mask="assistant",
        seq_len=512,
        vocab_size=None,
    )

    def found(*pieces):
        return [f.reason for f in lint.check([sample(tokenizer, *pieces)], "chat.jsonl")]

    asked = "<bos><|User|>hello"
    assert found(asked + "<|Assistant|>" + opening, ("you and me<eos>", 1.0)) == []
    assert found(asked + "<|Assistant|>", (opening + "the answer<eos>", 1.0)) == [
        "header-in-targets"
    ]
    assert found(asked, ("<|Assistant|>" + opening + "the answer is<eos>", 1.0)) == [
        "header-in-targets"
    ]
    assert found(asked + "<|Assistant|>" + opening, ("you<|Assistant|>me<eos>", 1.0)) == [
        "header-in-targets"
    ]


@pytest.mark.parametrize("answer", ["", " ", ".", "?!", "\n\n", "y"])
def test_answers_of_hardly_any_text(answer):
    assert reasons(ASKED, START, (f"{answer}<|im_end|>", 1.0)) == ["near-empty"]
    assert reasons(ASKED, START, ("no<|im_end|>", 1.0)) == []


def test_duplicates_name_the_first_and_know_training_from_evaluation():
    one, other = (
        sample(CHATML, *GOOD["CHATML"]),
        sample(CHATML, ASKED, START, ("the answer is<|im_end|>", 1.0)),
    )
    check = linter()
    ids = iter(range(1, 100))

    def again(original, **about):
        copy = Sample(f"chat.jsonl:{next(ids)}", original.tokens, original.weights)
        return check.check([copy], "chat.jsonl", "messages", **about)

    assert again(one) == [] and again(other) == []
    assert again(one) == [
        Finding(
            "duplicate", "chat.jsonl", "chat.jsonl:3", "the same tokens and weights as chat.jsonl:1"
        )
    ]
    [held] = again(other, evaluation=True)
    assert (
        held.reason == "in-training-data"
        and held.level == "warning"
        and "chat.jsonl:2" in held.text
    )
    half = Sample("x", one.tokens, one.weights / 2)
    assert again(half) == []  # other weights, other training


OPENED = (  # in the style of GLM: a turn ends with the token that opens the next one
    "{% for m in messages %}{{ ('<|User|>' if m['role'] == 'user' else '<|Assistant|>') + '\n' + "
    "m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>\n' }}{% endif %}"
)


def test_the_token_that_opens_the_next_turn_may_be_trained_as_the_end():
    tokenizer = chat.byte_tokenizer(OPENED)
    user = tokenizer.convert_tokens_to_ids("<|User|>")

    def found(*pieces, eos_ids=(user,)):
        lint = Linter(
            Reader(tokenizer), mask="assistant", seq_len=512, vocab_size=None, eos_ids=eos_ids
        )
        return [
            f.reason for f in lint.check([sample(tokenizer, *pieces)], "chat.jsonl", "messages")
        ]

    asked = "<|User|>\nhello<|Assistant|>\n"
    right = [
        asked,
        ("you and me<|User|>", 1.0),
        "\nand<|Assistant|>\n",
        ("the answer<|User|>", 1.0),
    ]
    assert found(*right) == []
    assert found(*right, eos_ids=()) == ["header-in-targets"]  # the model never stops there
    # not the last one of its run
    assert found(asked, ("you<|User|>\nhello<|User|>", 1.0)) == ["header-in-targets"]
    assert "header-in-targets" in found(asked, ("you<|User|>\n", 1.0))
    assert found(asked, ("you and me", 1.0)) == ["no-end-of-turn"]


def test_an_end_of_turn_that_is_not_marked_special():
    tokenizer = chat.byte_tokenizer(chat.CHATML.replace("<|im_end|>", "</turn>"))
    tokenizer.add_tokens(["</turn>", "</call>"])
    asked = ASKED.replace("<|im_end|>", "</turn>")
    assert reasons(asked, START, ("hello you</turn>", 1.0), "\n", tokenizer=tokenizer) == []
    assert reasons(asked, START, ("hello you</turn>\n", 1.0), tokenizer=tokenizer) == [
        "after-end-of-turn"
    ]
    assert reasons(asked, START, ("hello you", 1.0), "</turn>\n", tokenizer=tokenizer) == [
        "no-end-of-turn"
    ]
    assert reasons(
        asked + START[:-10], ("assistant\nhello you</turn>", 1.0), tokenizer=tokenizer
    ) == ["header-in-targets"]
    # one that the template does not write: it may end a turn, but not before the one that does
    assert reasons(asked, START, ("hello you</call>", 1.0), tokenizer=tokenizer) == []
    assert reasons(asked, START, ("hello you</call>", 1.0), "\n</turn>", tokenizer=tokenizer) == [
        "no-end-of-turn"
    ]
    assert reasons("x", ("hello you</call>", 1.0), tokenizer=tokenizer, kind="text") == []


def test_samples_beyond_the_positions_come_longest_first():
    samples = [sample(CHATML, "z" * n) for n in (5, 9, 8, 12)]
    found = beyond_positions(source(*samples).samples, "chat.jsonl", 8)
    assert [finding.sample for finding in found] == ["chat.jsonl:4", "chat.jsonl:2"]
    said = (
        "12 tokens, but max_position_embeddings of the model is 8 (2 such samples, the longest of "
        "12 tokens)"
    )
    assert (found[0].text, found[0].level) == (said, "warning")
    assert beyond_positions(source(*samples).samples, "chat.jsonl", 12) == []


def test_runs_of_weights():
    assert runs_of(np.array([0, 1, 1, 0, 0.5, 2], np.float32)) == [(1, 3), (4, 6)]
    assert runs_of(np.zeros(3, np.float32)) == [] and runs_of(np.ones(2, np.float32)) == [(0, 2)]
