"""Golden masks, written by hand: texts in pieces, each trained or not, in the styles of the
templates of large models.
"""

import json

import pytest

from tests.data import chat
from tests.data.chat import call, encode, word_tokenizer
from torchsft.data.formats import Conversation, parse, recognise
from torchsft.data.rows import read_row
from torchsft.data.sources import Source
from torchsft.data.specs import parse_spec

TOOLS = [{"type": "function", "function": {"name": "add"}}]
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Bye."},
]
THINKING = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "reasoning_content": "A greeting.", "content": "Hello."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "reasoning_content": "The end.", "content": "Bye."},
]
TWO_ROUNDS = [
    {"role": "user", "content": "Add 1, 2 and 3."},
    {"role": "assistant", "content": None, "tool_calls": [call("add", {"a": 1, "b": 2})]},
    {"role": "tool", "tool_call_id": "c", "content": "3"},
    {"role": "assistant", "content": None, "tool_calls": [call("add", {"a": 3, "b": 3})]},
    {"role": "tool", "tool_call_id": "c", "content": "6"},
    {"role": "assistant", "content": "It is 6."},
]
FIRST, SECOND, LAST = 1, 3, 5  # assistant messages of the two rounds


def with_reasoning(messages, **reasoning):
    """The messages with reasoning: `m1="..."` that of message 1."""
    texts = {int(key[1:]): text for key, text in reasoning.items()}
    return [
        m | ({"reasoning_content": texts[i]} if i in texts else {}) for i, m in enumerate(messages)
    ]


CHATML_HEAD = (
    "<|im_start|>system\nBe "
    "brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
)
QWEN3_ROUNDS = (
    '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "add"}}\n<|im_end|>\n'
)
QWEN3_ROUNDS += "<|im_start|>user\nAdd 1, 2 and 3.<|im_end|>\n<|im_start|>assistant\n"
QWEN3_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
QWEN3_CALL_2 = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 3}}\n</tool_call><|im_end|>'
QWEN3_RESULT = (
    "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
QWEN3_RESULT_2 = (
    "\n<|im_start|>user\n<tool_response>\n6\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
V31_CALL = '<|calls|><|call|>add<|sep|>{"a": 1, "b": 2}<|end_call|><|end_calls|><eos>'
V31_CALL_2 = '<|calls|><|call|>add<|sep|>{"a": 3, "b": 3}<|end_call|><|end_calls|><eos>'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>'
LLAMA_CALL_2 = '{"name": "add", "parameters": {"a": 3, "b": 3}}<|eot_id|>'
LLAMA_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"

# name: template, its variables, messages, tools, samples (pieces, each with whether it is trained),
# notes
GOLDEN = {
    "chatml": (
        *(chat.CHATML, {}, TWO_TURNS, None),
        [
            [
                (CHATML_HEAD, False),
                ("Hello you.<|im_end|>", True),
                ("\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n", False),
                ("Bye.<|im_end|>", True),
                ("\n", False),
            ]
        ],
        (),
    ),
    "chatml, reasoning written into the content": (
        *(chat.CHATML, {}, THINKING, None),
        [
            [
                ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
                ("<think>\nA greeting.\n</think>\n\nHello.<|im_end|>", True),
                ("\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n", False),
                ("<think>\nThe end.\n</think>\n\nBye.<|im_end|>", True),
                ("\n", False),
            ]
        ],
        (),
    ),
    "llama 3": (
        *(chat.LLAMA3, {}, TWO_TURNS, None),
        [
            [
                ("<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", False),
                ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>" + LLAMA_ANSWER, False),
                ("Hello you.<|eot_id|>", True),
                (
                    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>" + LLAMA_ANSWER,
                    False,
                ),
                ("Bye.<|eot_id|>", True),
            ]
        ],
        (),
    ),
    "llama 3.1, two tool rounds": (
        *(chat.LLAMA31, {}, TWO_ROUNDS, TOOLS),
        [
            [
                ("<bos><|start_header_id|>user<|end_header_id|>\n\n", False),
                (
                    '[{"type": "function", "function": {"name": "add"}}]\nAdd 1, 2 and 3.<|eot_id|>'
                    + LLAMA_ANSWER,
                    False,
                ),
                (LLAMA_CALL, True),
                (
                    '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>' + LLAMA_ANSWER,
                    False,
                ),
                (LLAMA_CALL_2, True),
                (
                    '<|start_header_id|>ipython<|end_header_id|>\n\n"6"<|eot_id|>' + LLAMA_ANSWER,
                    False,
                ),
                ("It is 6.<|eot_id|>", True),
            ]
        ],
        (),
    ),
    "deepseek v3": (
        *(chat.DEEPSEEK_V3, {}, TWO_TURNS, None),
        [
            [
                ("<bos>Be brief.<|User|>Hi<|Assistant|>", False),
                ("Hello you.<eos>", True),
                ("<|User|>And now?<|Assistant|>", False),
                ("Bye.<eos>", True),
            ]
        ],
        (),
    ),
    "deepseek r1": (
        *(chat.DEEPSEEK_R1, {}, THINKING, None),
        [
            [
                ("<bos><|User|>Hi<|Assistant|><think>\n", False),
                ("A greeting.\n</think>\n\nHello.<eos>", True),
            ],
            [
                (
                    "<bos><|User|>Hi<|Assistant|>Hello.<eos><|User|>And now?<|Assistant|><think>\n",
                    False,
                ),
                ("The end.\n</think>\n\nBye.<eos>", True),
            ],
        ],
        ("split-by-turn", "closed-reasoning"),
    ),
    "deepseek v3.1, two tool rounds": (
        *(chat.DEEPSEEK_V31, {}, TWO_ROUNDS, None),
        [
            [
                ("<bos><|User|>Add 1, 2 and 3.<|Assistant|></think>", False),
                (V31_CALL, True),
                ("<|output|>3<|end_output|>", False),
                (V31_CALL_2, True),
                ("<|output|>6<|end_output|>", False),
                ("It is 6.<eos>", True),
            ]
        ],
        (),
    ),
    "deepseek v3.1, reasoning before two tool rounds": (
        *(
            chat.DEEPSEEK_V31,
            {"thinking": True},
            with_reasoning(TWO_ROUNDS, m1="First the small ones."),
            None,
        ),
        [
            [
                ("<bos><|User|>Add 1, 2 and 3.<|Assistant|><think>", False),
                ("First the small ones.</think>" + V31_CALL, True),
            ],
            [
                (
                    "<bos><|User|>Add 1, 2 and 3.<|Assistant|></think>"
                    + V31_CALL
                    + "<|output|>3<|end_output|>",
                    False,
                ),
                (V31_CALL_2, True),
                ("<|output|>6<|end_output|>", False),
                ("It is 6.<eos>", True),
            ],
        ],
        ("split-by-turn", "closed-reasoning"),
    ),
    "qwen 3, thinking": (
        *(chat.QWEN3_TOOLS, {}, THINKING, None),
        [
            [
                ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
                ("<think>\nA greeting.\n</think>\n\nHello.<|im_end|>", True),
                ("\n", False),
            ],
            [
                (
                    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n",
                    False,
                ),
                ("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n", False),
                ("<think>\nThe end.\n</think>\n\nBye.<|im_end|>", True),
                ("\n", False),
            ],
        ],
        ("split-by-turn",),
    ),
    "qwen 3, thinking switched off": (
        *(chat.QWEN3_TOOLS, {"enable_thinking": False}, TWO_TURNS[:3], None),
        [
            [
                (CHATML_HEAD + "<think>\n\n</think>\n\n", False),
                ("Hello you.<|im_end|>", True),
                ("\n", False),
            ]
        ],
        (),
    ),
    "qwen 3, reasoning in two tool rounds": (
        *(
            chat.QWEN3_TOOLS,
            {},
            with_reasoning(TWO_ROUNDS, m1="Small ones.", m3="Then 3.", m5="Done."),
            TOOLS,
        ),
        [
            [
                (QWEN3_ROUNDS, False),
                ("<think>\nSmall ones.\n</think>\n\n" + QWEN3_CALL, True),
                (QWEN3_RESULT, False),
                ("<think>\nThen 3.\n</think>\n\n" + QWEN3_CALL_2, True),
                (QWEN3_RESULT_2, False),
                ("<think>\nDone.\n</think>\n\nIt is 6.<|im_end|>", True),
                ("\n", False),
            ]
        ],
        (),
    ),
    "qwen 3, two tool rounds without reasoning": (
        *(chat.QWEN3_TOOLS, {}, TWO_ROUNDS, TOOLS),
        [
            [(QWEN3_ROUNDS, False), ("<think>\n\n</think>\n\n" + QWEN3_CALL, True), ("\n", False)],
            [
                (QWEN3_ROUNDS + QWEN3_CALL + QWEN3_RESULT, False),
                ("<think>\n\n</think>\n\n" + QWEN3_CALL_2, True),
                ("\n", False),
            ],
            [
                (QWEN3_ROUNDS + QWEN3_CALL + QWEN3_RESULT + QWEN3_CALL_2 + QWEN3_RESULT_2, False),
                ("<think>\n\n</think>\n\nIt is 6.<|im_end|>", True),
                ("\n", False),
            ],
        ],
        ("split-by-turn",),
    ),
    "channels": (
        *(chat.CHANNELS, {}, THINKING, None),
        [
            [
                ("<|start|>user<|message|>Hi<|end|><|start|>assistant", False),
                ("<|channel|>analysis<|message|>A greeting.<|end|>", True),
                ("<|start|>assistant<|channel|>final<|message|>Hello.<|return|>", True),
            ],
            [
                (
                    "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|end|>",
                    False,
                ),
                ("<|start|>user<|message|>And now?<|end|><|start|>assistant", False),
                ("<|channel|>analysis<|message|>The end.<|end|>", True),
                ("<|start|>assistant<|channel|>final<|message|>Bye.<|return|>", True),
            ],
        ],
        ("split-by-turn",),
    ),
    "arguments in tags": (
        *(chat.TAGS, {}, TWO_ROUNDS[:4], None),
        [
            [
                ("<|im_start|>user\nAdd 1, 2 and 3.<|im_end|>\n<|im_start|>assistant\n", False),
                ("<function=add><a>1<b>2<|im_end|>", True),
                ("\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n", False),
                ("<function=add><a>3<b>3<|im_end|>", True),
                ("\n", False),
            ]
        ],
        (),
    ),
}


def expected(tokenizer, pieces):
    """Ids and weights of a text in pieces; the word tokenizer makes the same tokens of the parts as
    of the whole.
    """
    ids, weights = [], []
    for text, trained in pieces:
        part = tokenizer(text, add_special_tokens=False).input_ids
        ids += part
        weights += [float(trained)] * len(part)
    return ids, weights


def words_of(samples):
    return "".join(text for pieces in samples for text, _ in pieces) + "<think>\n</think>"


@pytest.mark.parametrize("name", GOLDEN)
def test_masks_are_the_golden_ones(name):
    template, variables, messages, tools, samples, notes = GOLDEN[name]
    tokenizer = word_tokenizer(template, words_of(samples))
    found = encode(Conversation("a:1", messages, tools), tokenizer, template_kwargs=variables)
    assert [(ids.tolist(), weights.tolist()) for ids, weights in found.samples] == [
        expected(tokenizer, pieces) for pieces in samples
    ]
    assert found.notes == notes


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_texts_are_what_transformers_renders(name):
    """Of a conversation that is not split, the rendering of the whole; of the others the last
    sample, unless put together.
    """
    template, variables, messages, tools, samples, notes = GOLDEN[name]
    if "reasoning written" in name or "closed-reasoning" in notes:
        pytest.skip("the text is made of the rendering and the reasoning")
    tokenizer = word_tokenizer(template, words_of(samples))
    if "v3.1" in name:  # whose template takes arguments as JSON only
        messages = [
            m | ({"tool_calls": json_arguments(m["tool_calls"])} if "tool_calls" in m else {})
            for m in messages
        ]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables)
    assert "".join(piece for piece, _ in samples[-1]) == text


@pytest.mark.parametrize(
    "name",
    [
        "deepseek r1",
        "qwen 3, thinking",
        "deepseek v3.1, reasoning before two tool rounds",
        "channels",
    ],
)
@pytest.mark.parametrize(
    "opening, closing", [("<think>\n", "\n</think>\n\n"), ("<think>", "</think>")]
)
def test_reasoning_in_the_content_is_the_same_as_in_its_field(name, opening, closing):
    template, variables, messages, tools, samples, notes = GOLDEN[name]
    tokenizer = word_tokenizer(template, words_of(samples))
    inside = []
    for m in messages:
        inside.append({key: value for key, value in m.items() if key != "reasoning_content"})
        if "reasoning_content" in m:
            inside[-1]["content"] = (
                opening + m["reasoning_content"] + closing + (m["content"] or "")
            )
    found = encode(Conversation("a:1", inside, tools), tokenizer, template_kwargs=variables)
    assert [(ids.tolist(), weights.tolist()) for ids, weights in found.samples] == [
        expected(tokenizer, pieces) for pieces in samples
    ]
    assert found.notes == notes


def json_arguments(calls):
    return [
        c | {"function": c["function"] | {"arguments": json.dumps(c["function"]["arguments"])}}
        for c in calls
    ]


# What is masked with the reasoning, of the golden pieces.
REASONING = {
    "deepseek r1": ["A greeting.\n</think>\n\n", "The end.\n</think>\n\n"],
    "deepseek v3.1, reasoning before two tool rounds": ["First the small ones.</think>"],
    "qwen 3, thinking": ["<think>\nA greeting.\n</think>\n\n", "<think>\nThe end.\n</think>\n\n"],
    "qwen 3, two tool rounds without reasoning": ["<think>\n\n</think>\n\n"],
    "chatml, reasoning written into the content": [
        "<think>\nA greeting.\n</think>\n\n",
        "<think>\nThe end.\n</think>\n\n",
    ],
    "qwen 3, reasoning in two tool rounds": [
        *(
            "<think>\nSmall ones.\n</think>\n\n",
            "<think>\nThen 3.\n</think>\n\n",
            "<think>\nDone.\n</think>\n\n",
        )
    ],
    "channels": [
        "<|channel|>analysis<|message|>A greeting.<|end|>",
        "<|channel|>analysis<|message|>The end.<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ],
    "llama 3": [],
}


@pytest.mark.parametrize("name", REASONING)
def test_masked_reasoning_is_context_of_the_same_text(name):
    template, variables, messages, tools, samples, _ = GOLDEN[name]
    tokenizer = word_tokenizer(template, words_of(samples))
    masked = []
    for pieces in samples:
        masked.append([])
        for text, trained in pieces:
            head = next((part for part in REASONING[name] if trained and text.startswith(part)), "")
            masked[-1] += [(head, False), (text[len(head) :], trained)]
    found = encode(
        Conversation("a:1", messages, tools), tokenizer, reasoning="mask", template_kwargs=variables
    )
    assert [(ids.tolist(), weights.tolist()) for ids, weights in found.samples] == [
        expected(tokenizer, pieces) for pieces in masked
    ]


@pytest.mark.parametrize("name", [name for name in GOLDEN if "rounds" in name])
@pytest.mark.parametrize("arguments", ["object", "json"])
def test_two_tool_rounds_are_the_same_after_parquet(name, arguments, tmp_path):
    """Arrow gives every message every key, None where it had none; templates ask whether a key is
    there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    template, variables, messages, tools, samples, _ = GOLDEN[name]
    if arguments == "json":
        messages = [
            m | ({"tool_calls": json_arguments(m["tool_calls"])} if "tool_calls" in m else {})
            for m in messages
        ]
    row = {"messages": messages, "tools": tools}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    source = Source(parse_spec(str(tmp_path / "a.parquet")))
    rows = [read_row(payload)[0] for number, payload in source.rows()]
    assert len(rows) == 2
    tokenizer = word_tokenizer(template, words_of(samples))
    for row in rows:
        example = parse(row, recognise(row), "a:1")
        found = encode(example, tokenizer, template_kwargs=variables)
        assert [(ids.tolist(), weights.tolist()) for ids, weights in found.samples] == [
            expected(tokenizer, pieces) for pieces in samples
        ]
