"""The generated task: its files load, its rule is what the docstring says, and nothing held out is
in training.
"""

import json
import re
from collections import Counter

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes.debug_task import DICTIONARY, LANGUAGES, write_debug_data, write_debug_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("debug") / "model"
    write_debug_model(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def read(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    train, held_out = write_debug_data(tmp_path_factory.mktemp("data"))
    return read(train), read(held_out)


def answers(conversations):
    return [
        m["content"] for messages in conversations for m in messages if m["role"] == "assistant"
    ]


def texts(conversations):
    return {m["content"] for messages in conversations for m in messages}


def right_answer(system, questions):
    """The task's rule, written a second time: the answer to the last of `questions`, from what was
    said before it.
    """
    name, city, language = re.fullmatch(
        r"You help (\w+) from (\w+) to learn (\w+)\.", system
    ).groups()
    question = questions[-1]
    if question == "Who am I?":
        return f"You are {name} from {city}."
    if question == "Where do I live?":
        return f"You live in {city}, {name}."
    if found := re.fullmatch(r"I have a (\w+) (\w+)\.", question):
        return f"Noted: {name} has a {found[1]} {found[2]}."
    if found := re.fullmatch(r"What colour is my (\w+)\?", question):
        (colour,) = {
            c[1] for q in questions if (c := re.fullmatch(rf"I have a (\w+) {found[1]}\.", q))
        }
        return f"The {found[1]} of {name} is {colour}."
    if found := re.fullmatch(r"And in (\w+)\?", question):
        language = found[1]
    noun = [w[1] for q in questions if (w := re.fullmatch(r"What is a (\w+)\?", q))][-1]
    return f"A {noun} is {DICTIONARY[noun][LANGUAGES.index(language)]} in {language}, {name}."


def test_every_answer_follows_from_the_rule(data):
    kinds = Counter()
    for messages in data[0] + data[1]:
        assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * (
            len(messages) // 2
        )
        questions = [m["content"] for m in messages[1::2]]
        for i, answer in enumerate(messages[2::2], start=1):
            assert answer["content"] == right_answer(messages[0]["content"], questions[:i])
            kinds[questions[i - 1].split()[0] + questions[i - 1].split()[1]] += 1
    assert len(data[0]) == 3000 and len(data[1]) == 200
    assert min(kinds.values()) > 100  # every kind of question is asked often


def test_some_answers_need_the_system_turn_and_some_an_earlier_turn(data):
    """The same question gets other answers, as other things were said before."""
    seen = {}
    for messages in data[0]:
        for question, answer in zip(messages[1::2], messages[2::2], strict=True):
            seen.setdefault(question["content"], set()).add(answer["content"])
    assert len(seen["Who am I?"]) > 500
    assert len(seen["What colour is my lamp?"]) > 100
    assert len(seen["And in German?"]) > 200


def test_no_held_out_answer_occurs_in_training(data):
    train, held_out = data
    assert not set(answers(train)) & set(answers(held_out))


def test_held_out_pairs_never_meet_in_a_training_conversation_but_their_halves_do(data):
    def pairs(conversations):
        found = set()
        for messages in conversations:
            name, city = re.fullmatch(
                r"You help (\w+) from (\w+) to learn \w+\.", messages[0]["content"]
            ).groups()
            found.add((name, city))
            for m in messages[1::2]:
                if match := re.fullmatch(r"What is a (\w+)\?", m["content"]):
                    found.add((name, match[1]))
                if match := re.fullmatch(r"I have a (\w+) (\w+)\.", m["content"]):
                    found.add(match.groups())
        return found

    train, held_out = map(pairs, data)
    assert len(held_out) > 200
    assert not train & held_out
    assert {half for pair in held_out for half in pair} <= {half for pair in train for half in pair}


def test_training_shows_every_word_that_held_out_answers_need(data):
    entries = [
        set(re.findall(r"A (\w+) is (\w+) in (\w+),", " ".join(answers(part)))) for part in data
    ]
    assert len(entries[1]) > 60 and entries[1] <= entries[0]


def test_a_constant_answer_is_worth_nothing(data):
    train, held_out = data
    (best, _), *_ = Counter(answers(train)).most_common(1)
    assert answers(held_out).count(best) == 0
    (_, most), *_ = Counter(answers(held_out)).most_common(1)
    # not even the best constant, chosen with the solutions in hand
    assert most <= 0.02 * len(answers(held_out))


def test_the_seed_decides_the_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_debug_data(tmp_path / name, seed=seed, train=20, held_out=5)
    for file in ("train.jsonl", "eval.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_the_model_directory_is_written_the_same_each_time(model_dir, tmp_path):
    write_debug_model(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(path.name for path in model_dir.iterdir())
    for file in files:
        assert (tmp_path / file).read_bytes() == (model_dir / file).read_bytes(), file


def test_transformers_builds_the_model_from_its_config(model_dir, tokenizer):
    config = AutoConfig.from_pretrained(model_dir)
    assert (config.model_type, config.vocab_size) == ("deepseek_v3", len(tokenizer))
    assert config.n_group >= 2 and config.n_shared_experts == 1 and config.q_lora_rank
    assert config.first_k_dense_replace == 1 and config.num_hidden_layers >= 3
    model = AutoModelForCausalLM.from_config(config)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    buffers = dict(model.named_buffers())
    assert "model.layers.2.mlp.gate.e_score_correction_bias" in buffers
    assert sum(p.numel() for p in model.parameters()) < 2e6


def test_special_tokens_are_three_different_ones(tokenizer):
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert (
        tokenizer("Who am I?").input_ids
        == tokenizer("Who am I?", add_special_tokens=False).input_ids
    )


def test_every_conversation_has_one_bos_and_ends_each_turn(tokenizer, data):
    # the last one has no system turn
    for messages in data[0][:50] + data[1][:50] + [data[0][0][1:]]:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert (
            ids.count(tokenizer.eos_token_id) == len(messages) and ids[-1] == tokenizer.eos_token_id
        )


def test_the_generation_prompt_is_what_comes_before_an_answer(tokenizer, data):
    messages = data[1][0]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    for i in range(2, len(messages), 2):
        prompt = tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(messages[i]["content"]).input_ids
        assert whole[: len(prompt) + len(answer) + 1] == [*prompt, *answer, tokenizer.eos_token_id]


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="role tool is not system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_tasks_words_are_one_token_each_and_every_text_round_trips(tokenizer, data):
    for text in texts(data[0] + data[1]):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", text))
    for text in ("", " two  spaces\n\ttab ", "it's don't !", "Ünïcode 你好 🙂", "x" * 50):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_conversations_fit_into_a_short_row(tokenizer, data):
    lengths = [
        len(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in data[0]
    ]
    assert max(lengths) <= 128
