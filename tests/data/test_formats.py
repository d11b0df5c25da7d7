"""What each format of row becomes, and the sentence for everything that is not one."""

import copy
import json
import math
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchsft.data.formats import Conversation, Text, Tokens, parse, recognise
from torchsft.data.rows import RowError, located, read_row
from torchsft.data.sources import Source
from torchsft.data.specs import parse_spec

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


def turns(*roles, content="x"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


def messages(*given):
    return {"messages": list(given)}


def read(row, where="f.jsonl, line 3"):
    with located(where):
        return parse(row, recognise(row), "f:3")


def call(name, arguments, number=None):
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return found if number is None else {"id": number, **found}


TWO_ROUNDS = messages(
    {"role": "system", "content": "You add."},
    {"role": "user", "content": "1+2, then +3", "name": "Ann"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "first 1+2",
        "tool_calls": [call("add", {"a": 1, "b": 2}, "c1")],
    },
    {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
    {
        "role": "assistant",
        "content": "Now 3.",
        "tool_calls": [call("show", {"text": "3"}, "c2"), call("add", {"a": 3}, "c3")],
    },
    {"role": "tool", "content": "ok", "tool_call_id": "c2"},
    {"role": "tool", "content": "6", "tool_call_id": "c3"},
    {"role": "assistant", "content": "It is 6."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "Welcome."},
)


def test_a_conversation_in_openais_shape_is_kept_as_it_is():
    example = read(TWO_ROUNDS | {"tools": TOOLS, "source": "web", "score": math.nan})
    assert example == Conversation("f:3", TWO_ROUNDS["messages"], TOOLS, ())


def test_two_tool_rounds_are_the_same_before_and_after_parquet(tmp_path):
    """Arrow gives every message the keys of all the others, and every call the arguments of all the
    others.
    """
    row = TWO_ROUNDS | {"tools": TOOLS}
    filled = turns("user", "assistant")["messages"]
    pq.write_table(pa.Table.from_pylist([row, {"messages": filled}]), tmp_path / "a.parquet")
    stored = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]["messages"]
    assert (
        stored[7]["tool_calls"] is None
        and stored[4]["tool_calls"][0]["function"]["arguments"]["a"] is None
    )
    back = [
        read(read_row(payload)[0])
        for _, payload in Source(parse_spec(str(tmp_path / "a.parquet"))).rows()
    ]
    assert (
        back[0].messages == read(row).messages
        and back[1].messages == filled
        and back[1].tools is None
    )
    assert back[0].tools == TOOLS


def test_messages_as_json_strings_are_the_same():
    packed = {"messages": json.dumps(TWO_ROUNDS["messages"]), "tools": json.dumps(TOOLS)}
    each = {
        "messages": [json.dumps(message) for message in TWO_ROUNDS["messages"]],
        "tools": [json.dumps(t) for t in TOOLS],
    }
    assert read(packed) == read(each) == read(TWO_ROUNDS | {"tools": TOOLS})


def test_a_message_is_reduced_to_one_normal_form():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    bare = {"name": "add", "arguments": '{"a": 1}'}
    example = read(
        messages(
            {"role": "developer", "content": parts, "weight": 0, "name": None},
            USER | {"reasoning_content": "", "tool_calls": [], "extra": 1, "train": False},
            {"role": "assistant", "thinking": "hm", "tool_calls": [bare], "tool_call_id": None},
            {"role": "tool", "content": "1"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "stop", "arguments": {}},
                "reasoning": "so",
            },
        )
    )
    assert example.messages == [
        {"role": "developer", "content": "ab"},
        USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [call("add", '{"a": 1}')],
        },
        {"role": "tool", "content": "1"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "so",
            "tool_calls": [call("stop", {})],
        },
    ]
    assert example.weights == (0.0, 0.0, None, None, None) and example.tools is None


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({}, None),
        ({"weight": None, "train": None}, None),
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"weight": 0.25}, 0.25),
        ({"weight": True}, 1.0),
        ({"train": True}, 1.0),
        ({"train": False}, 0.0),
        ({"train": 0}, 0.0),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"train": False, "weight": 0}, 0.0),
    ],
)
def test_weight_and_train_flags_of_a_message(flags, weight):
    second = {"role": "assistant", "content": "again", "weight": 2}
    assert read(messages(USER, ANSWER | flags, USER, second)).weights == (None, weight, None, 2.0)


def test_blank_tool_calls_in_a_row_are_empty_answers():
    blank = {"role": "tool_call", "content": " "}
    empty = {"role": "assistant", "content": ""}
    assert read(messages(USER, blank, blank, ANSWER)).messages == [USER, empty, empty, ANSWER]


def test_a_pair_of_the_history_may_be_json_in_a_string():
    row = {"instruction": "hi", "output": "yes", "history": ['["one", "two"]']}
    asked = {"role": "user", "content": "one"}
    answered = {"role": "assistant", "content": "two"}
    assert read(row).messages == [asked, answered, USER, ANSWER]


def test_sharegpt_turns_become_messages_with_system_and_tools():
    row = {
        "system": "be kind",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "1+2"},
            {
                "from": "function_call",
                "value": '{"name": "add", "arguments": {"a": 1}}',
                "weight": 0,
            },
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
            {"from": "user", "value": "two"},
            {
                "from": "function_call",
                "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
            },
            {"from": "function_response", "value": "4"},
            {"from": "tool", "value": "5"},
            {"from": "chatgpt", "value": "done", "train": True},
        ],
    }
    example = read(row)
    assert example.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": None, "tool_calls": [call("add", {"a": 1})]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": None, "tool_calls": [call("f", {}), call("g", {})]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "done"},
    ]
    assert example.tools == TOOLS
    assert example.weights == (None, None, 0.0, None, None, None, None, None, None, 1.0)
    plain = {
        "conversations": [
            {"from": "system", "value": "s"},
            USER,
            {"from": "model", "value": "yes"},
        ],
        "system": "",
    }
    assert read(plain).messages == [{"role": "system", "content": "s"}, USER, ANSWER]


def test_alpaca_rows_become_conversations():
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "s",
        "history": [["q", "a"]],
        "weight": 0.5,
    }
    example = read(row)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    # the row's, hence also of the answer in its history
    assert example.weights == (None, None, 0.5, None, 0.5)
    for empty in ({}, {"input": ""}, {"input": None}, {"system": None, "history": []}):
        assert read({"instruction": "hi", "output": "yes"} | empty) == Conversation(
            "f:3", [USER, ANSWER]
        )


def test_prompt_and_completion_as_strings_or_as_messages():
    assert read({"prompt": "a", "completion": "b"}) == Text("f:3", "a", "b", 1.0)
    assert read({"prompt": "", "completion": "b", "weight": 0.5}) == Text("f:3", "", "b", 0.5)
    assert read({"text": "whole"}) == Text("f:3", "", "whole", 1.0)
    example = read(
        {
            "prompt": [USER, ANSWER, USER],
            "completion": [ANSWER, USER, ANSWER | {"weight": 0.5}],
            "tools": TOOLS,
        }
    )
    assert example.messages == [USER, ANSWER] * 3 and example.tools == TOOLS
    assert example.weights == (0.0, 0.0, 0.0, None, None, 0.5)


def test_tokens_with_labels_or_weights():
    example = read(
        {
            "input_ids": [5, 6, 2**31 - 1],
            "labels": [-100, 6, 2**31 - 1],
            "attention_mask": [1, 1, 1],
        }
    )
    assert isinstance(example, Tokens) and example.id == "f:3"
    assert example.tokens.tolist() == [5, 6, 2**31 - 1] and example.weights.tolist() == [
        0.0,
        1.0,
        1.0,
    ]
    example = read(
        {"input_ids": np.array([5, 6]).tolist(), "loss_weights": [0, 0.5], "text": "beside"}
    )
    assert (example.tokens.dtype, example.weights.dtype) == (np.int32, np.float32)
    assert example.weights.tolist() == [0.0, 0.5]


FORMATS = {
    "messages": {"messages": [], "text": "t"},
    "sharegpt": {"conversations": [], "messages": None},
    "alpaca": {"instruction": "", "input": None, "output": ""},
    "prompt-completion": {"prompt": [], "completion": []},
    "text": {"text": "", "instruction": "no output"},
    "tokens": {"input_ids": [], "labels": [], "messages": []},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised_by_their_keys(name):
    assert recognise(FORMATS[name]) == name


def test_an_unknown_format_is_refused_with_the_keys_that_are_there():
    with pytest.raises(
        RowError,
        match=r"^: no format has the keys answer, question; give "
        r"messages",
    ) as error:
        recognise({"question": "a", "answer": "b", "messages": None})
    assert error.value.reason == "unknown-format"
    assert recognise({"input_ids": [1]}) == "tokens"


BAD = {
    "messages a number": (
        {"messages": 3},
        "bad-messages",
        ": messages must be a list, but it is a number",
    ),
    "messages not JSON": (
        {"messages": "hi"},
        "not-json",
        ": messages is a string that is not JSON",
    ),
    "no messages": ({"messages": []}, "no-messages", ": no assistant message"),
    "message null": (
        messages(None),
        "bad-message",
        ", message 1: message must be an object, but it is null",
    ),
    "no role": (
        messages({"content": "hi"}),
        "unknown-role",
        ", message 1: role is None, but must be one of system",
    ),
    "other role": (turns("narrator", "gpt"), "unknown-role", ", message 1: role is 'narrator'"),
    "role a list": (turns(["user"]), "unknown-role", "role is ['user']"),
    "no content": (
        messages({"role": "user"}, ANSWER),
        "bad-content",
        ", message 1: content must be a string, but it is null",
    ),
    "content a number": (
        turns("user", content=1.5),
        "bad-content",
        "content must be a string, but it is a number",
    ),
    "image": (
        turns("user", content=[{"type": "image_url", "image_url": "x"}]),
        "bad-content",
        "type 'image_url'",
    ),
    "part without text": (
        turns("user", content=[{"type": "text"}]),
        "bad-text-of-a-content-part",
        "but it is null",
    ),
    "name a number": (
        messages(USER | {"name": 3}),
        "bad-name",
        "name must be a string, but it is a number",
    ),
    "calls of a user": (
        messages(USER | {"tool_calls": [call("f", {})]}),
        "misplaced-tool_calls",
        "in a message of role user",
    ),
    "thoughts of a user": (
        messages(USER | {"thinking": "x"}),
        "misplaced-reasoning_content",
        "in a message of role user",
    ),
    "two thoughts": (
        messages(USER, ANSWER | {"thinking": "x", "reasoning": "y"}),
        "bad-reasoning",
        ", message 2: different",
    ),
    "thoughts a list": (
        messages(USER, ANSWER | {"thinking": ["x"]}),
        "bad-thinking",
        "must be a string, but it is a list",
    ),
    "call without name": (
        messages(USER, ANSWER | {"tool_calls": [{}]}),
        "bad-name-of-a-tool-call",
        "but it is null",
    ),
    "call a string": (
        messages(USER, ANSWER | {"tool_calls": ["f()"]}),
        "not-json",
        "tool call is a string that is not JSON",
    ),
    "arguments a list": (
        messages(USER, ANSWER | {"tool_calls": [call("f", [1])]}),
        "bad-arguments-of-a-tool-call",
        "but it is a list",
    ),
    "arguments cut": (
        messages(USER, ANSWER | {"tool_calls": [call("f", '{"a": ')]}),
        "not-json",
        "arguments of a tool call is a string",
    ),
    "arguments NaN": (
        messages(USER, ANSWER | {"tool_calls": [call("f", {"a": math.nan})]}),
        "not-json",
        "cannot be written",
    ),
    "tools text": (
        {**messages(USER, ANSWER), "tools": "add"},
        "not-json",
        "tools is a string that is not JSON",
    ),
    "tool a number": (
        {**messages(USER, ANSWER), "tools": [1]},
        "bad-tool",
        "tool must be an object, but it is a number",
    ),
    "tools infinite": (
        {**messages(USER, ANSWER), "tools": [{"a": math.inf}]},
        "not-json",
        "tools cannot be written as JSON",
    ),
    "weight NaN": (
        messages(USER, ANSWER | {"weight": math.nan}),
        "non-finite-weight",
        ", message 2: weight is nan",
    ),
    "weight infinite": (
        messages(USER, ANSWER | {"weight": math.inf}),
        "non-finite-weight",
        "weight is inf",
    ),
    "weight huge": (
        messages(USER, ANSWER | {"weight": 10**400}),
        "non-finite-weight",
        "but must be finite",
    ),
    "weight too large": (
        messages(USER, ANSWER | {"weight": 1e39}),
        "non-finite-weight",
        "weight is 1e+39",
    ),
    "weight negative": (
        messages(USER, ANSWER | {"weight": -1}),
        "negative-weight",
        "weight is -1, but must be finite and at least",
    ),
    "weight text": (
        messages(USER, ANSWER | {"weight": "1"}),
        "bad-weight",
        "weight is '1'; give a number",
    ),
    "train text": (messages(USER, ANSWER | {"train": "no"}), "bad-weight", "train is 'no'; give"),
    "train 2": (messages(USER, ANSWER | {"train": 2}), "bad-weight", "train is 2"),
    "contradiction": (
        messages(USER, ANSWER | {"train": False, "weight": 0.5}),
        "bad-weight",
        "weight is 0.5, train is False",
    ),
    "contradiction 0": (
        messages(USER, ANSWER | {"train": True, "weight": 0}),
        "bad-weight",
        "weight is 0, train is True",
    ),
    "no answer": (turns("system", "user"), "no-assistant", ": no assistant message"),
    "turn a string": ({"conversations": ["hi"]}, "not-json", ", turn 1: message is a string"),
    "turn of a cat": (
        {"conversations": [{"from": "cat", "value": "x"}]},
        "unknown-role",
        ", turn 1: role is 'cat'",
    ),
    "turn of a list": (
        {"conversations": [{"from": [], "value": "x"}]},
        "unknown-role",
        ", turn 1: role is []",
    ),
    "turn without value": (
        {"conversations": [{"from": "human"}]},
        "bad-content",
        "must be a string, but it is null",
    ),
    "two systems in sharegpt": (
        {"conversations": [{"from": "system", "value": "x"}], "system": "y"},
        "bad-system",
        "says something else",
    ),
    "instruction": (
        {"instruction": 1, "output": "x"},
        "bad-instruction",
        "instruction must be a string, but it is a number",
    ),
    "output": (
        {"instruction": "x", "output": 1},
        "bad-content",
        ", message 2: content must be a string",
    ),
    "history": (
        {"instruction": "x", "output": "y", "history": [["a"]]},
        "bad-history",
        "has 1 texts",
    ),
    "prompt": (
        {"prompt": ["x"], "completion": "y"},
        "bad-prompt",
        "prompt must be a string, but it is a list",
    ),
    "completion": (
        {"prompt": "x", "completion": ["y"]},
        "bad-completion",
        "completion must be a string, but it is a list",
    ),
    "no completion": (
        {"prompt": [USER, ANSWER], "completion": [USER]},
        "no-assistant",
        ": no assistant message",
    ),
    "text": ({"text": 1}, "bad-text", ": text must be a string, but it is a number"),
    "weight of a text": ({"text": "x", "weight": math.nan}, "non-finite-weight", "weight is nan"),
    "both": (
        {"input_ids": [1], "labels": [1], "loss_weights": [1]},
        "bad-labels",
        "with labels and loss_weights",
    ),
    "no ids": ({"input_ids": [], "labels": []}, "bad-tokens", "at least one whole number"),
    "ids floats": ({"input_ids": [1.0], "labels": [1]}, "bad-tokens", "at least one whole number"),
    "ids text": ({"input_ids": ["1"], "labels": [1]}, "bad-tokens", "must be a list of numbers"),
    "ids booleans": (
        {"input_ids": [True], "labels": [1]},
        "bad-tokens",
        "must be a list of numbers",
    ),
    "ids nested": (
        {"input_ids": [[1], [2, 3]], "labels": [1]},
        "bad-tokens",
        "must be a list of numbers",
    ),
    "ids null": (
        {"input_ids": [1, None], "labels": [1, 1]},
        "bad-tokens",
        "must be a list of numbers",
    ),
    "ids negative": ({"input_ids": [-1], "labels": [-100]}, "bad-tokens", "from 0 to 2**31 - 1"),
    "ids large": ({"input_ids": [2**31], "labels": [-100]}, "bad-tokens", "from 0 to 2**31 - 1"),
    "ids very large": (
        {"input_ids": [2**99], "labels": [-100]},
        "bad-tokens",
        "must be a list of numbers",
    ),
    "labels short": (
        {"input_ids": [1, 2], "labels": [1]},
        "bad-labels",
        "2 input_ids, but 1 labels",
    ),
    "labels shifted": (
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "bad-labels",
        "label 2 of token 1 is neither -100 nor",
    ),
    "loss weight NaN": (
        {"input_ids": [1, 2], "loss_weights": [0, math.nan]},
        "non-finite-weight",
        ", token 2: weight is nan",
    ),
    "loss weight negative": (
        {"input_ids": [1], "loss_weights": [-0.5]},
        "negative-weight",
        ", token 1: weight is -0.5",
    ),
    "loss weight huge": (
        {"input_ids": [1], "loss_weights": [1e39]},
        "non-finite-weight",
        ", token 1: weight is 1e+39",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_not_one_is_refused_with_place_reason_and_sentence(name):
    row, reason, says = BAD[name]
    with pytest.raises(RowError) as error:
        read(row)
    said = str(error.value)
    assert said.startswith("f.jsonl, line 3") and says in said and "\n" not in said
    assert error.value.reason == reason
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.reason) == (said, reason)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = [
    (row, key)
    for row in (TWO_ROUNDS | {"tools": TOOLS}, *(b[0] for b in BAD.values()))
    for key in row
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([row for row, _ in PLACES]), st.data())
def test_any_value_in_any_place_gives_an_example_or_a_sentence(row, data):
    row = copy.deepcopy(row)
    place, key = row, data.draw(st.sampled_from(sorted(row)))
    # somewhere inside
    while data.draw(st.booleans()) and isinstance(place[key], dict | list) and place[key]:
        place = place[key]
        key = data.draw(
            st.sampled_from(sorted(place))
            if isinstance(place, dict)
            else st.integers(0, len(place) - 1)
        )
    place[key] = data.draw(JSON)
    try:
        example = read(row)
    except RowError as error:
        assert str(error).startswith("f.jsonl, line 3") and error.reason
        return
    if isinstance(example, Conversation):
        # nothing that no template could write
        json.dumps([example.messages, example.tools], allow_nan=False)
        assert all(isinstance(m["content"], str) or m["tool_calls"] for m in example.messages)
        assert all(w is None or (math.isfinite(w) and w >= 0) for w in example.weights)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["system", "developer", "user", "assistant", "call", "tool"]), max_size=7
    )
)
def test_role_order_against_a_grammar(roles):
    """Independent of the code: a regular expression over one letter for each message. An unusual
    order is a note.
    """
    word = "".join(
        {"system": "s", "developer": "s", "user": "u", "assistant": "a", "call": "c", "tool": "t"}[
            r
        ]
        for r in roles
    )
    # an answer is any number of calls with their results, then a text; it may be missing at the
    # end, or lack its results
    usual = re.fullmatch(r"s?(u(ct+)*(a|c))*(u(ct+)*)?", word)
    given = [
        {"role": r, "content": "x"} if r != "call" else {**ANSWER, "tool_calls": [call("f", {})]}
        for r in roles
    ]
    if "a" not in word and "c" not in word:
        with pytest.raises(RowError, match="no assistant message"):
            read({"messages": given})
        return
    example = read({"messages": given})
    assert ("unusual-order" in example.notes) is (usual is None)
    assert [m["content"] for m in example.messages] == [m["content"] for m in given]
