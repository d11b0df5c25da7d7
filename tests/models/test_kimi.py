"""Kimi-K2.5: the language model of a model that sees, against `transformers`; its weights there and
back, with the vision tower as it was.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

import torchsft
from tests.checkpoint.sources import read_tensors, same_bits
from tests.models.oracle import hf_logits, logits_of, packed, randomise
from tests.precision.test_low_bit import INT4
from tests.tiny import byte_tokenizer, tiny_config
from tools.conversion import convert
from torchsft.checkpoint.huggingface import export
from torchsft.config import InputError
from torchsft.models.families import read_model_config
from torchsft.precision.formats import Int4Groups


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = Kimi_K25Config(
        text_config=tiny_config(hidden_size=64, moe_intermediate_size=32).to_dict(),
        vision_config=vision | dict(pos_emb_height=4, pos_emb_width=4),
        projection_hidden_size=16,
        tie_word_embeddings=False,
        image_token_id=270,
        video_token_id=271,
    )
    model = Kimi_K25ForConditionalGeneration(config)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def source(reference, tmp_path_factory):
    """As `transformers` writes it, in bf16, but names as published: it reads those, and writes
    `blocks` where layers of the language model are.
    """
    directory = tmp_path_factory.mktemp("kimi") / "source"
    reference.to(torch.bfloat16).save_pretrained(directory)
    reference.float()
    published = {
        key.replace("language_model.model.blocks.", "language_model.model.layers."): tensor
        for key, tensor in read_tensors(directory).items()
    }
    save_file(published, directory / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["KimiK25ForConditionalGeneration"]
    config["text_config"]["architectures"] = ["DeepseekV3ForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def different(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in expected if not same_bits(found[key], expected[key])]


def test_logits_on_text_equal_transformers(reference, source):
    model = torchsft.load_model(source)
    theirs = Kimi_K25ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    inputs = packed([9, 32, 60], padding=5)
    with torch.no_grad():
        expected = hf_logits(theirs, inputs)
        got = logits_of(model, inputs)[: len(expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_weights_come_back_with_the_vision_tower(source, tmp_path):
    before = read_tensors(source)
    assert any(key.startswith("vision_tower.") for key in before)
    assert any(key.startswith("language_model.model.layers.1.mlp.experts.") for key in before)
    export(torchsft.load_model(source), tmp_path / "hf", "bf16", source)
    convert.to_dcp(source, tmp_path / "dcp", workers=1, progress=False)
    convert.to_hf(tmp_path / "dcp", tmp_path / "tool", workers=1, progress=False)
    for name in ("hf", "tool"):
        assert different(read_tensors(tmp_path / name), before) == []
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["text_config"]["num_hidden_layers"] == 3


def test_int4_below_text_config_is_read_and_written(source, tmp_path):
    """As K2.5 is published: the description of the packed experts stands in text_config."""
    directory = tmp_path / "int4"
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    form, tensors = Int4Groups(), {}
    for key, tensor in read_tensors(source).items():
        if ".mlp.experts." not in key:
            tensors[key] = tensor
            continue
        tensors |= form.encode(tensor.float(), None, key)
        tensors |= form.constants(key, tuple(tensor.shape))
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["quantization_config"] = INT4
    (directory / "config.json").write_text(json.dumps(config))
    model = torchsft.load_model(directory)
    export(model, tmp_path / "hf", "int4", directory)
    assert different(read_tensors(tmp_path / "hf"), tensors) == []
    export(model, tmp_path / "bf16", "bf16", directory)
    exported = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in exported["text_config"]
    again = torchsft.load_model(tmp_path / "bf16").state_dict()
    assert all(
        torch.equal(again[name], value.bfloat16().float()) or name.endswith("correction_bias")
        for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "text_config = None, but an object"),
        ({"text_config": {}}, "lacks vocab_size"),
        ({"text_config": {}, "tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"text_config": {}, "quantization_config": {"quant_method": "gptq"}}, "'gptq'|\"gptq\""),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(config, message):
    described = {"architectures": ["KimiK25ForConditionalGeneration"]} | config
    with pytest.raises(InputError, match=message):
        read_model_config(described)


def test_an_fp8_export_says_that_the_vision_tower_is_not_in_fp8(reference, source, tmp_path):
    """By `transformers`' own rule, the matrices that it takes for fp8 are those that are."""
    export(torchsft.load_model(source), tmp_path / "hf", "fp8", source)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    quantizer = AutoHfQuantizer.from_config(config["quantization_config"], pre_quantized=True)
    quantizer._normalize_modules_to_not_convert(reference)
    apart = quantizer.get_modules_to_not_convert(
        reference, quantizer.quantization_config.modules_to_not_convert
    )
    expected = {
        name.replace("model.language_model.", "language_model.model.", 1) + ".weight"
        for name, module in reference.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, apart)
    }
    found = {
        key
        for key, tensor in read_tensors(tmp_path / "hf").items()
        if tensor.dtype == torch.float8_e4m3fn and ".mlp.experts." not in key
    }
    assert found == expected
