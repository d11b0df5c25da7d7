# ruff: noqa: E501 (a template stands as it is published)
"""What is trained of a conversation in one text: masks by hand, tokens across a boundary, BOS, and
what is refused.

Conversations with tools, with reasoning, or split by turn: `test_golden.py`,
`test_template_properties.py`.
"""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.answers import answer_prompts
from tests.data import chat
from tests.data.chat import byte_tokenizer, call, conversation, encode, tokenize, word_tokenizer
from torchsft.config import InputError
from torchsft.data.formats import Conversation, Text, Tokens, parse
from torchsft.data.rows import RowError
from torchsft.data.template import ChatTokenizer, Sample
from torchsft.data.tokenizer import load_tokenizer

# The text that each template must produce, written by hand; what is trained of it stands between [[
# and ]].
CHATML_TEXT = (
    "<|im_start|>system\nBe "
    "brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[Hello you.<|im_end|>]]\n<|im_start|>user\nAnd "
    "now?<|im_end|>\n<|im_start|>assistant\n[[Bye.<|im_end|>]]\n"
)
LLAMA3_TEXT = (
    "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello you.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Bye.<|eot_id|>]]"
)
DEEPSEEK_TEXT = (
    "<bos>Be brief.<|User|>Hi<|Assistant|>[[Hello you.<eos>]]<|User|>And "
    "now?<|Assistant|>[[Bye.<eos>]]"
)
GOLDEN = {
    "chatml": (chat.CHATML, CHATML_TEXT),
    "chatml, generation block": (chat.CHATML_GENERATION, CHATML_TEXT),
    "chatml, block without end of turn": (chat.CHATML_GENERATION_WITHOUT_END, CHATML_TEXT),
    "chatml, block with the newline": (chat.CHATML_GENERATION_WITH_NEWLINE, CHATML_TEXT),
    "chatml, block with the header": (chat.CHATML_GENERATION_WITH_HEADER, CHATML_TEXT),
    "chatml, generation prompt unknown": (
        chat.CHATML.split("{% if add_generation_prompt")[0],
        CHATML_TEXT,
    ),
    "llama 3": (chat.LLAMA3, LLAMA3_TEXT),
    "llama 3, generation block": (chat.LLAMA3_GENERATION, LLAMA3_TEXT),
    "deepseek v3": (chat.DEEPSEEK_V3, DEEPSEEK_TEXT),
    "deepseek v3, generation block": (chat.DEEPSEEK_V3_GENERATION, DEEPSEEK_TEXT),
    "mistral": (
        chat.MISTRAL,
        "<bos>[INST] Be brief.\n\nHi [/INST][[ Hello you. <eos>]][INST] And now? [/INST][[ Bye. "
        "<eos>]]",
    ),
    "phi 3": (chat.PHI3, CHATML_TEXT + "<eos>"),
}
TURNS = ("Hi", "Hello you.", "And now?", "Bye.")
EVERY_TEMPLATE = {name: template for name, (template, _) in GOLDEN.items()}


def golden(tokenizer, text: str) -> tuple[list[int], list[float]]:
    """Ids and weights of an annotated text; the word tokenizer makes the same tokens of the parts
    as of the whole.
    """
    ids, weights = [], []
    for i, part in enumerate(re.split(r"\[\[|\]\]", text)):
        part_ids = tokenizer(part, add_special_tokens=False).input_ids
        ids += part_ids
        weights += [float(i % 2)] * len(part_ids)
    return ids, weights


@pytest.mark.parametrize("name", GOLDEN)
def test_mask_is_the_golden_one(name):
    template, text = GOLDEN[name]
    tokenizer = word_tokenizer(template, text)
    sample = tokenize(conversation(*TURNS, system="Be brief."), tokenizer, "assistant")
    ids, weights = golden(tokenizer, text)
    assert sample.tokens.tolist() == ids
    assert sample.weights.tolist() == weights


@pytest.mark.parametrize("name", GOLDEN)
def test_last_turn_trains_the_last_golden_span_alone(name):
    template, text = GOLDEN[name]
    tokenizer = word_tokenizer(template, text)
    sample = tokenize(conversation(*TURNS, system="Be brief."), tokenizer, "last-turn")
    ids, weights = golden(tokenizer, text.replace("[[", "", 1).replace("]]", "", 1))
    assert sample.tokens.tolist() == ids
    assert sample.weights.tolist() == weights


@pytest.mark.parametrize("name", GOLDEN)
def test_all_trains_everything_but_the_first_token(name):
    template, text = GOLDEN[name]
    tokenizer = word_tokenizer(template, text)
    sample = tokenize(conversation(*TURNS, system="Be brief."), tokenizer, "all")
    assert sample.tokens.tolist() == golden(tokenizer, text)[0]
    assert sample.weights.tolist() == [0.0] + [1.0] * (len(sample.tokens) - 1)


def test_a_trailing_user_turn_is_not_trained_and_the_answer_before_it_is():
    tokenizer = word_tokenizer(chat.CHATML, CHATML_TEXT)
    sample = tokenize(conversation("Hi", "Bye.", "And now?"), tokenizer, "last-turn")
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "Bye.<|im_end|>"


def test_a_word_of_the_answer_in_header_and_question_is_not_trained_there():
    tokenizer = word_tokenizer(chat.CHATML, "system user assistant\n")
    sample = tokenize(
        conversation("assistant", "assistant", "user", "user"), tokenizer, "assistant"
    )
    _, weights = golden(
        tokenizer,
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]\n"
        "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n[[user<|im_end|>]]\n",
    )
    assert sample.weights.tolist() == weights


def test_generation_blocks_agree_with_the_mask_of_transformers():
    tokenizer = byte_tokenizer(chat.LLAMA3_GENERATION)
    talk = conversation("hello", "the answer is you", "and?", "me", system="be")
    sample = tokenize(talk, tokenizer, "assistant")
    reference = tokenizer.apply_chat_template(
        talk.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.tokens.tolist() == reference["input_ids"]
    assert sample.weights.tolist() == reference["assistant_masks"]


# ---------------------------------------------------------------- properties

BYTE_TOKENIZERS = {name: byte_tokenizer(template) for name, template in EVERY_TEMPLATE.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_last_supervised_token_ends_the_turn_although_pad_is_eos(name):
    tokenizer = BYTE_TOKENIZERS[name]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sample = tokenize(conversation("hello", "the answer"), tokenizer, "assistant")
    last = sample.tokens[np.flatnonzero(sample.weights)[-1]]
    assert tokenizer.decode(last) in ("<|im_end|>", "<|eot_id|>", "<eos>")


@pytest.mark.parametrize("mask", ["assistant", "last-turn", "all"])
def test_many_conversations_at_once_equal_one_at_a_time(mask):
    tokenizer = byte_tokenizer(chat.QWEN3)
    talks = [
        conversation("hello", " \nyou", system="be"),
        conversation("hello", "<think>\nthe\n</think>\n\nanswer"),
        conversation("the", "answer", "is", "you"),
        Conversation("a:5", [{"role": "user", "content": "the"}]),
        Text("a:6", "the", "answer"),
        conversation("the", None),
        Tokens("a:8", np.array([1, 2, 3]), np.array([1.0, 0.0, 0.5])),
        conversation("the", "answer"),
    ] * 40  # more than are tokenised at once
    together = ChatTokenizer(tokenizer, mask=mask).encode(talks)
    assert len(together) == len(talks)
    chat_tokenizer = ChatTokenizer(tokenizer, mask=mask)
    for talk, found in zip(talks, together, strict=True):
        [alone] = chat_tokenizer.encode([talk])
        assert (str(found) if isinstance(found, RowError) else plain(found)) == (
            str(alone) if isinstance(alone, RowError) else plain(alone)
        )
    faults = [i for i, found in enumerate(together) if isinstance(found, RowError)]
    assert faults and all(talks[i].id == together[i].where for i in faults)


def plain(encoded):
    return [(ids.tolist(), weights.tolist()) for ids, weights in encoded.samples], encoded.notes


def test_answer_prompts_gives_each_answer_with_all_that_precedes_it():
    sample = Sample("a:1", [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 0])
    assert answer_prompts(sample) == [([1, 2], [3, 4]), ([1, 2, 3, 4, 5], [6])]
    assert answer_prompts(Sample("a:2", [1, 2], [0, 1])) == [([1], [2])]


# ---------------------------------------------------------------- tokens across a boundary


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("answer", ["\nhello", "\n\n", " hello", "hello\n", "\n"])
def test_no_token_joins_header_and_answer(answer, trim_offsets):
    tokenizer = byte_tokenizer(chat.CHATML, trim_offsets=trim_offsets)
    [(prompt, target)] = answer_prompts(
        tokenize(conversation("hello", answer), tokenizer, "assistant")
    )
    assert tokenizer.decode(prompt).endswith("assistant\n")
    assert tokenizer.decode(target) == answer + "<|im_end|>"


def test_a_space_before_the_answer_that_belongs_to_the_header_is_not_trained():
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_tokenizer(template)
    # joined, left to itself
    assert " hello" in [tokenizer.decode(i) for i in tokenizer("assistant: hello").input_ids]
    [(prompt, target)] = answer_prompts(
        tokenize(conversation("you", "hello"), tokenizer, "assistant")
    )
    assert (tokenizer.decode(prompt), tokenizer.decode(target)) == (
        "user: you<eos>assistant: ",
        "hello<eos>",
    )


def test_a_tokenizer_that_changes_the_text_when_split_is_refused():
    vocabulary = ["<unk>", *chat.SPECIAL, "▁user:hi", "▁assistant:yes", "▁assistant:", "▁yes"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(chat.SPECIAL)
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    with pytest.raises(
        InputError,
        match=r"chat\.jsonl:7: a token reaches from the prompt into an "
        r"assistant turn",
    ):
        tokenize(conversation("hi", "yes"), chat.wrap(tokenizer, template), "assistant")


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize("system", [None, "be"])
@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize(
    "template", [chat.DEEPSEEK_V3, chat.CHATML], ids=["template writes it", "template does not"]
)
def test_a_conversation_has_the_bos_of_its_template_whatever_the_tokenizer_adds(
    template, mask, system
):
    tokenizer = byte_tokenizer(template, add_bos=True)
    assert tokenizer("hello").input_ids[0] == tokenizer.bos_token_id
    talk = conversation("hello", "you", system=system)
    sample = tokenize(talk, tokenizer, mask)
    assert (
        sample.tokens.tolist()
        == tokenizer.apply_chat_template(talk.messages, return_dict=True)["input_ids"]
    )
    assert sample.weights[0] == 0
    if mask == "assistant":
        assert tokenizer.decode(sample.tokens[sample.weights > 0]).startswith("you<")


def test_no_bos_where_neither_template_nor_tokenizer_writes_one():
    tokenizer = byte_tokenizer(chat.CHATML)
    assert (
        tokenizer.bos_token_id
        not in tokenize(conversation("hello", "you"), tokenizer, "assistant").tokens
    )


def test_two_bos_from_the_template_are_refused():
    with pytest.raises(InputError, match=r"chat\.jsonl:7: the text begins with two BOS tokens"):
        tokenize(
            conversation("a", "b"), byte_tokenizer("{{ bos_token }}" + chat.LLAMA3), "assistant"
        )


# ---------------------------------------------------------------- reasoning, and templates that
# rewrite


def targets(tokenizer, encoded):
    """The decoded targets of each sample."""
    return [tokenizer.decode(ids[weights > 0]) for ids, weights in encoded.samples]


def fault(example, template, mask="assistant", **options):
    [found] = ChatTokenizer(byte_tokenizer(template), mask=mask, **options).encode([example])
    assert isinstance(found, RowError)
    return found


def test_reasoning_that_a_template_cuts_out_with_nothing_to_open_it_is_refused_or_masked():
    talk = conversation("hi", "<think>\nthe\n</think>answer")
    template = chat.DEEPSEEK_R1.replace("<think>\n", "")
    found = fault(talk, template)
    assert found.reason == "reasoning-lost"
    assert str(found).startswith(
        "chat.jsonl:7: message 2: the chat template leaves out or changes its reasoning ('the');"
    )
    tokenizer = byte_tokenizer(template)
    assert targets(tokenizer, encode(talk, tokenizer, reasoning="mask")) == ["answer<eos>"]


@pytest.mark.parametrize("template", [chat.KEEPS_LAST_REASONING, chat.QWEN3, chat.QWEN3_GENERATION])
def test_history_without_reasoning_gives_each_answer_a_sample_with_the_context_of_inference(
    template,
):
    tokenizer = byte_tokenizer(template)
    talk = conversation("hi", "<think>\nthe\n</think>answer", "and", "<think>\nme\n</think>\n\nyou")
    first, second = encode(talk, tokenizer).samples
    assert tokenize(talk, tokenizer, "last-turn").tokens.tolist() == second[0].tolist()
    for (ids, weights), answer in zip((first, second), (1, 3), strict=True):
        [(prompt, target)] = answer_prompts(Sample("a", ids, weights))
        rendered = tokenizer.apply_chat_template(
            talk.messages[:answer], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(prompt) == rendered
        # What the generation prompt already says is not trained: "<think>\n" of the R1-like
        # template.
        opened = template == chat.KEEPS_LAST_REASONING
        assert rendered.endswith("<think>\n") == opened
        text = talk.messages[answer]["content"].removeprefix("<think>\n" if opened else "")
        assert tokenizer.decode(target) == text + ("<eos>" if opened else "<|im_end|>")


def test_reasoning_that_the_generation_prompt_opens_is_trained_behind_that_opening():
    """The template keeps contents as they are: only the conversation itself shows that the prompt
    is a prefix.
    """
    tokenizer = byte_tokenizer(chat.DEEPSEEK_R1.replace(".split('</think>')[-1]", ""))
    found = encode(conversation("hi", "<think>\nme\n</think>you"), tokenizer)
    assert (targets(tokenizer, found), found.notes) == (["me\n</think>you<eos>"], ())


def test_an_answer_without_reasoning_closes_the_block_that_its_prompt_opens():
    tokenizer = byte_tokenizer(chat.DEEPSEEK_R1)
    talk = conversation("hi", " the answer", "and", "you")
    found = encode(talk, tokenizer)
    assert targets(tokenizer, found) == ["\n</think>\n\n the answer<eos>", "\n</think>\n\nyou<eos>"]
    assert found.notes == ("split-by-turn", "closed-reasoning")
    assert targets(tokenizer, encode(talk, tokenizer, reasoning="mask")) == [
        " the answer<eos>",
        "you<eos>",
    ]


def test_reasoning_that_the_template_writes_in_another_way_than_its_prompt_opens_it_follows_the_prompt():
    writes = (
        "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + "
        "m['content']"
    )
    tokenizer = byte_tokenizer(
        chat.DEEPSEEK_R1.replace("m['content'].split('</think>')[-1]", writes)
    )
    messages = conversation("hi", "you").messages
    messages[1]["reasoning_content"] = "me"
    found = encode(Conversation("a:1", messages), tokenizer)
    assert (targets(tokenizer, found), found.notes) == (
        ["me\n</think>\n\nyou<eos>"],
        ("closed-reasoning",),
    )


@pytest.mark.parametrize("block", ["<think></think>", "</think>"])
def test_reasoning_is_not_written_into_a_content_before_which_the_template_writes_its_own_block(
    block,
):
    template = chat.CHATML.replace(
        "m['content'] +", f"('{block}' if m['role'] == 'assistant' else '') + m['content'] +"
    )
    assert (
        fault(conversation("hi", "<think>\nme\n</think>\n\nyou"), template).reason
        == "reasoning-lost"
    )


@pytest.mark.parametrize("block", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_reasoning_that_a_block_of_the_template_stands_for_follows_the_prompt_that_opens_it(block):
    """The rendering begins with the prompt, yet has no reasoning."""
    template = chat.DEEPSEEK_R1.replace(
        "'<|Assistant|>' + m['content']", f"'<|Assistant|>{block}' + m['content']"
    )
    tokenizer = byte_tokenizer(template)
    found = encode(conversation("hi", "<think>\nme\n</think>\n\nyou"), tokenizer)
    assert (targets(tokenizer, found), found.notes) == (
        ["me\n</think>\n\nyou<eos>"],
        ("closed-reasoning",),
    )


def test_the_refusals_of_a_prompt_and_of_an_end_show_where():
    template = chat.CHATML.replace("assistant\n' }}{% endif", "assistant:' }}{% endif")
    assert (
        r"the turn ('\nhello<|im_end|>\n') in another way than its generation prompt (':')"
        in str(fault(conversation("hi", "hello"), template))
    )
    template = chat.CHATML.replace("<|im_end|>", "")
    assert "such as the token with which the next turn begins" in str(
        fault(conversation("hi", "hello"), template)
    )


def test_a_template_that_trims_trains_the_trimmed_answer_also_with_reasoning():
    tokenizer = byte_tokenizer(
        chat.QWEN3.replace("m['content'] if m['role']", "m['content'] | trim if m['role']")
    )
    sample = tokenize(
        conversation(" hi ", " \n<think>\nme\n</think>you \n"), tokenizer, "assistant"
    )
    assert (
        tokenizer.decode(sample.tokens[sample.weights > 0]) == "<think>\nme\n</think>you<|im_end|>"
    )
    sample = tokenize(
        conversation(" hi ", " \n<think>\nme\n</think>you \n"), tokenizer, reasoning="mask"
    )
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "you<|im_end|>"


def test_an_end_of_turn_that_only_the_last_answer_has_splits_the_conversation():
    tokenizer = byte_tokenizer(
        chat.CHATML.replace(
            "<|im_end|>\n' }}",
            "' + ('<|im_end|>' if loop.last or m['role'] == 'user' else '\n') }}",
        )
    )
    found = encode(conversation("hi", "hello", "and", "you"), tokenizer)
    assert targets(tokenizer, found) == ["hello<|im_end|>", "you<|im_end|>"]


@pytest.mark.parametrize(
    "template, reason",
    [
        (chat.CHATML.replace("m['content'] + '<|im_end|>\n'", "m['content'] + '\n'"), "no-end-of-turn"),
        (chat.CHATML.replace("<|im_end|>", "### end"), "no-end-of-turn"),
        (chat.CHATML.replace("m['content']", "m['content'] | upper"), "text-lost"),
        (chat.CHATML.replace("m['content']", "''"), "text-lost"),
        (chat.CHATML_GENERATION.replace("{% generation %}", "{% generation %}{% endgeneration %}{% "
                                                            "if 1 %}").replace(
            "'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>' }}{% endif %}"), "generation-blocks"),
        (chat.CHATML_GENERATION.replace("{% generation %}{{ m['content'] +", "{{ m['content'] }}{% "
                                                                             "generation %}{{"),
            "generation-blocks"),
        (chat.CHATML.replace("assistant\n' }}{% endif", "assistant:' }}{% endif"), "not-prefix-stable"),
        ("{{ raise_exception('no system turns, please') }}", "template"),
        ("{% for m in messages %}", "template"),
    ],
)  # fmt: skip
def test_an_unusable_template_is_refused_and_the_conversation_named(template, reason):
    found = fault(conversation("hi", "hello", "and", "you"), template)
    assert found.reason == reason
    assert str(found).startswith("chat.jsonl:7: ")
    assert "\n" not in str(found)


# ---------------------------------------------------------------- tool calls


@pytest.mark.parametrize(
    "template, calls, reason",
    [
        # knows no calls
        (chat.CHATML.replace("m['content']", "(m['content'] or '')"), [call("add", {"a": 1})], "text-lost"),
        (chat.QWEN3_TOOLS.replace("call.function.arguments | tojson", "'{}'").replace("is string", "is number"),
            [call("add", {"a": {"b": ["deep"]}})], "text-lost"),
        (chat.LLAMA31, [call("add", "{not JSON")], "tool-arguments"),
        (chat.LLAMA31, [call("add", "[1]")], "tool-arguments"),
        (chat.LLAMA31, [call("add", {}), call("add", {})], "template"),
    ],
)  # fmt: skip
def test_tool_calls_that_do_not_come_out_are_refused(template, calls, reason):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    assert fault(Conversation("a:1", messages), template).reason == reason


@pytest.mark.parametrize("template", [chat.QWEN3_TOOLS, chat.LLAMA31, chat.DEEPSEEK_V31])
@pytest.mark.parametrize(
    "arguments", [{"a": 'é "x"\n', "n": 1.5}, '{"a": "é \\"x\\"\\n", "n": 1.5}']
)
def test_arguments_are_the_same_as_an_object_and_as_json(template, arguments):
    tokenizer = byte_tokenizer(template)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call("add", arguments)]},
    ]
    [found] = targets(tokenizer, encode(Conversation("a:1", messages), tokenizer, reasoning="mask"))
    assert json.loads(found[found.index('{"a"') : found.index("1.5}") + 4]) == {
        "a": 'é "x"\n',
        "n": 1.5,
    }


def called(arguments, content=None, reasoning=None):
    """A question and a tool call."""
    answer = {"role": "assistant", "content": content, "tool_calls": [call("add", arguments)]}
    answer |= {"reasoning_content": reasoning} if reasoning else {}
    return Conversation("a:1", [{"role": "user", "content": "hi"}, answer])


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    "writes",
    [
        "m.content | string",  # the word None
        "(raise_exception('no content') if m.content is none else m.content)",
        "(raise_exception('content beside calls') if m.tool_calls and m.content is not none else "
        "m.content or '')",
    ],
)
def test_no_content_beside_tool_calls_is_given_as_the_template_takes_it(writes, content):
    tokenizer = byte_tokenizer(chat.TAGS.replace("(m.content or '')", writes))
    found = encode(called({"a": "x"}, content), tokenizer)
    assert targets(tokenizer, found) == ["<function=add><a>x<|im_end|>"]


def test_reasoning_is_masked_where_the_template_writes_no_content_beside_tool_calls():
    writes = "((m.reasoning_content or '') + '\n' if m.tool_calls else m.content)"
    tokenizer = byte_tokenizer(chat.TAGS.replace("(m.content or '')", writes))
    found = encode(called({"a": "x"}, reasoning="me"), tokenizer, reasoning="mask")
    assert targets(tokenizer, found) == ["<function=add><a>x<|im_end|>"]


@pytest.mark.parametrize("content", ["m.content or ''", "m.content"])  # the second refuses None
def test_arguments_that_a_template_writes_without_quotes_are_given_as_an_object(content):
    writes = (
        "{{- '{' }}{%- for name, value in call.function.arguments.items() %}{{- name + ':' + value "
        "}}{%- endfor %}{{- '}' }}"
    )
    as_string = (
        "{%- if call.function.arguments is string %}{{- call.function.arguments }}{%- else %}"
        + writes
        + "{%- endif %}"
    )
    start, end = (
        chat.TAGS.index("        {%- for name, value"),
        chat.TAGS.index("    {%- endfor %}\n    {{- '<|im_end|>"),
    )
    template = (chat.TAGS[:start] + as_string + chat.TAGS[end:]).replace("m.content or ''", content)
    tokenizer = byte_tokenizer(template)
    for arguments in ({"a": "x"}, '{"a": "x"}'):
        assert targets(tokenizer, encode(called(arguments), tokenizer)) == [
            "<function=add>{a:x}<|im_end|>"
        ]


def test_masked_reasoning_that_is_written_behind_the_tool_calls_is_refused():
    template = chat.TAGS.replace("(m.content or '')", "''").replace(
        "{{- '<|im_end|>\n' }}",
        "{{- (m.reasoning_content or '') + (m.content or '') + '<|im_end|>\n' }}",
    )
    assert len(encode(called({"a": "x"}, reasoning="me"), byte_tokenizer(template)).samples) == 1
    found = fault(called({"a": "x"}, reasoning="me"), template, reasoning="mask")
    assert found.reason == "text-lost"
    assert "writes its tool call before the end of its reasoning" in str(found)


# ---------------------------------------------------------------- weights


def test_message_weights_are_those_of_their_turns():
    tokenizer = word_tokenizer(chat.CHATML, CHATML_TEXT)
    talk = conversation(*TURNS, system="Be brief.")
    ids, golden_weights = golden(tokenizer, CHATML_TEXT)
    for first, second in ((0.5, 2.0), (0.0, None), (None, 0.25)):
        weighted = Conversation(talk.id, talk.messages, None, (None, None, first, 0.0, second))
        sample = tokenize(weighted, tokenizer)
        values = [1.0 if value is None else value for value in (first, second)]
        # which trained turn a token is of, or follows
        turn = np.cumsum(np.diff([0.0, *golden_weights]) > 0) - 1
        assert sample.tokens.tolist() == ids
        assert sample.weights.tolist() == [
            values[t] if w else 0.0 for t, w in zip(turn, golden_weights, strict=True)
        ]


def test_no_weight_at_all_leaves_a_sample_without_targets():
    talk = conversation("hi", "hello")
    sample = tokenize(
        Conversation(talk.id, talk.messages, None, (None, 0.0)), byte_tokenizer(chat.CHATML)
    )
    assert len(sample.tokens) and not sample.weights.any()


def test_a_message_of_weight_0_is_neither_checked_nor_given_a_sample():
    talk = conversation(
        "hi", "<think>\nthe\n</think>\n\nanswer", "and", "<think>\nme\n</think>\n\nyou"
    )
    weighted = Conversation(talk.id, talk.messages, None, (None, 0.0, None, None))
    tokenizer = byte_tokenizer(chat.QWEN3_TOOLS)
    found = encode(weighted, tokenizer)
    assert (targets(tokenizer, found), found.notes) == (
        ["<think>\nme\n</think>\n\nyou<|im_end|>"],
        (),
    )
    lossy = chat.CHATML.replace("m['content']", "m['content'] | replace('answer', '')")
    assert fault(talk, lossy).reason == "text-lost"
    assert len(encode(weighted, byte_tokenizer(lossy)).samples) == 1


def test_last_turn_trains_the_tool_rounds_of_the_last_answered_question():
    tokenizer = byte_tokenizer(chat.DEEPSEEK_V31)
    messages = [
        *conversation("hi", "hello", "add").messages,
        {"role": "assistant", "tool_calls": [call("add", {"a": 1})]},
    ]
    messages += [
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "ok"},
    ]
    found = encode(Conversation("a:1", messages), tokenizer, "last-turn")
    assert targets(tokenizer, found) == [
        '<|calls|><|call|>add<|sep|>{"a": 1}<|end_call|><|end_calls|><eos>one<eos>'
    ]


@pytest.mark.parametrize("template", [chat.CHATML, chat.PHI3, chat.LLAMA3])
def test_with_the_mask_all_weights_are_those_of_any_message(template):
    tokenizer = byte_tokenizer(template)
    talk = conversation(*TURNS, system="Be brief.")
    sample = tokenize(
        Conversation(talk.id, talk.messages, None, (0.0, None, 0.5, None, None)), tokenizer, "all"
    )
    text = {w: tokenizer.decode(sample.tokens[sample.weights == w]) for w in (0.0, 0.5, 1.0)}
    assert text[0.5] in ("Hello you.<|im_end|>", "Hello you.<|eot_id|>")
    assert "Be brief." in text[0.0] and "Hi" not in text[0.0] and "Bye." not in text[0.0]
    assert all(part in text[1.0] for part in ("Hi", "And now?", "Bye."))


@pytest.mark.parametrize("template", [chat.CHATML, chat.PHI3, chat.LLAMA3])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_with_the_mask_all_the_weight_of_a_row_scales_all_of_it(template, weight):
    tokenizer, user = byte_tokenizer(template), {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "No."}
    row = {"messages": [user | {"weight": 0}, answer | {"weight": 2}, user, answer]}
    forms = {
        "messages": row,
        "text": {"text": "Hi. Bye."},
        "prompt-completion": {"prompt": "Hi.", "completion": " Bye."},
    }
    for form, given in forms.items():
        whole, scaled = (
            tokenize(parse({**given, **more}, form, "a:1"), tokenizer, "all")
            for more in ({}, {"weight": weight})
        )
        assert whole.weights.max() == (2.0 if form == "messages" else 1.0)
        np.testing.assert_array_equal(scaled.weights, whole.weights * weight)


@pytest.mark.parametrize("template", [chat.QWEN3_TOOLS, chat.CHATML])
def test_with_the_mask_all_reasoning_can_be_masked(template):
    talk = conversation("hi", "<think>\nthe\n</think>\n\nanswer")
    tokenizer = byte_tokenizer(template)
    sample = tokenize(talk, tokenizer, "all", reasoning="mask")
    assert (
        tokenizer.decode(sample.tokens[1:][sample.weights[1:] == 0]) == "<think>\nthe\n</think>\n\n"
    )


def test_with_the_mask_all_a_message_that_is_rewritten_later_can_have_no_weight():
    talk = conversation("hi", "<think>\nthe\n</think>\n\nanswer", "and", "you")
    weighted = Conversation(talk.id, talk.messages, None, (None, 0.5, None, None))
    for example, reasoning in ((weighted, "train"), (talk, "mask")):
        assert (
            fault(example, chat.QWEN3_TOOLS, mask="all", reasoning=reasoning).reason
            == "not-prefix-stable"
        )


def test_with_the_mask_all_nothing_that_an_assistant_says_may_be_lost():
    talk = conversation("hi", "<think>\nme\n</think>\n\nanswer", "and", "you")
    found = fault(talk, chat.QWEN3_TOOLS, mask="all")
    assert found.reason == "reasoning-lost"
    assert str(found).endswith(
        "message 2: the chat template leaves out or changes its reasoning ('me'); set --data.mask "
        "assistant"
    )
    lossy = chat.CHATML.replace("m['content']", "m['content'] | replace('answer', '')")
    assert (
        fault(conversation("hi", "answer", "and", "you"), lossy, mask="all").reason == "text-lost"
    )
    silent = chat.TAGS.replace("m.tool_calls or []", "[]")
    assert fault(called({"a": "x"}, "answer"), silent, mask="all").reason == "text-lost"


# ---------------------------------------------------------------- text and tokens


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("completion", [" hello", "\nhello", "hello<eos>", ""])
def test_text_trains_the_completion_and_the_end(completion, add_bos):
    tokenizer = byte_tokenizer(chat.CHATML, add_bos=add_bos)
    sample = tokenize(Text("a:1", "the answer is\n", completion, 0.5), tokenizer)
    assert (
        tokenizer.decode(sample.tokens[sample.weights > 0])
        == completion.removesuffix("<eos>") + "<eos>"
    )
    assert set(sample.weights.tolist()) == {0.0, 0.5}
    assert (
        tokenizer.decode(sample.tokens[sample.weights == 0])
        == "<bos>" * add_bos + "the answer is\n"
    )


def test_text_without_a_prompt_trains_all_but_the_first_token():
    tokenizer = byte_tokenizer(chat.CHATML)
    sample = tokenize(Text("a:1", "", "the answer"), tokenizer)
    assert sample.tokens.tolist() == tokenizer("the answer<eos>").input_ids
    assert sample.weights.tolist() == [0.0] + [1.0] * (len(sample.tokens) - 1)


def test_tokens_stay_as_they_are_and_nothing_predicts_the_first():
    [(ids, weights)] = encode(
        Tokens("a:1", [5, 6, 7], [1.0, 0.0, 0.5]), byte_tokenizer(chat.CHATML)
    ).samples
    assert (ids.tolist(), ids.dtype, weights.tolist(), weights.dtype) == (
        [5, 6, 7],
        np.int32,
        [0.0, 0.0, 0.5],
        np.float32,
    )


# ---------------------------------------------------------------- loading a tokenizer


def save_like_deepseek(directory):
    """A directory as DeepSeek publishes it: LlamaTokenizerFast in name, byte-level BPE in fact."""
    byte_tokenizer(chat.DEEPSEEK_V3).backend_tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
    }
    settings |= {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "chat_template": chat.DEEPSEEK_V3,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    return settings


def test_load_tokenizer_reads_a_deepseek_directory_as_transformers_does(tmp_path):
    save_like_deepseek(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "hello  you\n\n and me, 12345 é"
    # theirs has lost add_bos_token
    assert ours(text).input_ids == [
        ours.bos_token_id,
        *theirs(text, add_special_tokens=False).input_ids,
    ]
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == (
        "<bos>",
        "<eos>",
        chat.DEEPSEEK_V3,
    )
    sample = tokenize(conversation("hello", "you", system="be"), ours, "assistant")
    assert np.flatnonzero(sample.tokens == ours.bos_token_id).tolist() == [0]


def test_load_tokenizer_refuses_code_of_a_model_directory_and_does_not_run_it(tmp_path):
    """As Moonlight is published: tiktoken.model and a Python file."""
    (tmp_path / "tiktoken.model").write_text("aGVsbG8= 0\n")
    (tmp_path / "tokenization_moonshot.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": auto_map, "chat_template": chat.CHATML})
    )
    with pytest.raises(InputError, match=r"has no tokenizer\.json, only tiktoken\.model; convert"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_load_tokenizer_names_what_is_wrong_with_a_directory(tmp_path):
    with pytest.raises(InputError, match="absent is not a directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no tokenizer\.json; convert"):
        load_tokenizer(tmp_path)
    settings = save_like_deepseek(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({k: settings[k] for k in settings if k != "chat_template"})
    )
    with pytest.raises(InputError, match=r"has no chat template; add"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": 5}))
    with pytest.raises(InputError, match=r"has no chat template; add"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow is a slow tokenizer"):
        ChatTokenizer(Slow())


def test_the_given_tokenizer_is_left_as_it_is():
    tokenizer = byte_tokenizer(chat.CHATML)
    before = tokenizer.backend_tokenizer.to_str()
    tokenize(conversation("hi", "you"), tokenizer, "assistant")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.backend_tokenizer.to_str() == before
