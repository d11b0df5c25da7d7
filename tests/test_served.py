"""An export behaves when it is served: plain `transformers` generates from it alone what the run
generated, and stops there.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.answers import answer, greedy_answers
from tests.tiny import byte_tokenizer, write_tiny_model
from tools.conversion import convert
from torchsft.config import Checkpoint, Config, Data, Eval, Metrics, Model, Optim, Parallel, Train
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

PAIRS = {"name?": "I am Bo.", "2+2?": "4"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] "
    "}}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GLM = (
    "[gMASK]{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}"
    "{% else %}<|assistant|>\n{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% else %}<|Assistant|>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
# name: template, tokens, eos_token, eos ids of the base by token, and what the export names
FAMILIES = {
    "chatml": (
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|> <|im_end|>",
    ),
    "llama": (
        LLAMA,
        ["<|start|>", "<|stop|>", "<|eot_id|>", "<|end|>"],
        "<|end|>",
        ["<|end|>"],
        "<|end|> <|eot_id|>",
    ),
    "glm": (
        GLM,
        ["<|endoftext|>", "[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>"],
        "<|endoftext|>",
        ["<|endoftext|>", "<|user|>", "<|observation|>"],
        "<|endoftext|> <|user|> <|observation|>",
    ),
    "deepseek": (
        DEEPSEEK,
        ["<|User|>", "<|Assistant|>", "<|eos|>"],
        "<|eos|>",
        "<|eos|>",
        "<|eos|>",
    ),
}


def write_model(directory, template, tokens, eos_token, eos):
    """A tiny model whose generation_config.json and config.json have the base's eos ids."""
    write_tiny_model(directory, num_hidden_layers=2, vocab_size=280)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    tokenizer.eos_token, tokenizer.chat_template = eos_token, template
    tokenizer.save_pretrained(directory)
    ids = tokenizer.convert_tokens_to_ids(eos)
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
    return tokenizer


def write_rows(path):
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in PAIRS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_for(directory, **changes):
    data = write_rows(directory / "rows.jsonl")
    return Config(
        model=Model(path=str(directory / "base")),
        data=Data(
            train=(data,), eval=(data,), seq_len=64, cache=str(directory / "cache"), **changes
        ),
        train=Train(steps=60, global_batch_size=1),
        optim=Optim(lr=1e-2, schedule="constant", weight_decay=0.0),
        checkpoint=Checkpoint(every=0, export="fp32"),
        eval=Eval(answers=2, max_new_tokens=24),
        metrics=Metrics(tensorboard=False, progress=False),
        output=str(directory / "run"),
    )


def run(config):
    with World(config.parallel, 0) as world:
        Trainer(config, world, answer=answer).run()


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_generates_the_runs_answers_from_the_export_alone(name, tmp_path, capsys):
    template, tokens, eos_token, eos, wanted = FAMILIES[name]
    tokenizer = write_model(tmp_path / "base", template, tokens, eos_token, eos)
    run(config_for(tmp_path))
    said = capsys.readouterr().out
    export = tmp_path / "run/hf"
    served_by = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    answers = [
        json.loads(line) for line in (tmp_path / "run/answers-after.jsonl").read_text().splitlines()
    ]
    for (asked, reference), ours in zip(PAIRS.items(), answers, strict=True):
        prompt = served_by.apply_chat_template(
            [{"role": "user", "content": asked}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        length = prompt["input_ids"].shape[1]
        assert prompt["input_ids"][0].tolist() == ours["prompt"]
        generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)[
            0, length:
        ].tolist()
        assert generated == ours["generated"] and ours["ended"] and ours["correct"]
        assert served_by.decode(generated, skip_special_tokens=True).strip() == reference
    assert "2 of 2 ended by themselves" in said

    ids = tokenizer.convert_tokens_to_ids(wanted.split())
    expected = ids if len(ids) > 1 or isinstance(eos, list) else ids[0]
    for file in ("generation_config.json", "config.json"):
        assert json.loads((export / file).read_text())["eos_token_id"] == expected
    assert served_by.eos_token == eos_token
    assert ("with which trained turns ended" in said) is (name in ("chatml", "llama"))
    # the checkpoint knows it too, for later conversions
    [checkpoint] = (tmp_path / "run/checkpoints").glob("step-*")
    assert (
        convert.ToHf(checkpoint, tmp_path / "later", "fp32", None, 2**20, 5e9).config[
            "eos_token_id"
        ]
        == expected
    )


def test_answers_of_a_model_that_never_stops_did_not_end(tmp_path, capsys):
    """Where nothing is known to end a turn, an answer goes on, although its reference has ended."""
    write_model(tmp_path / "base", *FAMILIES["chatml"][:4])
    config = config_for(tmp_path)
    config.train.steps = 1
    run(config)
    assert "0 of 2 ended by themselves" in capsys.readouterr().out
    lines = (tmp_path / "run/answers-after.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended"] for line in lines] == [False, False]


def test_an_answer_ends_at_what_stops_a_server_not_where_its_reference_does():
    """The model says 5, 6, 7, 8, ... whatever it is asked; the reference ends with 6, and so does
    nothing else.
    """

    def next_token(tokens, *, logits_at, **_):
        return torch.nn.functional.one_hot(tokens[logits_at] + 1, 20).float()

    prompts = [("a", [4], [5, 6]), ("b", [4], [5, 6, 7, 8]), ("c", [9], [10, 11])]
    limits = {"max_new_tokens": 6, "max_tokens": 64}
    with World(Parallel(), 0) as world:
        answers = greedy_answers(
            SimpleNamespace(logits=next_token), prompts, world, stops={7, 3}, **limits
        )
    assert [a.generated for a in answers] == [[5, 6, 7], [5, 6, 7], [10, 11, 12, 13, 14, 15]]
    assert [a.ended({7, 3}) for a in answers] == [True, True, False]
    assert not any(a.correct for a in answers)


def test_what_ended_turns_before_a_run_was_continued_is_named_too(tmp_path):
    """A stream's report begins anew in each process; the checkpoint has what the earlier one
    read.
    """
    write_model(tmp_path / "base", *FAMILIES["chatml"][:4])
    config = config_for(tmp_path, streaming=True)
    config.train.steps, config.eval.answers = 2, 0
    run(config)
    named = (tmp_path / "run/hf/generation_config.json").read_text()
    assert json.loads(named)["eos_token_id"] == [260, 257]
    (tmp_path / "run/hf/generation_config.json").unlink()
    run(config)  # complete: exported again, of a stream that is not read
    assert (tmp_path / "run/hf/generation_config.json").read_text() == named
