"""What is trained of a conversation: golden masks by hand, properties, and the templates that are refused."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data import chat
from tests.data.chat import byte_tokenizer, conversation, tokenize, word_tokenizer
from torchsft.config import InputError
from torchsft.data.template import ChatTokenizer, Sample, answer_prompts, load_tokenizer

# The text that each template must produce, written by hand; what is trained of it stands between [[ and ]].
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[Hello you.<|im_end|>]]\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n[[Bye.<|im_end|>]]\n"
)
LLAMA3_TEXT = (
    "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello you.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Bye.<|eot_id|>]]"
)
DEEPSEEK_TEXT = "<bos>Be brief.<|User|>Hi<|Assistant|>[[Hello you.<eos>]]<|User|>And now?<|Assistant|>[[Bye.<eos>]]"
QWEN3_TEXT = CHATML_TEXT.replace("[[Bye.", "[[<think>\n\n</think>\n\nBye.")
GOLDEN = {
    "chatml": (chat.CHATML, CHATML_TEXT),
    "chatml, generation block": (chat.CHATML_GENERATION, CHATML_TEXT),
    "chatml, block without end of turn": (chat.CHATML_GENERATION_WITHOUT_END, CHATML_TEXT),
    "chatml, block with the newline": (chat.CHATML_GENERATION_WITH_NEWLINE, CHATML_TEXT),
    "chatml, block with the header": (chat.CHATML_GENERATION_WITH_HEADER, CHATML_TEXT),
    "chatml, generation prompt unknown": (chat.CHATML.split("{% if add_generation_prompt")[0], CHATML_TEXT),
    "llama 3": (chat.LLAMA3, LLAMA3_TEXT),
    "llama 3, generation block": (chat.LLAMA3_GENERATION, LLAMA3_TEXT),
    "deepseek v3": (chat.DEEPSEEK_V3, DEEPSEEK_TEXT),
    "deepseek v3, generation block": (chat.DEEPSEEK_V3_GENERATION, DEEPSEEK_TEXT),
    "deepseek r1, generation prompt no prefix": (chat.DEEPSEEK_R1, DEEPSEEK_TEXT),
    "qwen 3": (chat.QWEN3, QWEN3_TEXT),
    "qwen 3, generation block": (chat.QWEN3_GENERATION, QWEN3_TEXT),
    "mistral": (
        chat.MISTRAL,
        "<bos>[INST] Hi [/INST][[ Hello you. <eos>]][INST] And now? [/INST][[ Bye. <eos>]]",
    ),
    "phi 3": (chat.PHI3, CHATML_TEXT + "<eos>"),
}
TURNS = ("Hi", "Hello you.", "And now?", "Bye.")
EVERY_TEMPLATE = {name: template for name, (template, _) in GOLDEN.items()}


def golden(tokenizer, text: str) -> tuple[list[int], list[float]]:
    """Ids and weights of an annotated text; the word tokenizer makes the same tokens of the parts as of the whole."""
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
    sample = tokenize(conversation("assistant", "assistant", "user", "user"), tokenizer, "assistant")
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
    reference = tokenizer.apply_chat_template(talk.messages, return_dict=True, return_assistant_tokens_mask=True)
    assert sample.tokens.tolist() == reference["input_ids"]
    assert sample.weights.tolist() == reference["assistant_masks"]


# ---------------------------------------------------------------- properties

# Text as people write it: any characters, often with spaces and newlines at the ends.
texts = st.text(st.one_of(st.sampled_from(" \n\t"), st.characters(exclude_categories=["Cs", "Co"])), max_size=12)
talks = st.tuples(st.none() | texts, st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
BYTE_TOKENIZERS = {name: byte_tokenizer(template) for name, template in EVERY_TEMPLATE.items()}
ENDS = {"chatml": "<|im_end|>", "llama 3": "<|eot_id|>", "deepseek v3": "<eos>", "deepseek r1": "<eos>"}


@settings(max_examples=60, deadline=None)
@given(talk=talks, name=st.sampled_from([n for n in GOLDEN if n.split(",")[0] in ENDS]))
def test_decoded_targets_are_the_answers_with_their_ends(talk, name):
    system, turns = talk
    tokenizer = BYTE_TOKENIZERS[name]
    talk = conversation(*[text for turn in turns for text in turn], system=system)
    sample = tokenize(talk, tokenizer, "assistant")
    trims = name.startswith("llama 3")
    answers = [answer.strip() if trims else answer for _, answer in turns]
    end = ENDS[name.split(",")[0]]
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "".join(answer + end for answer in answers)
    assert tokenizer.decode(sample.tokens) == tokenizer.apply_chat_template(talk.messages, tokenize=False)


@settings(max_examples=60, deadline=None)
@given(talk=talks, name=st.sampled_from([n for n in GOLDEN if "no prefix" not in n and "unknown" not in n]))
def test_an_answer_follows_the_tokens_of_the_generation_prompt(talk, name):
    """What stands before a trained answer is, token for token, what inference gives the model."""
    system, turns = talk
    tokenizer = BYTE_TOKENIZERS[name]
    talk = conversation(*[text for turn in turns for text in turn], system=system)
    [(prompt, answer)] = answer_prompts(tokenize(talk, tokenizer, "last-turn"))
    rendered = tokenizer.apply_chat_template(talk.messages[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt) == rendered
    # Earlier answers may be split at their beginnings too; with one turn the ids are those of the prompt alone.
    if len(turns) == 1:
        assert prompt == tokenizer(rendered, add_special_tokens=False).input_ids
    assert answer[-1] in [tokenizer.convert_tokens_to_ids(end) for end in ("<|im_end|>", "<|eot_id|>", "<eos>")]


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
    ]
    together = ChatTokenizer(tokenizer).samples(talks, mask)
    for talk, sample in zip(talks, together, strict=True):
        alone = tokenize(talk, tokenizer, mask)
        assert (sample.tokens.tolist(), sample.weights.tolist()) == (alone.tokens.tolist(), alone.weights.tolist())


def test_answer_prompts_gives_each_answer_with_all_that_precedes_it():
    sample = Sample("a:1", [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 0])
    assert answer_prompts(sample) == [([1, 2], [3, 4]), ([1, 2, 3, 4, 5], [6])]
    assert answer_prompts(Sample("a:2", [1, 2], [0, 1])) == [([1], [2])]


# ---------------------------------------------------------------- tokens across a boundary


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("answer", ["\nhello", "\n\n", " hello", "hello\n", "\n"])
def test_no_token_joins_header_and_answer(answer, trim_offsets):
    tokenizer = byte_tokenizer(chat.CHATML, trim_offsets=trim_offsets)
    [(prompt, target)] = answer_prompts(tokenize(conversation("hello", answer), tokenizer, "assistant"))
    assert tokenizer.decode(prompt).endswith("assistant\n")
    assert tokenizer.decode(target) == answer + "<|im_end|>"


def test_a_space_before_the_answer_that_belongs_to_the_header_is_not_trained():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_tokenizer(template)
    assert " hello" in [tokenizer.decode(i) for i in tokenizer("assistant: hello").input_ids]  # joined, left to itself
    [(prompt, target)] = answer_prompts(tokenize(conversation("you", "hello"), tokenizer, "assistant"))
    assert (tokenizer.decode(prompt), tokenizer.decode(target)) == ("user: you<eos>assistant: ", "hello<eos>")


def test_a_tokenizer_that_changes_the_text_when_split_is_refused():
    vocabulary = ["<unk>", *chat.SPECIAL, "▁user:hi", "▁assistant:yes", "▁assistant:", "▁yes"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(chat.SPECIAL)
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    with pytest.raises(InputError, match=r"chat\.jsonl:7: a token reaches from the header into an assistant turn"):
        tokenize(conversation("hi", "yes"), chat.wrap(tokenizer, template), "assistant")


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize("system", [None, "be"])
@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize("template", [chat.DEEPSEEK_V3, chat.CHATML], ids=["template writes it", "template does not"])
def test_exactly_one_bos_where_the_tokenizer_adds_one(template, mask, system):
    tokenizer = byte_tokenizer(template, add_bos=True)
    assert tokenizer("hello").input_ids[0] == tokenizer.bos_token_id
    sample = tokenize(conversation("hello", "you", system=system), tokenizer, mask)
    assert np.flatnonzero(sample.tokens == tokenizer.bos_token_id).tolist() == [0]
    assert sample.weights[0] == 0
    if mask == "assistant":
        assert tokenizer.decode(sample.tokens[sample.weights > 0]).startswith("you<")


def test_no_bos_where_neither_template_nor_tokenizer_writes_one():
    tokenizer = byte_tokenizer(chat.CHATML)
    assert tokenizer.bos_token_id not in tokenize(conversation("hello", "you"), tokenizer, "assistant").tokens


def test_two_bos_from_the_template_are_refused():
    with pytest.raises(InputError, match=r"chat\.jsonl:7: the text begins with two BOS tokens"):
        tokenize(conversation("a", "b"), byte_tokenizer("{{ bos_token }}" + chat.LLAMA3), "assistant")


# ---------------------------------------------------------------- reasoning, and templates that rewrite


def test_a_template_that_cuts_reasoning_out_of_a_trained_answer_is_refused():
    talk = conversation("hi", "<think>\nthe\n</think>answer")
    for template in (chat.DEEPSEEK_R1, chat.DEEPSEEK_R1.replace("<think>\n", "")):
        with pytest.raises(InputError, match=r"chat\.jsonl:7: .*leaves out or changes text of .*assistant message"):
            tokenize(talk, byte_tokenizer(template), "assistant")


@pytest.mark.parametrize("template", [chat.KEEPS_LAST_REASONING, chat.QWEN3, chat.QWEN3_GENERATION])
def test_reasoning_cut_out_of_the_history_is_refused_unless_only_the_last_turn_is_trained(template):
    tokenizer = byte_tokenizer(template)
    talk = conversation("hi", "<think>\nthe\n</think>answer", "and", "<think>\nme\n</think>you")
    with pytest.raises(InputError, match=r"chat\.jsonl:7: .*--data\.mask last-turn"):
        tokenize(talk, tokenizer, "assistant")
    [(prompt, answer)] = answer_prompts(tokenize(talk, tokenizer, "last-turn"))
    assert "the" not in tokenizer.decode(prompt)
    rendered = tokenizer.apply_chat_template(talk.messages[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt) == rendered
    # What the generation prompt already says is not trained: "<think>\n" of the R1-like template.
    assert rendered.endswith("<think>\n") == (template == chat.KEEPS_LAST_REASONING)
    end = "<eos>" if template == chat.KEEPS_LAST_REASONING else "<|im_end|>"
    opening = "" if template == chat.KEEPS_LAST_REASONING else "<think>\n"
    assert tokenizer.decode(answer) == opening + "me\n</think>you" + end


def test_reasoning_that_the_generation_prompt_opens_is_trained_behind_that_opening():
    """The template keeps contents as they are: only the conversation itself shows that the prompt is a prefix."""
    template = chat.DEEPSEEK_R1.replace(".split('</think>')[-1]", "")
    tokenizer = byte_tokenizer(template)
    talk = conversation("hi", "<think>\nme\n</think>you", "and", "the answer")
    sample = tokenize(talk, tokenizer, "assistant")
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "me\n</think>you<eos>the answer<eos>"


def test_a_template_that_trims_trains_the_trimmed_answer_also_with_reasoning():
    tokenizer = byte_tokenizer(chat.QWEN3.replace("m['content'] if m['role']", "m['content'] | trim if m['role']"))
    sample = tokenize(conversation(" hi ", " \n<think>\nme\n</think>you \n"), tokenizer, "assistant")
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "<think>\nme\n</think>you<|im_end|>"


def test_answers_without_reasoning_are_trained_from_their_first_character_on_by_the_r1_template():
    tokenizer = byte_tokenizer(chat.DEEPSEEK_R1)
    sample = tokenize(conversation("hi", "the answer", "and", "you"), tokenizer, "assistant")
    assert tokenizer.decode(sample.tokens[sample.weights > 0]) == "the answer<eos>you<eos>"


@pytest.mark.parametrize(
    "template, says",
    [
        (chat.CHATML.replace("m['content'] + '<|im_end|>\n'", "m['content'] + '\n'"), "no special token that ends"),
        (chat.CHATML.replace("<|im_end|>", "### end"), "no special token that ends"),
        (chat.CHATML.replace("<|im_end|>\n' }}", "' + ('<|im_end|>' if loop.last else '\n') }}"), "no special token"),
        (chat.CHATML.replace("m['content']", "m['content'] | upper"), "leaves out or changes text"),
        (chat.CHATML.replace("m['content']", "''"), "leaves out or changes text"),
        (chat.CHATML_GENERATION.replace("{% generation %}", "{% generation %}{% endgeneration %}{% if 1 %}").replace(
            "'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>' }}{% endif %}"), "blocks do not hold"),
        ("{{ raise_exception('no system turns, please') }}", "no system turns, please"),
        ("{% for m in messages %}", "the chat template refuses"),
    ],
)  # fmt: skip
def test_an_unusable_template_is_refused_and_the_conversation_named(template, says):
    with pytest.raises(InputError, match=r"^chat\.jsonl:7\b.*" + re.escape(says)):
        tokenize(conversation("hi", "hello", "and", "you"), byte_tokenizer(template), "assistant")


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
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": True, "chat_template": chat.DEEPSEEK_V3}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    return settings


def test_load_tokenizer_reads_a_deepseek_directory_as_transformers_does(tmp_path):
    save_like_deepseek(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "hello  you\n\n and me, 12345 é"
    assert ours(text).input_ids == theirs(text).input_ids
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == ("<bos>", "<eos>", chat.DEEPSEEK_V3)
    sample = tokenize(conversation("hello", "you", system="be"), ours, "assistant")
    assert np.flatnonzero(sample.tokens == ours.bos_token_id).tolist() == [0]


def test_load_tokenizer_refuses_code_of_a_model_directory_and_does_not_run_it(tmp_path):
    """As Kimi-K2 and Moonlight are published: tiktoken.model and a Python file."""
    (tmp_path / "tiktoken.model").write_text("aGVsbG8= 0\n")
    (tmp_path / "tokenization_kimi.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "chat_template": chat.CHATML}))
    with pytest.raises(InputError, match=r"has no tokenizer\.json, only tiktoken\.model; convert"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_load_tokenizer_names_what_is_wrong_with_a_directory(tmp_path):
    with pytest.raises(InputError, match="absent is not a directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no tokenizer\.json; convert"):
        load_tokenizer(tmp_path)
    settings = save_like_deepseek(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: settings[k] for k in settings if k != "chat_template"}))
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
