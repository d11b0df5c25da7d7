"""Random conversations through templates of every kind: what is trained, in which context, once
each.

The expected texts are written here from the messages, template by template; contexts come from
transformers.
"""

import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.answers import answer_prompts
from tests.data import chat
from tests.data.chat import byte_tokenizer, call, encode
from torchsft.data.formats import Conversation
from torchsft.data.rows import RowError
from torchsft.data.template import ChatTokenizer, Encoded, Sample

# Text as people write it: any characters, often with spaces and newlines at the ends; tags of
# reasoning come on purpose only.
anything = st.text(
    st.one_of(st.sampled_from(" \n\t"), st.characters(exclude_categories=["Cs", "Co"])), max_size=12
)
texts = anything.filter(lambda text: "think>" not in text)
reasonings = texts.map(lambda text: text.strip()).filter(bool)
arguments = st.dictionaries(
    st.sampled_from("abc"),
    st.one_of(texts, st.integers(-9, 9), st.lists(texts, max_size=2)),
    max_size=2,
)


@st.composite
def conversations(draw, tools=False, reasoning=False):
    """Questions and answers; with `tools`, rounds of calls and results before an answer."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": [call("add", draw(arguments))]}
            )
            messages.append({"role": "tool", "tool_call_id": "c", "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)})
    if reasoning:
        for message in messages:
            if message["role"] == "assistant" and draw(st.booleans()):
                message["reasoning_content"] = draw(reasonings)
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(texts)})
    return messages


def plain(end, clean=str):
    """What a template that just writes contents trains of an answer."""
    return lambda m: (
        clean(block(m) + m["content"] if "reasoning_content" in m else m["content"]) + end
    )


def block(m):
    return f"<think>\n{m.get('reasoning_content', '')}\n</think>\n\n"


def qwen3(m):
    calls = "".join(
        f'<tool_call>\n{{"name": "add", "arguments": '
        f"{dumps(c['function']['arguments'])}}}\n</tool_call>"
        for c in m.get("tool_calls", ())
    )
    return block(m) + (m["content"] or "") + calls + "<|im_end|>"


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def llama31(m):
    if "tool_calls" in m:
        return (
            f'{{"name": "add", "parameters": '
            f"{dumps(m['tool_calls'][0]['function']['arguments'])}}}<|eot_id|>"
        )
    return (
        block(m) + m["content"] if "reasoning_content" in m else m["content"]
    ).strip() + "<|eot_id|>"


def r1(m):
    return m.get("reasoning_content", "") + "\n</think>\n\n" + m["content"] + "<eos>"


def channels(m):
    thoughts = (
        f"<|channel|>analysis<|message|>{m['reasoning_content']}<|end|><|start|>assistant"
        if len(m) == 3
        else ""
    )
    return thoughts + "<|channel|>final<|message|>" + m["content"] + "<|return|>"


# name: template, what is trained of an answer, whether it knows tools, whether it can train
# reasoning
TEMPLATES = {
    "chatml": (chat.CHATML, plain("<|im_end|>"), False, True),
    "chatml, generation block": (chat.CHATML_GENERATION, plain("<|im_end|>"), False, True),
    "chatml, block without end of turn": (
        chat.CHATML_GENERATION_WITHOUT_END,
        plain("<|im_end|>"),
        False,
        True,
    ),
    "phi 3": (chat.PHI3, plain("<|im_end|>"), False, True),
    "llama 3": (chat.LLAMA3, plain("<|eot_id|>", str.strip), False, True),
    "llama 3, generation block": (
        chat.LLAMA3_GENERATION,
        plain("<|eot_id|>", str.strip),
        False,
        True,
    ),
    "llama 3.1": (chat.LLAMA31, llama31, True, False),
    "deepseek v3": (chat.DEEPSEEK_V3, plain("<eos>"), False, True),
    "deepseek r1": (chat.DEEPSEEK_R1, r1, False, True),
    "qwen 3": (chat.QWEN3_TOOLS, qwen3, True, True),
    "channels": (chat.CHANNELS, channels, False, True),
}
TOKENIZERS = {name: byte_tokenizer(template) for name, (template, *_) in TEMPLATES.items()}
examples = st.sampled_from(list(TEMPLATES)).flatmap(
    lambda name: st.tuples(
        st.just(name), conversations(tools=TEMPLATES[name][2], reasoning=TEMPLATES[name][3])
    )
)


def runs(found: Encoded) -> list[tuple[list[int], list[int]]]:
    """Prompt and target of every trained answer, over all samples."""
    return [
        pair for ids, weights in found.samples for pair in answer_prompts(Sample("a", ids, weights))
    ]


@settings(max_examples=100, deadline=None)
@given(examples)
def test_decoded_targets_are_the_answers_with_their_ends_once_each(example):
    name, messages = example
    tokenizer, says = TOKENIZERS[name], TEMPLATES[name][1]
    found = encode(Conversation("a:1", messages), tokenizer)
    targets = [tokenizer.decode(target) for _, target in runs(found)]
    assert Counter(targets) == Counter(says(m) for m in messages if m["role"] == "assistant")
    [last] = encode(
        Conversation("a:1", messages[: len(messages) - (messages[-1]["role"] == "user")]),
        tokenizer,
        "last-turn",
    ).samples[-1:]
    assert tokenizer.decode(last[0][last[1] > 0]).endswith(
        says([m for m in messages if m["role"] == "assistant"][-1])
    )


@settings(max_examples=100, deadline=None)
@given(examples)
def test_an_answer_follows_what_inference_would_be_given(example):
    """The text before it is the rendering of the messages before it, with the generation prompt."""
    name, messages = example
    tokenizer = TOKENIZERS[name]
    found = encode(Conversation("a:1", messages), tokenizer)
    contexts = sorted(tokenizer.decode(prompt) for prompt, _ in runs(found))
    wanted = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = [as_content(m) if name in WITHOUT_FIELD else m for m in messages[:i]]
            wanted.append(
                tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
            )
    assert contexts == sorted(wanted)


WITHOUT_FIELD = {
    name for name in TEMPLATES if name.startswith(("chatml", "phi 3", "llama 3", "deepseek v3"))
}


def as_content(m):
    """For templates that know no reasoning: it stands in the content."""
    if "tool_calls" in m:
        return m
    return {
        "role": m["role"],
        "content": block(m) + m["content"] if "reasoning_content" in m else m["content"],
    }


@settings(max_examples=100, deadline=None)
@given(
    examples, st.sampled_from(["assistant", "last-turn", "all"]), st.sampled_from(["train", "mask"])
)
def test_remembered_shapes_change_nothing(example, mask, reasoning):
    """A tokenizer that has seen other conversations, whose skeletons it remembers, beside one that
    locates every turn.
    """
    name, messages = example
    remembering = REMEMBERING.setdefault(
        (name, mask, reasoning), ChatTokenizer(TOKENIZERS[name], mask=mask, reasoning=reasoning)
    )
    locating = ChatTokenizer(TOKENIZERS[name], mask=mask, reasoning=reasoning)
    locating._molded = lambda messages, weights: None
    [first], [second] = (
        remembering.encode([Conversation("a:1", messages)]),
        locating.encode([Conversation("a:1", messages)]),
    )
    if isinstance(first, RowError):
        assert str(first) == str(second)
        return
    assert first.notes == second.notes
    for (ids, weights), (other_ids, other_weights) in zip(
        first.samples, second.samples, strict=True
    ):
        assert ids.tolist() == other_ids.tolist()
        assert weights.tolist() == other_weights.tolist()


REMEMBERING: dict = {}


@settings(max_examples=100, deadline=None)
@given(examples)
def test_masking_reasoning_takes_it_out_of_the_targets_and_changes_no_token(example):
    name, messages = example
    tokenizer = TOKENIZERS[name]
    trained, masked = (
        encode(Conversation("a:1", messages), tokenizer, reasoning=r) for r in ("train", "mask")
    )
    for (ids, weights), (masked_ids, masked_weights) in zip(
        trained.samples, masked.samples, strict=True
    ):
        assert ids.tolist() == masked_ids.tolist()
        assert (masked_weights <= weights).all()
    if name in ("chatml", "deepseek r1", "qwen 3"):
        answers = [TEMPLATES[name][1](m) for m in messages if m["role"] == "assistant"]
        # White space at its beginning can be in one token with the blank lines behind the
        # reasoning.
        targets = Counter(tokenizer.decode(target).lstrip() for _, target in runs(masked))
        assert targets == Counter(
            answer.split("</think>\n\n", 1)[-1].lstrip() for answer in answers
        )
