"""Every key of a row is followed, refused with a reason, or listed; a misspelling is refused with
the name that was meant.
"""

import copy
import json
import random

import pytest

from tests.data.test_formats import ANSWER, TOOLS, USER, call, messages, read
from torchsft.data.formats import KEYS, Text, parse, recognise
from torchsft.data.keys import misspelt
from torchsft.data.rows import RowError, located

CHAT = messages(USER, ANSWER)
SYSTEM = {"role": "system", "content": "be brief"}


def answers(*flags, **row):
    """Two answers, the first with these flags."""
    first = {"role": "assistant", "content": "no", **dict(flags)}
    return messages(USER, first, USER, ANSWER) | row


# ---------------------------------------------------------------- followed

FOLLOWED = {
    "system beside messages": (CHAT | {"system": "be brief"}, messages(SYSTEM, USER, ANSWER)),
    "system as parts (Bedrock)": (
        CHAT | {"system": [{"text": "be "}, {"text": "brief"}]},
        messages(SYSTEM, USER, ANSWER),
    ),
    "system_prompt": (CHAT | {"system_prompt": "be brief"}, messages(SYSTEM, USER, ANSWER)),
    "system twice, the same": (
        messages(SYSTEM, USER, ANSWER) | {"system": "be brief"},
        messages(SYSTEM, USER, ANSWER),
    ),
    "empty system": (CHAT | {"system": "", "tools": []}, CHAT),
    "functions": (CHAT | {"functions": [TOOLS[0]["function"]]}, CHAT | {"tools": TOOLS}),
    "functions and tools, the same": (
        CHAT | {"functions": [TOOLS[0]["function"]], "tools": TOOLS},
        CHAT | {"tools": TOOLS},
    ),
    "parts without type": (
        messages({"role": "user", "content": [{"text": "h"}, {"text": "i"}]}, ANSWER),
        CHAT,
    ),
    "parts that are strings": (messages({"role": "user", "content": ["h", "i"]}, ANSWER), CHAT),
    "parts as Responses has them": (
        messages({"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, ANSWER),
        CHAT,
    ),
    "roles of other tools": (
        messages({"role": "Human", "content": "hi"}, {"role": "gpt", "content": "yes"}),
        CHAT,
    ),
    "call roles (ms-swift)": (
        messages(
            USER,
            {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'},
            {"role": "tool_call", "content": '{"name": "g", "arguments": {}}'},
            {"role": "tool_response", "content": "1"},
            {"role": "tool", "content": "2"},
            ANSWER,
        ),
        messages(
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call("f", {"a": 1}), call("g", {})],
            },
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            ANSWER,
        ),
    ),
    "reasoning as a part": (
        messages(
            USER,
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, {"text": "yes"}],
            },
        ),
        messages(USER, ANSWER | {"reasoning_content": "hm"}),
    ),
    "no arguments": (
        messages(
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": " \n"}}],
            },
        ),
        messages(USER, {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}),
    ),
    "defaults said aloud": (
        CHAT | {"label": True, "kto_tag": True, "unmask": False, "mask": "User", "images": []},
        CHAT,
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_key_is_followed(name):
    row, plain = FOLLOWED[name]
    assert read(row) == read(plain)
    assert read(row).ignored == ()


@pytest.mark.parametrize(
    "flag",
    [
        {"loss": False},
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"weight": 0},
        {"loss_weight": 0.0},
        {"masked": True},
        {"loss": 0, "weight": 0},
    ],
)
def test_an_answer_is_excluded_by_the_flag_of_any_tool(flag):
    assert read(answers(*flag.items())).weights == (None, 0.0, None, None)
    turn = {"from": "gpt", "value": "no"} | flag
    row = {"conversations": [{"from": "human", "value": "hi"}, turn, USER, ANSWER]}
    assert read(row).weights == (None, 0.0, None, None)


@pytest.mark.parametrize(
    "flag",
    [
        {"loss": None},
        {"trainable": True},
        {"loss": True, "weight": 1},
        {"loss_weight": 1, "masked": False},
    ],
)
def test_an_answer_that_is_to_be_trained_is(flag):
    weights = read(answers(*flag.items())).weights
    assert weights in ((), (None, 1.0, None, None))


def test_a_mask_is_followed_where_the_users_turns_show_what_it_means():
    for trained in (0, 1):
        row = messages(
            USER | {"mask": 1 - trained},
            ANSWER | {"mask": 1 - trained},
            USER,
            ANSWER | {"mask": trained},
        )
        assert read(row).weights == (None, 0.0, None, None)
    for unclear in (
        messages(USER, ANSWER | {"mask": 1}),
        messages(USER | {"mask": 1}, ANSWER | {"mask": 0}, USER | {"mask": 0}, ANSWER),
    ):
        with pytest.raises(RowError, match="'trained' to some tools"):
            read(unclear)


def test_a_list_of_masks_beside_the_messages():
    for key in ("loss_mask", "message_loss_mask"):
        assert read(answers(**{key: [0, 0, 0, 1]})).weights == (None, 0.0, None, None)
        with pytest.raises(
            RowError, match=f"{key} must have a 0 or 1 for each of the 4 messages, but has 2 values"
        ):
            read(answers(**{key: [0, 1]}))
    with pytest.raises(RowError, match="contradicts the weight"):
        read(answers(("weight", 1), loss_mask=[0, 0, 0, 1]))
    told = read(answers(loss_mask=[1, 1, 0, 1]))
    assert told.notes == ("weight-on-context",) and told.weights[1::2] == (None, None)


def test_tool_calls_that_stand_in_two_places_and_agree_are_one_call():
    both = ANSWER | {"tool_calls": [call("f", {"a": 1})]}
    both |= {"function_call": {"name": "f", "arguments": {"a": 1}}}
    assert [len(m.get("tool_calls", ())) for m in read(messages(USER, both)).messages] == [0, 1]
    turn = {"role": "tool_call", "content": None, "tool_calls": [call("f", {"a": 1})]}
    assert read(messages(USER, turn)).messages[1]["tool_calls"] == [call("f", {"a": 1})]
    twice = {"name": "f", "function": {"name": "f", "arguments": {"a": 1}}, "arguments": ""}
    [found] = read(messages(USER, ANSWER | {"tool_calls": [twice]})).messages[1]["tool_calls"]
    assert found["function"] == {"name": "f", "arguments": {"a": 1}}


def test_where_a_row_comes_from_and_media_that_are_not_there_are_no_media():
    absent = {"image": {"bytes": None, "path": None}, "images": [None], "audio": {}}
    found = read(CHAT | absent | {"file": "a.txt", "document": "b"})
    assert found.messages == [USER, ANSWER] and found.ignored == ("file", "document")
    for more in ({"image": {"bytes": None, "path": "a.png"}}, {"image": "a.png"}):
        with pytest.raises(RowError, match=r"image holds an? .*, but only text can be trained"):
            read(CHAT | more)


@pytest.mark.parametrize("none", [None, "", " \n", "null", {}, "{}"])
def test_arguments_that_are_none_are_none_in_every_spelling(none):
    row = messages(USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": none}}]})
    [found] = read(row).messages[1]["tool_calls"]
    assert found["function"]["arguments"] in ({}, "{}")


def test_other_keys_of_every_part_are_listed():
    thought = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    row = messages(USER, ANSWER | {"content": [thought, "yes"]})
    row["system"] = [{"text": "be brief", "cache_control": {"type": "ephemeral"}}]
    found = read(row)
    assert found.messages[2]["reasoning_content"] == "hm"
    assert set(found.ignored) == {"messages[].content[].signature", "system[].cache_control"}


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_the_weight_of_a_row_counts_with_every_format(key):
    weight = {key: 0.5}
    assert read(answers(("weight", 3), **weight)).weights == (None, 1.5, None, 0.5)
    assert read({"conversations": CHAT["messages"]} | weight).weights == (None, 0.5)
    assert read({"instruction": "hi", "output": "yes"} | weight).weights == (None, 0.5)
    assert read({"prompt": [USER], "completion": [ANSWER]} | weight).weights == (0.0, 0.5)
    assert read({"prompt": "hi", "completion": "yes"} | weight) == Text("f:3", "hi", "yes", 0.5)
    assert read({"text": "hi"} | weight).weight == 0.5
    assert read({"input_ids": [5, 6], "labels": [-100, 6]} | weight).weights.tolist() == [0.0, 0.5]
    assert read(CHAT | {"train": False}).weights == (None, 0.0)


def test_variables_and_documents_reach_the_template():
    documents = [{"title": "a", "text": "b"}]
    example = read(
        CHAT | {"chat_template_kwargs": {"enable_thinking": False}, "documents": documents}
    )
    assert example.template_kwargs == {"enable_thinking": False} and example.documents == documents
    packed = read(
        CHAT
        | {"chat_template_kwargs": '{"enable_thinking": false}', "documents": json.dumps(documents)}
    )
    assert packed == example


def test_what_is_odd_but_clear_is_a_note():
    assert read(messages(USER, {"role": "assistant", "content": None}, USER, ANSWER)).notes == (
        "empty-answer",
    )
    assert read(messages(USER | {"weight": 1}, ANSWER)).notes == ("weight-on-context",)
    assert read(messages(USER | {"weight": 0}, ANSWER)).notes == ()
    assert read(messages(USER, USER, ANSWER)).notes == ("unusual-order",)
    assert read(messages(ANSWER, USER, ANSWER, ANSWER)).notes == ("unusual-order",)
    in_prompt = {"prompt": [USER, ANSWER | {"weight": 1}, USER], "completion": [ANSWER]}
    assert read(in_prompt).weights == (0.0, 0.0, 0.0, None) and read(in_prompt).notes == (
        "weight-on-context",
    )


# ---------------------------------------------------------------- refused

REFUSED = {
    "image of a row": (
        CHAT | {"images": ["a.png"]},
        "not-text",
        "images holds 1 of them, but only text can be trained",
    ),
    "audio of a message": (
        messages(USER, ANSWER | {"audio": {"id": "x"}}),
        "not-text",
        "message 2: audio holds an object",
    ),
    "image of a part": (
        messages(
            {"role": "user", "content": [{"text": "see"}, {"image": {"format": "png"}}]}, ANSWER
        ),
        "bad-content",
        "message 1, part 2: a content part has type 'image'",
    ),
    "part with its own flag": (
        messages(
            USER, {"role": "assistant", "content": [{"type": "text", "text": "a", "train": False}]}
        ),
        "unsupported-key",
        "a content part has train",
    ),
    "other system": (
        CHAT | {"system": "a", "system_prompt": "b"},
        "bad-system",
        "says something else",
    ),
    "other tools": (
        CHAT | {"functions": [{"name": "f"}], "tools": TOOLS},
        "bad-tools",
        "different things",
    ),
    "tools of Bedrock": (
        CHAT | {"toolConfig": {"tools": []}},
        "unsupported-key",
        "Bedrock's tools are not read",
    ),
    "unwanted answer": (
        CHAT | {"label": False},
        "unsupported-key",
        "marks an answer that is not wanted",
    ),
    "everything trained": (CHAT | {"unmask": True}, "unsupported-key", "--data.mask all"),
    "refusal": (
        messages(USER, {"role": "assistant", "content": None, "refusal": "No."}),
        "unsupported-key",
        "refusal",
    ),
    "offsets": (
        messages(USER, ANSWER | {"train_detail": [{"begin_offset": 0}]}),
        "unsupported-key",
        "train_detail",
    ),
    "template's own": (
        CHAT | {"chat_template_kwargs": {"tools": []}},
        "bad-chat_template_kwargs",
        "'tools'",
    ),
    "tools of a text": (
        {"text": "a", "tools": TOOLS},
        "unsupported-key",
        "tools stands beside text",
    ),
    "system of strings": (
        {"prompt": "a", "completion": "b", "system": "c"},
        "unsupported-key",
        "system stands beside",
    ),
    "two roles": (
        messages(USER | {"from": "gpt"}, ANSWER),
        "bad-role",
        "role and from are two spellings",
    ),
    "masked and weighted": (
        answers(("masked", True), ("weight", 1)),
        "bad-weight",
        "masked is True",
    ),
    "other calls under the older key": (
        messages(USER, ANSWER | {"tool_calls": [call("f", {})], "function_call": {"name": "g"}}),
        "bad-tool-calls",
        "message 2: tool calls stand in two places",
    ),
    "other calls beside a call as a turn": (
        messages(
            USER, {"role": "tool_call", "content": '{"name": "f"}', "tool_calls": [call("g", {})]}
        ),
        "bad-tool-calls",
        "keep one of them",
    ),
    "arguments beside the function": (
        messages(
            USER, ANSWER | {"tool_calls": [{"function": {"name": "f"}, "arguments": {"a": 1}}]}
        ),
        "bad-tool-call",
        "a tool call has arguments beside its function",
    ),
    "switch of a part of reasoning": (
        messages(
            USER,
            ANSWER | {"content": [{"type": "thinking", "thinking": "hm", "train": False}, "yes"]},
        ),
        "unsupported-key",
        "a content part has train",
    ),
    "messages as parts": (
        messages(USER, {"role": "assistant", "content": [USER, ANSWER]}),
        "bad-content",
        "message 2, part 1: a content part has role, as a message has",
    ),
    "reasoning behind text": (
        messages(USER, ANSWER | {"content": ["yes", {"type": "thinking", "thinking": "hm"}]}),
        "bad-content",
        "message 2, part 2: reasoning stands behind text",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_cannot_be_followed_is_refused_with_the_reason(name):
    row, reason, says = REFUSED[name]
    with pytest.raises(RowError) as error:
        read(row)
    assert says in str(error.value) and error.value.reason == reason


MISSPELT = {
    "mesages": {"mesages": CHAT["messages"]},
    "Messages": {"Messages": CHAT["messages"]},
    "converations": {"converations": CHAT["messages"]},
    "wieght": CHAT | {"wieght": 0},
    "toools": CHAT | {"toools": TOOLS},
    "chat_template_kwarg": CHAT | {"chat_template_kwarg": {"a": 1}},
    "sytem": CHAT | {"sytem": "be brief"},
    "contnet": messages(USER, {"role": "assistant", "contnet": "yes"}),
    "rloe": messages({"rloe": "user", "content": "hi"}, ANSWER),
    "toolCalls": messages(USER, ANSWER | {"toolCalls": [call("f", {})]}),
    "tool_call": messages(USER, ANSWER | {"tool_call": [call("f", {})]}),
    "reasoning_contents": messages(USER, ANSWER | {"reasoning_contents": "hm"}),
    "trainble": messages(USER, ANSWER | {"trainble": False}),
    "argumnets": messages(
        USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "argumnets": {"a": 1}}}]}
    ),
    "lables": {"input_ids": [1, 2], "lables": [1, 2]},
    "atention_mask": {"input_ids": [1, 2], "atention_mask": [0, 1]},
}


@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(key):
    with pytest.raises(RowError, match=f"key '{key}' is not known, but '") as error:
        read(MISSPELT[key])
    assert error.value.reason == "misspelt-key"


# ---------------------------------------------------------------- listed


def test_every_other_key_is_listed_also_inside():
    row = messages(
        USER | {"timestamp": 1, "id": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"index": 0, "function": {"name": "f"}}],
        },
    )
    row |= {
        "id": 7,
        "source": "web",
        "lang": "en",
        "metadata": {"a": 1},
        "text": "beside",
        "score": None,
        "label": 3,
    }
    wanted = {"id", "source", "lang", "metadata", "text", "label"}
    wanted |= {"messages[].timestamp", "messages[].id", "tool_calls[].index"}
    assert set(read(row).ignored) == wanted


def test_ordinary_names_are_no_misspellings():
    names = (
        "id source lang language test texts context next rank height tool model date url title "
        "topic category split tag"
    )
    names += (
        " license author subset turn turns num_turns tokens length hash uuid version type kind "
        "roles notes comment"
    )
    row = CHAT | dict.fromkeys(names.split(), "x")
    assert set(read(row).ignored) == set(names.split())
    known = frozenset({"text", "name", "role", "loss", "mask", "train", "weight", "tools"})
    for word in ("test", "next", "game", "rule", "less", "task", "brain", "height", "pools"):
        assert misspelt(word, known) is None


# ---------------------------------------------------------------- anything moved, renamed, nulled,
# nested

ROWS = [
    messages(SYSTEM, USER, ANSWER | {"weight": 0}, USER, ANSWER) | {"tools": TOOLS, "id": 3},
    {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
        "system": "be brief",
    },
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["q", "a"]]},
    {"prompt": [USER], "completion": [ANSWER], "chat_template_kwargs": {"a": 1}},
    {"prompt": "hi", "completion": "yes", "weight": 0.5},
    {"text": "whole", "source": "web"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
]


def _objects(value):
    """All objects in a value."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


def _texts(value):
    return [inner for one in _objects(value) for inner in one.values() if isinstance(inner, str)]


def _change(row, rng):
    """One key of one object moved, renamed, nulled or nested; returns the key."""
    place = rng.choice([each for each in _objects(row) if each])
    key = rng.choice(sorted(place))
    how = rng.choice(["move", "rename", "null", "nest", "copy"])
    if how == "move":
        rng.choice(list(_objects(row)))[key] = place.pop(key)
    elif how == "rename":
        place[
            rng.choice([key + "s", key[:-1], key.upper(), "extra", key[1:] + key[:1], "x_" + key])
        ] = place.pop(key)
    elif how == "null":
        place[key] = None
    elif how == "nest":
        place[key] = rng.choice([[place[key]], {key: place[key]}, json.dumps(place[key])])
    else:
        place["copy_of_it"] = copy.deepcopy(place[key])


def _listed(example):
    return {key.rpartition(".")[2].removesuffix("[]") for key in example.ignored}


@pytest.mark.parametrize("seed", range(300))
def test_nothing_is_trained_that_the_row_does_not_say_and_nothing_is_dropped_silently(seed):
    rng = random.Random(seed)
    row = copy.deepcopy(rng.choice(ROWS))
    for _ in range(rng.randint(1, 3)):
        _change(row, rng)
    try:
        with located("f.jsonl, line 3"):
            form = recognise(row)
            example = parse(copy.deepcopy(row), form, "f:3")
    except RowError as error:
        assert error.reason and str(error).startswith("f.jsonl, line 3")
        return
    said = json.dumps(row)
    if form == "tokens":
        given = (
            row["input_ids"] if isinstance(row["input_ids"], list) else json.loads(row["input_ids"])
        )
        assert example.tokens.tolist() == given
        return
    shown = (
        [example.prompt, example.completion]
        if isinstance(example, Text)
        else _texts(example.messages)
    )
    for text in shown:  # alpaca joins two texts
        for part in text.split("\n\n"):
            assert (
                part in ("user", "assistant", "system", "developer", "tool", "function")
                or json.dumps(part)[1:-1] in said
            )
    kept = json.dumps(
        [shown, getattr(example, "tools", None), getattr(example, "template_kwargs", None)]
    )
    own = {key for keys in KEYS.values() for key in keys}
    for text in _texts({key: row[key] for key in row if key not in _listed(example)}):
        below_listed = any(
            text in json.dumps(each[key])
            for each in _objects(row)
            for key in each
            if key in _listed(example)
        )
        roles = (
            "user",
            "assistant",
            "system",
            "human",
            "gpt",
            "function",
            "number",
            "object",
            "string",
        )
        assert (
            text in roles
            or json.dumps(text)[1:-1] in kept
            or text[:1] in "[{"
            or below_listed
            or own & {text}
        )
