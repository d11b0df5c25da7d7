"""Rows as a server would give them to the model, against samples written by hand, and against those
of training.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data import chat
from tests.tools.inspection.samples import sample
from tools.inspection import gather, serving
from torchsft.config import Data
from torchsft.data.formats import Conversation, Text
from torchsft.data.template import Sample
from torchsft.data.tokenizer import load_tokenizer

ASKED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}},
}


def directory(path, template=chat.CHATML, **flags):
    """A model directory; `flags` of its tokenizer_config.json."""
    chat.byte_tokenizer(template).save_pretrained(path)
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | flags))
    return path


@pytest.fixture
def compare(tmp_path):
    """The sentence for an example and its only sample, which is given as pieces."""

    def run(example, *pieces, mask="assistant", **flags):
        server = serving.Server(str(directory(tmp_path, **flags)), Data(mask=mask))
        return server.compare(example, [sample(server.tokenizer, *pieces)])

    return run


HELLO = Conversation(
    "a:1", [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you and me"}]
)
ANSWER = ("you and me<|im_end|>", 1.0)


def test_a_prompt_that_training_writes_otherwise(compare):
    assert compare(HELLO, ASKED, ANSWER, "\n") == ""
    said = compare(HELLO, ASKED.replace("hello", "hello\n"), ANSWER, "\n")
    assert (
        said.startswith("the prompt of message 2 differs at token 4: training has '\\n<|im_end|>")
        and "serving has '<|im_end|>" in said
    )
    assert "differs at token 0: training has '<bos><|im_start|>" in compare(
        HELLO, "<bos>" + ASKED, ANSWER
    )
    # the header is trained
    assert "no trained text begins there" in compare(HELLO, ASKED[:-10], (ASKED[-10:], 1.0), ANSWER)
    # a mask that begins later is no other text
    assert compare(HELLO, ASKED, "you ", ("and me<|im_end|>", 1.0)) == ""


def test_each_trained_turn_is_compared(compare):
    two = Conversation(
        "a:1",
        [
            *HELLO.messages,
            {"role": "user", "content": "me"},
            {"role": "assistant", "content": "you"},
        ],
    )
    second = "\n<|im_start|>user\nme<|im_end|>\n<|im_start|>assistant\n"
    last = ("you<|im_end|>", 1.0)
    assert compare(two, ASKED, ANSWER, second, last) == ""
    assert "message 4 differs" in compare(two, ASKED, ANSWER, second.replace("me", "the"), last)
    assert compare(two, ASKED, "you and me<|im_end|>", second, last, mask="last-turn") == ""
    unlearned = Conversation("a:1", two.messages, weights=(None, 0.0, None, None))
    assert compare(unlearned, ASKED, "you and me<|im_end|>", second, last) == ""


def test_everything_is_compared_where_everything_is_trained(compare):
    assert compare(HELLO, (ASKED + "you and me<|im_end|>\n", 1.0), mask="all") == ""
    assert "the conversation differs" in compare(
        HELLO, (ASKED + "you or me<|im_end|>\n", 1.0), mask="all"
    )


@pytest.mark.parametrize("example", [Text("a:1", "", "hello you"), Text("a:1", "hello ", "you")])
def test_a_bos_that_only_tokenizer_config_json_asks_for(compare, example):
    """tokenizer.json has no post-processor for it, as DeepSeek-V3's; `AutoTokenizer` drops the
    flag.
    """
    pieces = [example.prompt, (example.completion + "<eos>", 1.0)]
    flags = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    assert compare(example, *pieces) == ""
    assert "serving has '<bos>hello" in compare(example, *pieces, **flags)
    assert compare(example, "<bos>", *pieces, **flags) == ""
    assert "training has '<bos>hello" in compare(example, "<bos>", *pieces)
    # which ends no prompt
    assert compare(example, "<bos>", *pieces, add_eos_token=True, **flags) == ""


def test_a_space_that_only_tokenizer_config_json_asks_for(tmp_path):
    path = directory(tmp_path, add_prefix_space=True)
    state = json.loads((path / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (path / "tokenizer.json").write_text(json.dumps(state))
    server = serving.Server(str(path), Data())
    example = Text("a:1", "", "hello")
    spaced, plain = (
        sample(server.tokenizer, " hello", "<eos>"),
        sample(server.tokenizer, "hello", "<eos>"),
    )
    assert server.compare(example, [spaced]) == "" and "serving has ' hello'" in server.compare(
        example, [plain]
    )


def test_tokens_that_are_given_are_not_compared(compare):
    assert compare(object(), "hello") == ""


CONVERSATIONS = [
    [
        ("user", "hello"),
        ("assistant", "the answer is"),
        ("user", "and\n\nme"),
        ("assistant", "\n\nyou"),
    ],
    [("system", "to say"), ("user", "hello"), ("assistant", " you ")],
    [
        ("user", "hello"),
        ("assistant", "<think>\nto say\n</think>\n\nyou"),
        ("user", "me"),
        ("assistant", "and"),
    ],
    [
        ("user", "hello"),
        ("assistant", "you", {"reasoning_content": "to say"}),
        ("user", "me"),
        ("assistant", "and"),
    ],
    [
        ("user", "hello"),
        ("assistant", None, {"tool_calls": [chat.call("add", {"x": 1})]}),
        ("tool", "4"),
        ("assistant", "you"),
    ],
]


@pytest.mark.parametrize(
    "name", ["CHATML", "LLAMA3", "QWEN3", "DEEPSEEK_V31", "LLAMA31", "CHANNELS", "MISTRAL", "PHI3"]
)
@pytest.mark.parametrize("how", [{}, {"reasoning": "mask"}, {"mask": "all"}])
def test_what_training_makes_is_what_serving_makes(tmp_path, name, how):
    """Of every conversation that the template can be trained on; split by turn and with reasoning
    closed, where it is so.
    """
    path = directory(tmp_path / "model", getattr(chat, name))
    rows = []
    for turns in CONVERSATIONS:
        messages = [
            {"role": role, "content": content, **dict(*more)} for role, content, *more in turns
        ]
        rows.append(
            {
                "messages": messages,
                "tools": [TOOL] if any("tool_calls" in m for m in messages) else [],
            }
        )
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=(str(file),), seq_len=512, cache=str(tmp_path / "cache"), **how)
    [source], _ = gather.gather(load_tokenizer(path), data)
    assert serving.Server(str(path), data).check(source) == []
    assert source.served == len(set(source.samples.rows.tolist())) >= 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_of_many_rows_some_all_over_the_source_are_compared(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(serving, "MOST_ROWS", 32)
    rows = [{"prompt": f"hello {i} ", "completion": "you"} for i in range(200)]
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        import pyarrow

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory(tmp_path / "model")
    data = Data(train=(str(file),), seq_len=64, cache=str(tmp_path / "cache"))
    [source], _ = gather.gather(load_tokenizer(path), data)
    numbers = [number for number, _ in serving.read_examples(source, serving.MOST_ROWS)]
    assert (
        len(numbers) == 32
        and numbers == sorted(set(numbers))
        and numbers[0] == 1
        and numbers[-1] == 200
    )
    assert all(
        example.prompt == f"hello {number - 1} "
        for number, example in serving.read_examples(source, 32)
    )
    server = serving.Server(str(path), data)
    assert server.check(source) == []


def test_cut_samples_are_left_out_and_others_are_not(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": "hello " * n, "completion": "you " * n}) + "\n" for n in (1, 60)
        )
    )
    path = directory(tmp_path / "model")
    data = Data(train=(str(file),), seq_len=32, truncation="left", cache=str(tmp_path / "cache"))
    [source], _ = gather.gather(load_tokenizer(path), data)
    assert source.counts == {"truncated": 1} and len(source.samples) == 2
    assert serving.Server(str(path), data).check(source) == [] and source.served == 1
    token = np.array([5])
    spoiled = [
        Sample(each.id, np.concatenate([token, each.tokens[1:]]), each.weights)
        for each in source.samples
    ]
    source.samples = type("Listed", (list,), {"rows": source.samples.rows})(spoiled)
    [found] = serving.Server(str(path), data).check(source)
    assert (found.reason, found.sample, found.level) == ("serving-differs", "a.jsonl:1", "error")
