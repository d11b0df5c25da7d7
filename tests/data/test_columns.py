"""--data.map and --data.system: columns of other names become conversations."""

import pytest

from tests.data.test_formats import ANSWER, USER
from torchsft.config import Data, InputError
from torchsft.data.columns import mapped
from torchsft.data.formats import recognise
from torchsft.data.rows import RowError


def made(row, text):
    return mapped(row, Data(map=text).columns())


def test_columns_become_turns_and_other_columns_stay():
    row = {"question": "hi", "answer": "yes", "source": "web"}
    assert made(row, "question=user,answer=assistant") == {
        "source": "web",
        "messages": [USER, ANSWER],
    }
    row = {"a": "be brief", "q": "h", "more": "i", "r": "yes", "x": 1}
    found = made(row, " a=system , q=user, more=user,r=assistant,x=ignore")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "h\n\ni"},
        ANSWER,
    ]
    assert found == {"messages": turns}
    assert made({"a": "", "q": "hi", "r": "yes"}, "a=system,q=user,r=assistant")["messages"] == [
        USER,
        ANSWER,
    ]


def test_columns_become_keys_of_a_format():
    assert made({"chat": [USER, ANSWER], "n": 1}, "chat=messages") == {
        "messages": [USER, ANSWER],
        "n": 1,
    }
    assert made({"body": "x"}, "body=text") == {"text": "x"}
    row = made({"q": "a", "r": "b", "context": "c"}, "q=prompt,r=completion,context=system")
    assert row == {"prompt": "a", "completion": "b", "system": "c"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("question", "must be COLUMN=TARGET pairs"),
        ("question=usr", "targets are system, user, assistant"),
        ("=user", "must be COLUMN=TARGET pairs"),
        ("a=user,a=assistant", "names the column 'a' twice"),
    ],
)
def test_a_map_that_says_nothing_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        Data(map=text)


@pytest.mark.parametrize(
    ("row", "text", "says"),
    [
        (
            {"question": "a"},
            "question=user,answer=assistant",
            "names the column 'answer', but the row has question",
        ),
        ({"q": 3, "r": "b"}, "q=user,r=assistant", "holds no text but 3"),
        ({"q": "a", "r": None}, "q=user,r=assistant", "holds no text but None"),
        ({"q": "a", "r": "b", "messages": []}, "q=user,r=assistant", "but the row has messages"),
        ({"q": "a", "text": "b"}, "q=text", "but the row has that as well"),
    ],
)
def test_a_row_that_the_map_does_not_fit_is_refused(row, text, says):
    with pytest.raises(RowError, match=says) as error:
        made(row, text)
    assert error.value.reason == "bad-map"


@pytest.mark.parametrize(
    ("row", "option"),
    [
        ({"question": "a", "answer": "b"}, "--data.map question=user,answer=assistant"),
        ({"input": "a", "output": "b", "id": 3}, "--data.map input=user,output=assistant"),
        ({"instruction": "a", "response": "b"}, "--data.map instruction=user,response=assistant"),
        (
            {"query": "a", "response": "b", "system": "c"},
            "--data.map system=system,query=user,response=assistant",
        ),
        ({"Question": "a", "Answer": "b"}, "--data.map Question=user,Answer=assistant"),
        ({"frage": "a", "antwort": "b"}, "--data.map frage=user,antwort=assistant"),
    ],
)
def test_the_refusal_of_an_unknown_format_prints_the_option_that_would_do(row, option):
    with pytest.raises(RowError) as error:
        recognise(row)
    assert str(error.value).endswith(option)
    text = option.removeprefix("--data.map ")
    assert recognise(made(row, text)) == "messages"


def test_a_system_text_is_given_or_stands_in_a_file(tmp_path):
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n")
    assert (
        Data(system=str(file)).system_text()
        == Data(system="Be brief.").system_text()
        == "Be brief."
    )
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        Data(system=str(file)).system_text()
