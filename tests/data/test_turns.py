# ruff: noqa: E501 (a template stands as it is published)
"""Turns under templates that order, end, rewrite or lose messages in their own ways, by hand and by
`apply_chat_template`.
"""

import re

import numpy as np
import pytest
from tokenizers import AddedToken

from tests.data import chat
from tests.data.chat import byte_tokenizer, call, conversation, encode
from torchsft.data.formats import Conversation, Tokens
from torchsft.data.rows import RowError
from torchsft.data.template import ChatTokenizer

# In the style of GLM-4.5: a turn has no end of its own; the token that opens the next one ends it.
# Reasoning is kept behind the last question alone.
GLM = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|system|>\n' + tools | tojson }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\n<think>' + (m.reasoning_content or '' if loop.index0 > ns.asked else '') + '</think>' }}
        {{- '\n' + m.content if m.content else '' }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>' + call.function.name }}
            {%- for name, value in call.function.arguments.items() %}{{- '\n' + name + ': ' + value | string }}{%- endfor %}
            {{- '\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
        {{- '\n' + m.content }}
    {%- else %}
        {{- '<|' + m.role + '|>\n' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
GLM_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
# In the style of gpt-oss: reasoning before a call is kept until an answer follows; the token that
# ends a call is its own.
HARMONY = """
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}
        {%- set ns = namespace(answered=false) %}
        {%- for later in messages[loop.index:] %}
            {%- if later.role == 'assistant' and not later.tool_calls %}{%- set ns.answered = true %}{%- endif %}
        {%- endfor %}
        {%- if m.reasoning_content and not ns.answered %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
        {%- endif %}
        {%- set function = m.tool_calls[0].function %}
        {{- '<|start|>assistant to=' + function.name + '<|message|>' + function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.last and m.reasoning_content %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
# In the style of Mistral-Nemo: the system turn stands in the question that comes last of all, so
# not once it is answered.
NEMO = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system, rest = messages[0].content, messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}
    {%- if m.role == 'user' and loop.last and system is defined %}{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' }}
    {%- elif m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
    {%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""
# In the style of Hermes: a newline behind tool results only where a message follows.
HERMES = """
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>tool\n' + m.content + ('' if loop.last else '\n') + '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}
        {%- for call in m.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def tool(content):
    return {"role": "tool", "content": content, "tool_call_id": "c"}


def calls(name, reasoning=None, **arguments):
    keys = {"reasoning_content": reasoning} if reasoning else {}
    return assistant(None, tool_calls=[call(name, arguments)], **keys)


def shown(tokenizer, found):
    """The samples as texts, with what is trained between [[ and ]]."""
    texts = []
    for ids, weights in found.samples:
        pieces, inside = [], False
        for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if (weight > 0) != inside:
                pieces.append("]]" if inside else "[[")
                inside = not inside
            pieces.append(tokenizer.decode(token))
        texts.append("".join(pieces) + "]]" * inside)
    return texts


def bare(text):
    return re.sub(r"\[\[|\]\]", "", text)


# ---------------------------------------------------------------- any order of roles

ORDERS = {
    "two users": [user("hi"), user("there"), assistant("you")],
    "assistant first": [assistant("you"), user("hi"), assistant("me")],
    "two assistants": [
        user("hi"),
        assistant("you"),
        assistant("me"),
        user("and"),
        assistant("the"),
    ],
    "system later": [
        user("hi"),
        assistant("you"),
        {"role": "system", "content": "be"},
        user("and"),
        assistant("me"),
    ],
    "ends with a user": [user("hi"), assistant("you"), user("and"), user("me")],
    "system last": [user("hi"), assistant("you"), {"role": "system", "content": "be"}],
    "tool without a call": [tool("the"), assistant("you")],
}


def chatml(messages):
    parts = [
        (
            m["role"],
            f"[[{m['content']}<|im_end|>]]"
            if m["role"] == "assistant"
            else m["content"] + "<|im_end|>",
        )
        for m in messages
    ]
    return "".join(f"<|im_start|>{role}\n{text}\n" for role, text in parts)


def llama3(messages):
    parts = [
        (
            m["role"],
            f"[[{m['content']}<|eot_id|>]]"
            if m["role"] == "assistant"
            else m["content"] + "<|eot_id|>",
        )
        for m in messages
    ]
    return "<bos>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}" for role, text in parts
    )


@pytest.mark.parametrize("template, by_hand", [(chat.CHATML, chatml), (chat.LLAMA3, llama3)])
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_that_the_template_renders_is_trained(template, by_hand, order):
    tokenizer, messages = byte_tokenizer(template), ORDERS[order]
    found = encode(Conversation("a:1", messages), tokenizer)
    assert shown(tokenizer, found) == [by_hand(messages)]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == bare(by_hand(messages))
    assert found.notes == ()


def test_a_system_turn_that_the_template_gathers_splits_the_turns_before_it():
    tokenizer = byte_tokenizer(chat.DEEPSEEK_V3)
    found = encode(Conversation("a:1", ORDERS["system later"]), tokenizer)
    first, second = (
        "<bos><|User|>hi<|Assistant|>[[you<eos>]]",
        "<bos>be<|User|>hi<|Assistant|>you<eos><|User|>and<|Assistant|>[[me<eos>]]",
    )
    assert shown(tokenizer, found) == [first, second]
    assert found.notes == ("split-by-turn",)


def test_an_assistant_who_begins_behind_what_the_template_writes_first():
    tokenizer = byte_tokenizer(chat.QWEN3)  # refuses no messages at all
    [text] = shown(
        tokenizer, encode(Conversation("a:1", ORDERS["assistant first"]), tokenizer, "assistant")
    )[:1]
    assert text.startswith(
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nyou<|im_end|>]]"
    )


# ---------------------------------------------------------------- ends of turns


@pytest.mark.parametrize("eos", ["<eos>", "<|im_end|>"])
def test_an_end_of_turn_that_is_not_marked_special_serves(eos):
    special = byte_tokenizer(chat.CHATML)
    plain = byte_tokenizer(chat.CHATML)
    backend = plain.backend_tokenizer
    plain.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token in ("<|im_start|>", "<|im_end|>")
        ]
    )
    plain.eos_token = eos
    assert not backend.get_added_tokens_decoder()[
        plain.convert_tokens_to_ids("<|im_start|>")
    ].special
    talk = conversation("hello", "you", "and", "me")
    ours, theirs = encode(talk, plain), encode(talk, special)
    assert [ids.tolist() for ids, _ in ours.samples] == [ids.tolist() for ids, _ in theirs.samples]
    assert ours.samples[0][1].tolist() == theirs.samples[0][1].tolist()
    assert ours.ends == theirs.ends == (special.convert_tokens_to_ids("<|im_end|>"),) * 2


def test_a_token_inside_the_turn_that_is_not_special_does_not_end_it():
    tokenizer = byte_tokenizer(chat.CHATML.replace("<|im_end|>", ""))
    tokenizer.add_tokens(["</call>"])
    [found] = ChatTokenizer(tokenizer).encode([conversation("hi", "you</call>")])
    assert isinstance(found, RowError) and found.reason == "no-end-of-turn"


def glm(eos=("<|user|>", "<|observation|>")):
    tokenizer = byte_tokenizer(GLM)
    tokenizer.add_special_tokens({"additional_special_tokens": GLM_TOKENS})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return tokenizer, {"eos_ids": [tokenizer.convert_tokens_to_ids(token) for token in eos]}


@pytest.mark.parametrize("mask", ["assistant", "last-turn", "all"])
def test_the_token_that_opens_the_next_turn_ends_each_turn_once(mask):
    tokenizer, ids = glm()
    talk = conversation("hello", "you", "and", "me")
    found = encode(talk, tokenizer, mask, **ids)
    [text] = shown(tokenizer, found)
    rendered = tokenizer.apply_chat_template(talk.messages, tokenize=False)
    assert bare(text) == rendered + "<|user|>"
    begin = "<|user|>\nhello<|assistant|>"
    middle, last = "\n<think></think>\nyou<|user|>", "\n<think></think>\nme<|user|>"
    wanted = {
        "assistant": f"{begin}[[{middle}]]\nand<|assistant|>[[{last}]]",
        "last-turn": f"{begin}{middle}\nand<|assistant|>[[{last}]]",
        "all": f"<|user|>[[{begin.removeprefix('<|user|>')}{middle}\nand<|assistant|>{last}]]",
    }
    assert text == wanted[mask]


def test_a_tool_call_ends_with_the_token_that_opens_its_result():
    tokenizer, ids = glm()
    messages = [user("hello"), calls("add", "I see", a=1), tool("2"), calls("add", a=3)]
    tools = [
        {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}
    ]
    found = encode(Conversation("a:1", messages, tools), tokenizer, **ids)
    [text] = shown(tokenizer, found)
    assert text.partition("<|user|>")[2] == (
        "\nhello<|assistant|>[[\n<think>I see</think>\n<tool_call>add\na: "
        "1\n</tool_call><|observation|>]]\n2"
        "<|assistant|>[[\n<think></think>\n<tool_call>add\na: 3\n</tool_call><|observation|>]]"
    )
    assert found.ends == (tokenizer.convert_tokens_to_ids("<|observation|>"),) * 2


def test_rewritten_history_and_openers_together():
    tokenizer, ids = glm()
    messages = [
        user("hello"),
        assistant("you", reasoning_content="I see"),
        user("and"),
        assistant("me"),
    ]
    assert shown(tokenizer, encode(Conversation("a:1", messages), tokenizer, **ids)) == [
        "<|user|>\nhello<|assistant|>[[\n<think>I see</think>\nyou<|user|>]]",
        "<|user|>\nhello<|assistant|>\n<think></think>\nyou<|user|>\nand<|assistant|>[[\n<think></think>\nme<|user|>]]",
    ]
    masked = encode(Conversation("a:1", messages[:2]), tokenizer, reasoning="mask", **ids)
    assert shown(tokenizer, masked)[0].endswith("<think>I see</think>\n[[you<|user|>]]")


@pytest.mark.parametrize("eos", [(), ("<|observation|>",)])
def test_an_opener_at_which_servers_do_not_stop_ends_nothing(eos):
    tokenizer, ids = glm(eos)
    [found] = ChatTokenizer(tokenizer, **ids).encode([conversation("hello", "you")])
    assert isinstance(found, RowError) and found.reason == "no-end-of-turn"
    assert "eos_token_id of generation_config.json" in str(found)


# ---------------------------------------------------------------- rewritten as soon as the answer
# is there


@pytest.mark.parametrize("reasoning", ["train", "mask"])
def test_reasoning_before_calls_that_goes_once_there_is_an_answer(reasoning):
    tokenizer = byte_tokenizer(HARMONY)
    messages = [
        user("hi"),
        calls("add", "I see", a=1),
        tool("2"),
        assistant("two", reasoning_content="so"),
        user("and"),
        assistant("me"),
    ]
    found = encode(Conversation("a:1", messages), tokenizer, reasoning=reasoning)
    thought = "<|channel|>analysis<|message|>"
    start = "<|start|>user<|message|>hi<|end|><|start|>assistant"
    made = [
        '{}I see<|end|><|start|>assistant to=add<|message|>{{"a": 1}}<|call|>',
        "{}so<|end|><|start|>assistant<|channel|>final<|message|>two<|return|>",
    ]
    called, answered = (text.format(thought) for text in made)
    result = "<|start|>tool<|message|>2<|end|><|start|>assistant"
    first, second = (bare(text) for text in shown(tokenizer, found))
    assert first == start + called + result + answered
    assert second == tokenizer.apply_chat_template(messages, tokenize=False)
    for i, text in ((3, start + called + result), (5, second.rpartition("<|channel|>")[0])):
        assert (
            tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            == text
        )
    if reasoning == "train":
        assert shown(tokenizer, found)[0] == f"{start}[[{called}]]{result}[[{answered}]]"
    else:
        assert "[[" in shown(tokenizer, found)[0] and "I see" not in "".join(
            re.findall(r"\[\[(.*?)\]\]", shown(tokenizer, found)[0])
        )
    assert found.notes == ("split-by-turn", "context-restored")


def test_a_system_turn_that_stands_in_the_last_question_alone():
    tokenizer = byte_tokenizer(NEMO)
    talk = conversation("hi", "you", "and", "me", system="be")
    found = encode(talk, tokenizer)
    assert shown(tokenizer, found) == [
        "<bos>[INST]be\n\nhi[/INST][[ you<eos>]]",
        "<bos>[INST]hi[/INST] you<eos>[INST]be\n\nand[/INST][[ me<eos>]]",
    ]
    for i, text in zip((2, 4), shown(tokenizer, found), strict=True):
        assert (
            tokenizer.apply_chat_template(talk.messages[:i], tokenize=False)
            == text.partition("[[")[0]
        )
    assert found.notes == ("split-by-turn", "context-restored")


def test_white_space_behind_tool_results_that_depends_on_what_follows():
    tokenizer = byte_tokenizer(HERMES)
    messages = [user("hi"), calls("add", a=1), tool("2"), assistant("two")]
    [text] = shown(tokenizer, encode(Conversation("a:1", messages), tokenizer))
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert text.rpartition("[[")[0].replace("[[", "").replace("]]", "") == prompt
    assert re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL) == [
        '{"name": "add", "arguments": {"a": 1}}<|im_end|>',
        "two<|im_end|>",
    ]


# ---------------------------------------------------------------- context that is lost


SKIPS = "{% for m in messages if m['role'] in ('user', 'assistant') %}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds a.",
            "parameters": {"properties": {"a": {}}},
        },
    }
]


def skipping(*roles):
    kept = tuple({"system", "developer", "user", "tool", "assistant"} - set(roles))
    return chat.TAGS.replace(
        "{%- for m in messages %}", f"{{%- for m in messages if m.role in {kept} %}}"
    )


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_message_that_the_template_leaves_out_is_told(role, tools):
    first = {"role": role, "content": "Say it."} if role != "tool" else user("go")
    messages = [first, user("hi"), calls("add", a=1), tool("twelve"), assistant("you")]
    shows = "{{- tools | tojson if tools else '' }}" + skipping(role)
    [found] = ChatTokenizer(byte_tokenizer(shows)).encode([Conversation("a:1", messages, tools)])
    assert isinstance(found, RowError) and found.reason == "context-lost"
    assert f"what the {role} message says" in str(found) and "--data.on-lost-context keep" in str(
        found
    )
    tokenizer = byte_tokenizer(shows)
    kept = encode(Conversation("a:1", messages, tools), tokenizer, on_lost_context="keep")
    assert "context-lost" in kept.notes and len(kept.kept) >= 1
    assert (
        len(
            encode(
                Conversation("a:1", messages, tools),
                byte_tokenizer("{{- tools | tojson if tools else '' }}" + chat.TAGS),
            ).kept
        )
        == 0
    )


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize("elsewhere", ["answer", "arguments", "tools", "template"])
def test_a_message_that_is_left_out_is_told_where_another_one_says_the_same(role, elsewhere):
    said = {"answer": "42", "arguments": "7", "tools": "Adds.", "template": "assistant"}[elsewhere]
    declared = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    first = {
        "role": role if role != "tool" else "user",
        "content": said if role != "tool" else "go",
    }
    result = tool(said if role == "tool" else "twelve")
    messages = [first, user("hi"), calls("add", a=7), result, assistant("It is 42.")]
    talk = Conversation("a:1", messages, declared)
    shown = "{{- tools | tojson }}" + chat.TAGS
    assert not encode(talk, byte_tokenizer(shown), on_lost_context="keep").kept
    left_out = "loop.index0 != " + ("3" if role == "tool" else "0")
    hides = shown.replace(
        "{%- for m in messages %}", f"{{%- for m in messages %}}{{%- if {left_out} %}}"
    )
    hides = hides.replace("{%- endfor %}\n{%- if add", "{%- endif %}{%- endfor %}\n{%- if add")
    [found] = ChatTokenizer(byte_tokenizer(hides)).encode([talk])
    assert isinstance(found, RowError) and found.reason == "context-lost"
    assert f"what the {role} message says" in str(found)


@pytest.mark.parametrize(
    "document", [{"snippet": "It rains."}, {"title": "x", "text": "It rains."}]
)
def test_a_document_that_the_template_leaves_out_is_told(document):
    talk = Conversation("a:1", [user("hi"), assistant("you")], documents=[document])
    [found] = ChatTokenizer(byte_tokenizer(chat.CHATML)).encode([talk])
    assert isinstance(found, RowError) and found.reason == "context-lost"
    assert "the document 'It rains.'" in str(found)
    shown = byte_tokenizer("{{ documents | tojson }}" + chat.CHATML)
    assert not encode(talk, shown, on_lost_context="keep").kept


def test_many_conversations_of_one_shape_are_checked_too():
    tokenizer = ChatTokenizer(byte_tokenizer(chat.CHATML.replace("{% for m in messages %}", SKIPS)))
    talks = [
        conversation("say hi", "hi", system=system) for system in ("say hi", "hi", " ", "go on")
    ]
    found = tokenizer.encode([*talks, conversation("say hi", "hi")])
    # "say hi" stands in the text, but as what the user says.
    assert [isinstance(one, RowError) for one in found] == [True, True, False, True, False]
    assert {one.reason for one in found if isinstance(one, RowError)} == {"context-lost"}


@pytest.mark.parametrize(
    "template, lost",
    [
        (chat.TAGS, True),  # writes the calls of the tool, so its name, and not what is declared
        (chat.CHATML.replace("m['content']", "(m['content'] or m.tool_calls | tojson)"), True),
        ("{{- tools | tojson }}" + chat.TAGS, False),
        ("{{- tools | string }}" + chat.TAGS, False),  # as Python writes it
        # neither description nor parameters
        ("{% for t in tools %}{{ t.function.name }}{% endfor %}" + chat.TAGS, True),
    ],
)
def test_tools_that_the_template_leaves_out_are_told(template, lost):
    messages = [user("hi"), calls("add", a=1), tool("2"), assistant("two")]
    [found] = ChatTokenizer(byte_tokenizer(template)).encode([Conversation("a:1", messages, TOOLS)])
    assert isinstance(found, RowError) == lost
    if lost:
        assert found.reason == "context-lost" and "the tool 'add'" in str(found)


def test_reasoning_of_earlier_turns_is_no_lost_context():
    talk = conversation("hi", "<think>\nthe\n</think>\n\nanswer", "and", "you", system="be")
    assert (
        "context-lost"
        not in encode(talk, byte_tokenizer(chat.QWEN3_TOOLS), on_lost_context="keep").notes
    )


def test_white_space_and_escapes_are_no_loss():
    template = chat.CHATML.replace(
        "m['content']",
        "(m['content'].split() | join(' ') if m['role'] == 'system' else m['content'])",
    )
    assert (
        len(
            encode(
                conversation("hi", "you", system='be  brief\n and "kind"'), byte_tokenizer(template)
            ).samples
        )
        == 1
    )
    results = [user("hi"), calls("add", a=1), tool('{"é": "x"}\n'), assistant("you")]
    assert len(encode(Conversation("a:1", results), byte_tokenizer(chat.LLAMA31)).samples) == 1


def test_a_template_that_reads_contents_as_parts_gets_parts():
    template = chat.CHATML.replace(
        "m['content']",
        "(m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)",
    )
    tokenizer = byte_tokenizer(template)
    [text] = shown(tokenizer, encode(conversation("hi", "you", system="be"), tokenizer))
    assert (
        text
        == "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[you<|im_end|>]]\n"
    )


def test_rows_of_tokens_tell_only_tokens_that_end_turns():
    """A row may be cut anywhere: another added token at its end is no end of a turn."""
    tokenizer = chat.byte_tokenizer(chat.CHATML)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    made = ChatTokenizer(tokenizer)
    for last, wanted in (
        (end, (end,)),
        (other, ()),
        (tokenizer.eos_token_id, (tokenizer.eos_token_id,)),
        (65, ()),
    ):
        row = Tokens("a", np.array([65, 66, last], np.int32), np.array([0, 1, 1], np.float32))
        [found] = made.encode([row])
        assert found.ends == wanted
