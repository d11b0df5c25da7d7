"""Tokens as text: pieces join to what the tokenizer decodes, and turns are found by the template's
headers.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data import chat
from tests.tools.inspection.samples import sample
from tools.inspection.reading import Reader

WORDS = "system user assistant tool think hello the answer is 4 \n . INST [ ] /"
READER = Reader(chat.byte_tokenizer(chat.CHATML))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
@example("a\ufffdb\ufffd")
def test_pieces_join_to_the_text(text):
    tokens = READER.backend.encode(text, add_special_tokens=False).ids
    pieces = READER.pieces(tokens)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.count for piece in pieces) == len(tokens)


def test_tokens_of_one_character_stand_together():
    tokens = READER.backend.encode("a🙂b", add_special_tokens=False).ids
    assert len(tokens) == 6  # four bytes
    assert READER.pieces(tokens) == [(1, "a"), (4, "🙂"), (1, "b")]


def test_bytes_that_are_no_character_do_not_take_their_neighbours_along():
    broken = READER.backend.encode("🙂", add_special_tokens=False).ids[:2]
    after = READER.backend.encode("abc", add_special_tokens=False).ids
    pieces = READER.pieces([*broken, *after])
    assert sum(piece.count for piece in pieces) == 2 + len(after)
    assert "".join(piece.text for piece in pieces).endswith("abc")


def test_an_id_that_the_tokenizer_does_not_have_writes_nothing():
    assert READER.pieces([10**6]) == [(1, "")]


@pytest.mark.parametrize(
    ("template", "text", "turns"),
    [
        (
            chat.CHATML,
            "<|im_start|>system\nhello<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>\n",
            [
                ("system", "<|im_start|>system\n"),
                ("user", "<|im_start|>user\n"),
                ("assistant", "<|im_start|>assistant\n"),
            ],
        ),
        (
            chat.LLAMA3,
            "<bos><|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
            [
                ("user", "<bos><|start_header_id|>user<|end_header_id|>\n\n"),
                ("assistant", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
            ],
        ),
        (  # the system turn has no header
            chat.DEEPSEEK_V3,
            "<bos>hello<|User|>the<|Assistant|>answer<eos><|User|>is<|Assistant|>4<eos>",
            [
                ("system", ""),
                ("user", "<|User|>"),
                ("assistant", "<|Assistant|>"),
                ("user", "<|User|>"),
                ("assistant", "<|Assistant|>"),
            ],
        ),
        (chat.CHATML, "hello the answer", [("", "")]),
    ],
)
def test_turns_and_their_headers(template, text, turns):
    tokenizer = chat.word_tokenizer(template, WORDS)
    reader = Reader(tokenizer)
    tokens = sample(tokenizer, text).tokens
    blocks = reader.blocks(reader.pieces(tokens))
    assert [
        (block.role, reader.text(tokens[block.start : block.content])) for block in blocks
    ] == turns
    assert [block.start for block in blocks] == [
        0,
        *(block.end for block in blocks[:-1]),
    ] and blocks[-1].end == len(tokens)


def test_headers_of_tool_results_and_of_what_follows_them():
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<reply>' + "
        "m['content'] + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + "
        "(c['function']['arguments'] | tojson) }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
        "'<|im_start|>assistant\n' }}{% endif %}"
    )
    found = {(header.role, header.text) for header in Reader(chat.byte_tokenizer(template)).headers}
    assert found == {
        ("system", "<|im_start|>system\n"),
        ("user", "<|im_start|>user\n"),
        ("assistant", "<|im_start|>assistant\n"),
        ("tool", "<|im_start|>user\n<reply>"),
    }


@pytest.mark.parametrize("thinking", [True, False])
def test_headers_where_the_users_turn_has_no_end_token(thinking):
    reader = Reader(chat.byte_tokenizer(chat.DEEPSEEK_V31), {"thinking": thinking})
    prompt = "<|Assistant|><think>" if thinking else "<|Assistant|></think>"
    assert reader.prompt == prompt
    assert {(header.role, header.text) for header in reader.headers} == {
        ("user", "<|User|>"),
        ("assistant", prompt),
        ("assistant", "<|Assistant|></think>"),
        ("assistant", "<|Assistant|>"),
        ("tool", "<|output|>"),
        ("assistant", "<|end_output|>"),  # behind a tool result: no other one stands there
    }


def test_what_follows_a_tool_result_without_an_end_token():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% elif "
        "m['role'] == 'tool' %}"
        "{{ '<|output|>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|Assistant|></think>' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + '{\"b\"}' }}{% endfor %}{{ "
        "eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|></think>' }}{% endif %}"
    )
    found = {(header.role, header.text) for header in Reader(chat.byte_tokenizer(template)).headers}
    assert ("assistant", "<|Assistant|></think>") in found and (
        "assistant",
        "</think>",
    ) not in found


def test_a_template_that_refuses_everything_has_no_headers():
    reader = Reader(chat.byte_tokenizer("{{ raise_exception('no') }}"))
    assert reader.headers == [] and reader.prompt == ""
    assert reader.blocks(reader.pieces(reader.backend.encode("hello").ids))[0].role == ""
