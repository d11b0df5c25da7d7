"""Every family's weights on their way, on one process: loaded, exported, converted there and back,
and read and used by `transformers`.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import torchsft
from tests.checkpoint.sources import read_tensors, same_bits
from tests.families import TINY, cases, tiny
from tests.tiny import write_tiny_model
from tools.conversion import convert
from torchsft.checkpoint.huggingface import export
from torchsft.config import InputError


@pytest.fixture(scope="module", params=TINY)
def source(request, tmp_path_factory):
    """A directory in bf16, as `transformers` writes it."""
    directory = tmp_path_factory.mktemp(request.param) / "source"
    return write_tiny_model(directory, config=tiny(request.param), dtype=torch.bfloat16)


def different(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in expected if not same_bits(found[key], expected[key])]


def test_there_and_back_every_bit_is_the_same(source, tmp_path):
    """Hugging Face -> DCP -> Hugging Face, in many small parts and files."""
    small = {"workers": 1, "part_elements": 700, "progress": False}
    convert.to_dcp(source, tmp_path / "dcp", file_bytes=40_000, **small)
    convert.to_hf(tmp_path / "dcp", tmp_path / "hf", max_shard_bytes=50_000, **small)
    assert different(read_tensors(tmp_path / "hf"), read_tensors(source)) == []
    before, after = (
        json.loads((directory / "config.json").read_text())
        for directory in (source, tmp_path / "hf")
    )
    names = ("torch_dtype", "dtype", "eos_token_id")  # and those of the export
    assert all(after[key] == value for key, value in before.items() if key not in names)


def test_an_export_of_what_was_loaded_is_the_source_and_generates(source, tmp_path):
    """To the bit in bf16; `transformers` reads it, and its greedy tokens are those of the logits
    that our model gives.
    """
    model = torchsft.load_model(source)
    export(model, tmp_path / "hf", "bf16", source)
    assert different(read_tensors(tmp_path / "hf"), read_tensors(source)) == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    prompt = torch.randint(3, 256, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0]
    length = len(tokens)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    with torch.no_grad():
        logits = model(tokens, positions=torch.arange(length), cu_seqlens=bounds)
    assert logits.argmax(-1)[8:-1].tolist() == tokens[9:].tolist()


def test_features_are_loaded_and_exported_too(tmp_path):
    """Biases, tied embeddings and whatever else the cases of each family have."""
    for number, (family, case) in enumerate(cases()):
        if not case:
            continue
        directory, out = tmp_path / f"source-{number}", tmp_path / f"hf-{number}"
        write_tiny_model(directory, config=tiny(family, case), dtype=torch.bfloat16)
        export(torchsft.load_model(directory), out, "bf16", directory)
        assert different(read_tensors(out), read_tensors(directory)) == [], (family, case)


@pytest.mark.parametrize("family", ["gpt_oss"])
def test_fp8_of_a_family_that_has_none_is_refused_before_anything_is_written(family, tmp_path):
    source = write_tiny_model(tmp_path / "source", config=tiny(family), dtype=torch.bfloat16)
    sentence = "no program reads a GptOss in fp8; choose bf16"
    with pytest.raises(InputError, match=sentence):
        export(torchsft.load_model(source), tmp_path / "hf", "fp8", source)
    convert.to_dcp(source, tmp_path / "dcp", workers=1, progress=False)
    with pytest.raises(InputError, match=sentence):
        convert.to_hf(tmp_path / "dcp", tmp_path / "hf", dtype="fp8", workers=1, progress=False)
    assert not (tmp_path / "hf").exists()


def test_an_fp8_export_has_the_untrained_indexer_in_fp8_too(tmp_path):
    """config.json says that all its matrices are: loaders would take bf16 bytes for fp8."""
    config = tiny("deepseek_v32")
    source = write_tiny_model(tmp_path / "source", config=config, dtype=torch.bfloat16)
    model = torchsft.load_model(source)
    export(model, tmp_path / "hf", "fp8", source)
    convert.to_dcp(source, tmp_path / "dcp", workers=1, progress=False)
    convert.to_hf(tmp_path / "dcp", tmp_path / "tool", dtype="fp8", workers=1, progress=False)
    found = read_tensors(tmp_path / "hf")
    fp8 = {key for key, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    assert "model.layers.3.self_attn.indexer.wq_b.weight" in fp8
    assert fp8 == {key for key in found if model.is_quantised(key)}
    assert different(read_tensors(tmp_path / "tool"), found) == []
