"""Which nulls somebody said, and which Arrow put in where rows have other keys."""

import json

import datasets
import pytest

from tests.data.test_formats import ANSWER, USER, call
from torchsft.config import Data
from torchsft.data.nulls import DOUBT, Null, clean
from torchsft.data.rows import read_row


def tool(name, *parameters, **more):
    properties = {parameter: {"type": "string"} for parameter in parameters}
    function = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function} | more


def calls(row):
    """The arguments of every call."""
    return [c["function"]["arguments"] for m in row["messages"] for c in m.get("tool_calls") or ()]


def asked(arguments, tools=()):
    return {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call("f", arguments)]},
        ],
        "tools": [*tools],
    }


@pytest.mark.parametrize("padded", [False, True])
def test_an_argument_that_the_tool_declares_stays_and_one_that_it_has_not_goes(padded):
    row, notes = clean(
        asked({"a": "1", "b": None, "c": None}, [tool("f", "a", "b"), tool("g", "c")]), padded
    )
    assert calls(row) == [{"a": "1", "b": None}]
    assert notes == ((DOUBT,) if padded else ())  # Arrow may have put in that of b as well


def test_without_a_declaration_doubt_is_a_note_and_json_keeps_what_it_says():
    assert clean(asked({"a": "1", "b": None}), padded=False) == (
        asked({"a": "1", "b": None}),
        (DOUBT,),
    )
    row, notes = clean(asked({"a": "1", "b": None}), padded=True)
    assert (calls(row), notes) == ([{"a": "1"}], (DOUBT,))
    # in a JSON column nothing is padding
    said, notes = clean(asked({"a": "1", "b": Null.EXPLICIT}), padded=True)
    assert (calls(said), notes) == ([{"a": "1", "b": None}], (DOUBT,))
    assert clean(asked('{"b": null}'), padded=True)[0] == asked('{"b": null}')  # text is what it is


def test_nested_arguments_follow_the_nested_declaration():
    where = {
        "type": "object",
        "properties": {"lat": {"type": "number"}, "name": {"type": "string"}},
    }
    tools = [tool("f")]
    tools[0]["function"]["parameters"]["properties"] = {
        "where": where,
        "all": {"type": "array", "items": where},
    }
    given = {"where": {"lat": 1, "name": None, "x": None}, "all": [{"lat": None, "x": None}]}
    row, notes = clean(asked(given, tools), padded=False)
    assert (calls(row), notes) == (
        [{"where": {"lat": 1, "name": None}, "all": [{"lat": None}]}],
        (),
    )


def test_nulls_of_messages_and_tools_are_absent_keys():
    padding = {"tool_calls": None, "name": None}
    padded_tool = tool("f", "a")
    padded_tool["function"]["parameters"]["properties"] |= {"b": None, "default": None}
    padded_tool["function"]["parameters"]["properties"]["a"] |= {
        "enum": None,
        "items": None,
        "description": None,
    }
    row = {"messages": [USER | padding, ANSWER | padding], "tools": [padded_tool], "id": None}
    wanted = {"messages": [USER, ANSWER], "tools": [tool("f", "a")]}
    assert clean(row, padded=True) == (wanted, ())
    said, _ = clean(row, padded=False)
    assert said["messages"] == [USER, ANSWER]
    properties = said["tools"][0]["function"]["parameters"]["properties"]
    assert set(properties) == {"a"} and properties["a"] == {"type": "string", "enum": None}


def test_json_says_a_default_of_null():
    said = tool("f", "a")
    said["function"]["parameters"]["properties"]["a"]["default"] = None
    assert clean(asked({}, [said]), padded=False)[0]["tools"] == [said]
    variables = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": None}}
    assert clean(variables, padded=False) == (variables, ("doubtful-null",))
    assert clean(variables | {"chat_template_kwargs": {"a": 1}}, padded=False)[1] == ()


def test_rows_that_datasets_wrote_are_as_they_were(tmp_path):
    """Two tools with other parameters: Arrow gives each call and each tool the keys of the
    other.
    """
    tools = [tool("f", "a"), tool("g", "b")]
    rows = []
    for name, arguments in (("f", {"a": "1"}), ("g", {"b": "2"})):
        answer = {"role": "assistant", "content": "", "tool_calls": [call(name, arguments)]}
        rows.append({"messages": [USER, answer], "tools": tools})
    kept = datasets.Dataset.from_list(rows)
    assert calls(kept[0]) == [{"a": "1", "b": None}]  # what is to be undone
    kept.to_json(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert b"null" in lines[0]
    for stored in (lines, [kept[i] for i in range(2)]):
        assert [read_row(one) for one in stored] == [(row, ()) for row in rows]


def test_doubt_is_counted_and_a_warning_of_the_inspector(tmp_path):
    from tests.data import chat
    from tools.inspection import gather

    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps(asked({"a": None})) + "\n")
    tokenizer = chat.byte_tokenizer(chat.QWEN3_TOOLS)
    options = Data(train=(str(data),), cache=str(tmp_path / "cache"))
    [source], findings = gather.gather(tokenizer, options)
    assert source.counts[DOUBT] == 1
    assert [(finding.reason, finding.level) for finding in findings] == [(DOUBT, "warning")]


@pytest.mark.parametrize("padded", [False, True])
def test_tools_in_strings_declare_as_well(padded):
    """As LLaMA-Factory and ms-swift keep them: all of them as one JSON text, each one, or only its
    parameters.
    """
    declared = tool("f", "a", "b")
    parameters = declared["function"]["parameters"]
    in_a_string = tool("f")
    in_a_string["function"]["parameters"] = json.dumps(parameters)
    for tools in (json.dumps([declared]), [json.dumps(declared)], [in_a_string]):
        row = asked({"a": "1", "b": None, "c": None}) | {"tools": tools}
        found, notes = clean(row, padded)
        assert calls(found) == [{"a": "1", "b": None}] and found["tools"] == tools
        assert notes == ((DOUBT,) if padded else ())
    parameters["properties"]["c"] = None  # of another tool; nobody declared it
    row = asked({"a": "1", "b": "2", "c": None}) | {"tools": json.dumps([declared])}
    assert calls(clean(row, padded)[0]) == [{"a": "1", "b": "2"}]
    # refused where tools are read
    assert clean(asked({"a": None}) | {"tools": "[{"}, padded)[1] == (DOUBT,)
