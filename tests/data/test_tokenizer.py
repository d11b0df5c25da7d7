"""What is loaded of a model directory: flags that transformers 5 drops, chat templates by name or
file, the date, eos ids.
"""

import datetime
import json

import numpy as np
import pytest

from tests.data import chat
from tests.data.chat import byte_tokenizer, conversation, encode, tokenize
from torchsft.checkpoint.hf_directory import copy_side_files
from torchsft.checkpoint.storage import Folder
from torchsft.config import Data, InputError
from torchsft.data.formats import Conversation, Text
from torchsft.data.template import ChatTokenizer
from torchsft.data.tokenizer import at_day, eos_ids, load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": "find_hat", "parameters": {"type": "object", "properties": {}}},
    }
]


def save(directory, *, add_bos=False, template=chat.CHATML, **settings):
    """A directory with these further settings; `add_bos`: whether tokenizer.json itself adds a
    BOS.
    """
    directory.mkdir(exist_ok=True)
    byte_tokenizer(chat.CHATML, add_bos=add_bos).backend_tokenizer.save(
        str(directory / "tokenizer.json")
    )
    known = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(known | settings))
    return directory


@pytest.mark.parametrize(
    "adds, flag, kind, expected",
    [
        (False, True, "LlamaTokenizerFast", 1),  # as DeepSeek-V3 is published
        (False, True, "PreTrainedTokenizerFast", 1),
        (True, True, "LlamaTokenizerFast", 1),  # not twice
        (True, None, "PreTrainedTokenizerFast", 1),
        (False, False, "LlamaTokenizerFast", 0),
        (True, False, "LlamaTokenizerFast", 0),
        (True, False, "PreTrainedTokenizerFast", 1),  # a class that never had the flag
    ],
)
def test_add_bos_token_is_followed_for_texts_exactly_once(tmp_path, adds, flag, kind, expected):
    tokenizer = load_tokenizer(
        save(tmp_path, add_bos=adds, add_bos_token=flag, tokenizer_class=kind)
    )
    for example in (
        Text("a:1", "", "hello you"),
        Text("a:2", "hello", " you"),
        Text("a:3", "", "<bos>hello you"),
    ):
        sample = tokenize(example, tokenizer)
        wanted = max(expected, example.completion.count("<bos>"))
        assert np.flatnonzero(sample.tokens == tokenizer.bos_token_id).tolist() == [0] * wanted
        assert sample.tokens[-1] == tokenizer.eos_token_id
    served = tokenizer("hello you").input_ids
    assert tokenize(Text("a:1", "", "hello you"), tokenizer).tokens.tolist() == [
        *served,
        tokenizer.eos_token_id,
    ]


def test_add_bos_token_does_not_change_a_conversation(tmp_path):
    tokenizer = load_tokenizer(
        save(tmp_path, add_bos_token=True, tokenizer_class="LlamaTokenizerFast")
    )
    talk = conversation("hello", "you")
    assert (
        tokenize(talk, tokenizer).tokens.tolist()
        == tokenizer.apply_chat_template(talk.messages, return_dict=True)["input_ids"]
    )


def test_add_bos_token_without_a_bos_token_adds_nothing(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path, add_bos_token=True, bos_token=None))
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids


def test_add_prefix_space_is_followed(tmp_path):
    plain, spaced = (
        load_tokenizer(save(tmp_path / str(flag), add_prefix_space=flag)) for flag in (False, True)
    )
    assert spaced("hello").input_ids == plain(" hello").input_ids != plain("hello").input_ids
    assert (
        tokenize(Text("a:1", "", "hello"), spaced).tokens[:-1].tolist() == plain(" hello").input_ids
    )


# ---------------------------------------------------------------- chat templates


def named(tmp_path, **templates):
    return save(
        tmp_path, template=[{"name": name, "template": text} for name, text in templates.items()]
    )


def test_a_row_with_tools_gets_the_template_for_tools_as_in_apply_chat_template(tmp_path):
    with_tools = "{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}" + chat.CHATML
    tokenizer = load_tokenizer(named(tmp_path, default=chat.CHATML, tool_use=with_tools))
    both = ChatTokenizer(tokenizer)
    for tools in (TOOLS, None):
        talk = conversation("hello", "you")
        [found] = both.encode([Conversation("a:1", talk.messages, tools)])
        reference = tokenizer.apply_chat_template(talk.messages, tools=tools, return_dict=True)[
            "input_ids"
        ]
        assert found.samples[0][0].tolist() == reference
        assert ("find_hat" in tokenizer.decode(reference)) == bool(tools)


def test_templates_without_a_default_are_named_in_one_sentence(tmp_path):
    directory = named(tmp_path, rag=chat.CHATML, tool_use=chat.CHATML)
    with pytest.raises(
        InputError,
        match="chat templates named rag, tool_use, but none named default; name one of them",
    ):
        load_tokenizer(directory)
    (tmp_path / "own.jinja").write_text(chat.CHATML)
    assert (
        load_tokenizer(directory, chat_template=str(tmp_path / "own.jinja")).chat_template
        == chat.CHATML
    )


def test_a_chat_template_of_ones_own(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(chat.LLAMA3)
    bare = save(tmp_path / "bare", template=None)
    tokenizer = load_tokenizer(bare, chat_template=str(own))
    talk = conversation("hello", "you")
    text = tokenizer.decode(tokenize(talk, tokenizer).tokens)
    assert text == tokenizer.apply_chat_template(
        talk.messages, chat_template=chat.LLAMA3, tokenize=False
    )
    own.write_text(" \n")
    with pytest.raises(InputError, match=r"--data\.chat-template .*own\.jinja is empty"):
        load_tokenizer(bare, chat_template=str(own))
    with pytest.raises(InputError, match=r"--data\.chat-template .*absent cannot be read"):
        load_tokenizer(bare, chat_template=str(tmp_path / "absent"))


# ---------------------------------------------------------------- the date


def test_a_template_that_asks_for_the_date_gets_the_given_day(tmp_path):
    template = "{{ 'On ' + strftime_now('%d %b %Y') + '.' }}" + chat.CHATML
    tokenizer = load_tokenizer(save(tmp_path, template=template), date="2024-02-29")
    text = tokenizer.decode(tokenize(conversation("hello", "you"), tokenizer).tokens)
    assert text.startswith("On 29 Feb 2024.<|im_start|>user\nhello")
    today = load_tokenizer(tmp_path)
    served = today.apply_chat_template(
        conversation("hello", "you").messages, chat_template=template, tokenize=False
    )
    assert (
        today.apply_chat_template(conversation("hello", "you").messages, tokenize=False) == served
    )


def test_only_a_plain_format_of_the_date_can_be_answered():
    day = datetime.date(2024, 2, 29)
    assert at_day("{{ strftime_now( \"%Y\" ) if strftime_now is defined else '' }}", day) == (
        "{{ \"2024\" if strftime_now is defined else '' }}"
    )
    with pytest.raises(
        InputError, match="calls strftime_now with a format that is not a plain string"
    ):
        at_day("{{ strftime_now(form) }}", day)


def test_a_day_that_is_none_is_refused():
    with pytest.raises(
        InputError,
        match=r"--data\.template-date is '2024-02-30', but it must be a "
        r"day",
    ):
        Data(template_date="2024-02-30")


# ---------------------------------------------------------------- where servers stop


def test_eos_ids_are_those_of_the_generation_config_else_of_the_config(tmp_path):
    assert eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert eos_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"temperature": 1}')
    assert eos_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert eos_ids(tmp_path) == (3, 7)


# ---------------------------------------------------------------- variables of a row


def test_variables_of_a_row_win_over_those_of_the_run_and_do_not_reach_other_rows():
    template = chat.CHATML.replace("m['content'] +", "m['content'] + (mood | default('')) +")
    tokenizer = byte_tokenizer(template)
    talk = conversation("hello", "you")
    both = ChatTokenizer(tokenizer, template_kwargs={"mood": " calm"})
    rows = [talk, Conversation("a:2", talk.messages, template_kwargs={"mood": " glad"}), talk]
    texts = [tokenizer.decode(found.samples[0][0]) for found in both.encode(rows)]
    for text, mood in zip(texts, (" calm", " glad", " calm"), strict=True):
        assert text == tokenizer.apply_chat_template(talk.messages, tokenize=False, mood=mood)


def test_the_name_of_a_message_that_the_template_does_not_write_is_counted():
    messages = conversation("hello", "you").messages
    talk = Conversation("a:1", [messages[0] | {"name": "Alice"}, messages[1]])
    assert encode(talk, byte_tokenizer(chat.CHATML)).notes == ("unread-name",)
    named = chat.CHATML.replace("m['role'] +", "m['role'] + (' ' + m.name if m.name else '') +")
    assert encode(talk, byte_tokenizer(named)).notes == ()
    asked, answer = messages
    called = answer | {"tool_calls": [chat.call("add", {"a": 1})]}
    result = {"role": "tool", "content": "1", "name": "add"}
    talk = Conversation("a:1", [asked, called, result, answer])
    assert encode(talk, byte_tokenizer(chat.TAGS)).notes == ()


def test_a_variable_that_the_template_does_not_read_is_counted_and_a_reserved_one_refused():
    tokenizer, messages = byte_tokenizer(chat.CHATML), conversation("hello", "you").messages
    assert encode(
        Conversation("a:1", messages, template_kwargs={"mood": "glad"}), tokenizer
    ).notes == ("unread-variable",)
    # A name of the template's own loop is none of its variables.
    assert encode(
        Conversation("a:1", messages, template_kwargs={"m": "glad"}), tokenizer
    ).notes == ("unread-variable",)
    with pytest.raises(
        InputError, match="the row's variables of the chat template have 'messages'"
    ):
        encode(Conversation("a:1", messages, template_kwargs={"messages": []}), tokenizer)


def test_documents_are_handed_to_the_template_or_the_row_is_refused():
    messages, documents = (
        conversation("hello", "you").messages,
        [{"title": "A", "text": "the answer is"}],
    )
    shows = (
        "{% for d in documents or [] %}{{ d.title + ': ' + d.text + '\n' }}{% endfor %}"
        + chat.CHATML
    )
    tokenizer = byte_tokenizer(shows)
    [(ids, _)] = encode(Conversation("a:1", messages, documents=documents), tokenizer).samples
    reference = tokenizer.apply_chat_template(messages, documents=documents, tokenize=False)
    assert tokenizer.decode(ids) == reference
    assert reference.startswith("A: the answer is")
    with pytest.raises(
        InputError, match="the chat template leaves out the document 'the answer is'"
    ):
        encode(Conversation("a:1", messages, documents=documents), byte_tokenizer(chat.CHATML))


def test_an_export_carries_the_given_template_in_place_of_all_others(tmp_path):
    source = named(tmp_path / "source", default=chat.CHATML, tool_use=chat.QWEN3_TOOLS)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text(chat.CHATML)
    copy_side_files(source, Folder(tmp_path / "hf"), chat.LLAMA3)
    exported = load_tokenizer(tmp_path / "hf")
    assert exported.get_chat_template() == exported.get_chat_template(tools=TOOLS) == chat.LLAMA3
