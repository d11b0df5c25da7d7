"""Reading conversations, and the sentence for everything that is not one."""

import json
import re

import pytest

from torchsft.config import InputError
from torchsft.data.formats import read_jsonl

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def turns(*roles, content="x"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n")
    return path


def test_conversations_carry_file_and_line_and_blank_lines_are_counted_but_skipped(tmp_path):
    extra = GOOD | {"source": "web", "score": 3}
    long = turns("system", "user", "assistant", "user")
    path = write(tmp_path / "chat.jsonl", GOOD, b"", b"  \t", extra, long)
    read = list(read_jsonl(path))
    assert [c.id for c in read] == ["chat.jsonl:1", "chat.jsonl:4", "chat.jsonl:5"]
    assert [c.messages for c in read] == [GOOD["messages"], GOOD["messages"], long["messages"]]
    assert next(read_jsonl(path, name="web")).id == "web:1"


def test_byte_order_mark_carriage_returns_and_line_separators_inside_strings_are_read(tmp_path):
    line = json.dumps(turns("user", "assistant", content="a\u2028b\u0085c\r\nd é 😀"), ensure_ascii=False).encode()
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)  # the last line without a newline
    assert [c.messages[0]["content"] for c in read_jsonl(path)] == ["a\u2028b\u0085c\r\nd é 😀"] * 2


def test_only_role_and_content_are_kept_of_a_message(tmp_path):
    rows = turns("user", "assistant")
    for message in rows["messages"]:
        message |= {"name": "Ann", "tool_calls": None, "weight": None}
    assert next(read_jsonl(write(tmp_path / "a.jsonl", rows))).messages == turns("user", "assistant")["messages"]


BAD_LINES = {
    "not JSON": (b"{'messages': []}", "not JSON"),
    "cut off": (b'{"messages": [{"role": "user", "con', "not JSON"),
    "not UTF-8": (json.dumps(GOOD).encode().replace(b"hi", b"h\xff"), "byte 45 is not UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "is not UTF-8"),
    "nested without end": (b"[" * 200_000, "nested too deeply"),
    "a number of many digits": (b"1" * 10_000, "not JSON"),
    "an array": ([1], "no messages, found a list"),
    "null": (None, "no messages, found null"),
    "other keys": ({"prompt": "a", "answer": "b"}, "no messages, found an object with answer, prompt"),
    "no keys": ({}, "no messages, found an object with no keys"),
    "messages a string": ({"messages": "hi"}, "messages must be a list of at least one message, but it is a string"),
    "messages empty": ({"messages": []}, "messages must be a list of at least one message, but it is empty"),
    "message a string": ({"messages": ["hi"]}, "message 1: a message must be an object"),
    "no role": ({"messages": [{"content": "hi"}]}, "message 1: no role"),
    "no content": ({"messages": [*GOOD["messages"], {"role": "user"}]}, "message 3: no content"),
    "content a list": (
        turns("user", "assistant", content=[{"text": "hi"}]),
        "content must be a string, but it is a list",
    ),
    "content null": (turns("user", "assistant", content=None), "content must be a string, but it is null"),
    "content a number": (turns("user", "assistant", content=True), "content must be a string, but it is a boolean"),
    "half a surrogate pair": (turns("user", "assistant", content="a\ud800"), r"half a surrogate pair \(0xd800\)"),
    "unknown role": (turns("human", "gpt"), "message 1: unknown role 'human'; the roles are system, user, assistant"),
    "role not a string": (turns(["user"]), r"unknown role \['user'\]"),
    "tool": (turns("user", "assistant", "tool"), "message 3: role tool is not supported by this version"),
    "tools": (GOOD | {"tools": [{"name": "f"}]}, "tools are not supported by this version"),
    "tool calls": (
        {"messages": [GOOD["messages"][0], GOOD["messages"][1] | {"tool_calls": [{}]}]},
        "message 2: tool_calls is not supported by this version",
    ),
    "weight": ({"messages": [GOOD["messages"][0] | {"weight": 0}]}, "weight is not supported by this version"),
    "two users": (turns("user", "user"), "message 2: role user where assistant is expected"),
    "assistant first": (turns("system", "assistant"), "message 2: role assistant where user is expected"),
    "system later": (turns("user", "assistant", "system"), "message 3: role system where user is expected"),
    "no answer": (turns("system", "user"), "no assistant message"),
    "system alone": (turns("system"), "no assistant message"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, name):
    line, says = BAD_LINES[name]
    path = write(tmp_path / "chat.jsonl", GOOD, b"", line)
    with pytest.raises(InputError, match=re.escape(str(path)) + rf", line 3\b.*{says}") as error:
        list(read_jsonl(path))
    assert "\n" not in str(error.value)


def test_an_unusable_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="is a directory"):
        list(read_jsonl(tmp_path))
    write(tmp_path / "file", GOOD)
    with pytest.raises(InputError, match="cannot be read"):
        list(read_jsonl(tmp_path / "file" / "chat.jsonl"))
