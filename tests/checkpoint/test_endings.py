"""Which eos ids an export's files name, written by hand, and what `transformers` makes of them."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, GenerationConfig

import torchsft
from tests.checkpoint.sources import change_config
from tests.tiny import byte_tokenizer, write_tiny_model
from torchsft.checkpoint.endings import about, stop_ids, with_ends
from torchsft.checkpoint.huggingface import export
from torchsft.config import InputError

ABSENT = object()


@pytest.mark.parametrize(
    ("config", "generation", "ends", "wanted_config", "wanted_generation"),
    [
        (258, 258, [257], [258, 257], [258, 257]),  # the base's first
        (258, 258, [258], 258, 258),  # an int stays one
        (258, [258, 9], [9, 257], [258, 9, 257], [258, 9, 257]),
        (258, [258, 9], [9], [258, 9], [258, 9]),
        ([7, 8], 8, [], [7, 8], 8),  # nothing trained that ends: the base's
        (258, ABSENT, [257], [258, 257], [258, 257]),
        (258, None, [257], [258, 257], [258, 257]),
        (258, None, [258], 258, [258]),
        (None, 258, [257], [258, 257], [258, 257]),
        (None, None, [257, 9], [257, 9], [257, 9]),
        (None, ABSENT, [257], [257], [257]),
    ],
)
def test_eos_ids_of_both_files(config, generation, ends, wanted_config, wanted_generation):
    base = {"hidden_size": 32, "eos_token_id": config}
    other = None if generation is ABSENT else {"temperature": 0.6, "eos_token_id": generation}
    before = json.dumps([base, other])
    changed, made = with_ends(base, other, ends)
    assert changed == base | {"eos_token_id": wanted_config}
    assert made["eos_token_id"] == wanted_generation
    assert made.get("temperature") == (None if other is None else 0.6)
    stops = stop_ids(base, other, ends)
    assert stops == (
        wanted_generation if isinstance(wanted_generation, list) else [wanted_generation]
    )
    assert json.dumps([base, other]) == before


def test_a_text_config_that_has_them():
    base = {
        "eos_token_id": None,
        "text_config": {"eos_token_id": 5, "pad_token_id": 0},
        "vision_config": {},
    }
    changed, made = with_ends(base, None, [6])
    assert changed == base | {"text_config": {"eos_token_id": [5, 6], "pad_token_id": 0}}
    assert made == {"eos_token_id": [5, 6], "pad_token_id": 0}
    both = {"eos_token_id": 4, "text_config": {"eos_token_id": 5}}
    assert with_ends(both, None, [6])[0] == {
        "eos_token_id": [4, 6],
        "text_config": {"eos_token_id": [5, 6]},
    }
    elsewhere = {"text_config": {"hidden_size": 3}}
    assert with_ends(elsewhere, None, [6])[0] == elsewhere | {"eos_token_id": [6]}


def test_without_any_end_nothing_is_written():
    assert with_ends({"hidden_size": 3}, None, []) == ({"hidden_size": 3}, None)
    assert with_ends({"eos_token_id": 3}, {"top_p": 0.9}, []) == (
        {"eos_token_id": 3},
        {"top_p": 0.9},
    )


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [2, "x"], {"id": 2}])
def test_what_is_no_id_is_refused(value):
    for config, generation, file in (
        ({"eos_token_id": value}, None, "config.json"),
        ({}, {"eos_token_id": value}, "generation"),
    ):
        with pytest.raises(
            InputError,
            match=f"{file}.* has eos_token_id .*, where an id or a list of ids is needed",
        ):
            with_ends(config, generation, [3])


def test_an_export_has_them_and_keeps_everything_else(tmp_path):
    source = write_tiny_model(tmp_path / "source")
    change_config(source, eos_token_id=258, pad_token_id=3)
    (source / "generation_config.json").write_text(
        '{"eos_token_id": 258, "top_p": 0.95, "custom": [1]}'
    )
    model = torchsft.load_model(source)
    export(model, tmp_path / "same", "fp32", source, ends=[258])
    assert (tmp_path / "same" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    export(model, tmp_path / "hf", "fp32", source, ends=[257, 258])
    read = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert read == {"eos_token_id": [258, 257], "top_p": 0.95, "custom": [1]}
    assert AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == [258, 257]
    assert AutoConfig.from_pretrained(tmp_path / "hf").pad_token_id == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()

    (source / "generation_config.json").unlink()
    export(model, tmp_path / "made", "fp32", source, ends=[257])
    made = GenerationConfig.from_pretrained(tmp_path / "made")
    assert (made.eos_token_id, made.pad_token_id, made.bos_token_id) == ([258, 257], 3, None)


@pytest.mark.parametrize(
    ("config", "generation", "told"),
    [
        ({"eos_token_id": 257, "pad_token_id": 257}, None, 1),
        ({"eos_token_id": 257}, {"pad_token_id": 257}, 1),
        ({"eos_token_id": 257, "pad_token_id": 257}, {"pad_token_id": 257}, 1),
        ({"text_config": {"eos_token_id": 257, "pad_token_id": 257}}, None, 1),
        ({"eos_token_id": 257, "pad_token_id": 3}, {"pad_token_id": None}, 0),
    ],
)
def test_a_pad_token_that_ended_trained_turns_is_told_wherever_it_is_named(
    config, generation, told
):
    """The tokenizer's own pad is another token."""
    said = about(config, generation, [257], byte_tokenizer())
    assert said.count("stays the pad token too") == told
