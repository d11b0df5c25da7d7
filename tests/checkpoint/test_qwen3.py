"""Qwen3's weights on their way: loaded, exported, converted and quantised, on one process and over
ranks, against `transformers` and plain loops.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import torchsft
from tests.checkpoint import parts
from tests.checkpoint.deepseek_format import quantised
from tests.checkpoint.sources import change_tensors, read_tensors, same_bits
from tests.tiny import tiny_qwen3_config, write_tiny_model
from tools.conversion import convert
from torchsft.checkpoint.huggingface import check_weights, export
from torchsft.config import InputError
from torchsft.models.families import build_model

FP8 = torch.float8_e4m3fn
SOURCES = {
    "with experts": {"num_hidden_layers": 4},
    "dense": {"dense": True, "attention_bias": True},
    "dense and tied": {"dense": True, "tie_word_embeddings": True},
}
# The names of the linear maps in Qwen3-30B-A3B-FP8's index, which have scales there.
QUANTISED = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def is_fp8(key: str) -> bool:
    *_, module, kind = ["", *key.split(".")]
    return kind == "weight" and module in QUANTISED


def different(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in expected if not same_bits(found[key], expected[key])]


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3") / "source"
    config = tiny_qwen3_config(**SOURCES[request.param])
    return write_tiny_model(directory, config=config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Of more than one block in either direction, some of them ragged."""
    config = tiny_qwen3_config(hidden_size=160, intermediate_size=200, head_dim=48)
    return write_tiny_model(tmp_path_factory.mktemp("experts") / "source", config=config)


def test_values_are_those_that_transformers_loads(source):
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = reference.state_dict()
    if reference.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    model = torchsft.load_model(source)
    assert different(model.state_dict(), expected) == []
    tokens = torch.randint(0, 256, (40,))
    with torch.no_grad():
        bounds = torch.tensor([0, 40], dtype=torch.int32)
        logits = model(tokens, positions=torch.arange(40), cu_seqlens=bounds)
        torch.testing.assert_close(logits, reference(tokens[None]).logits[0], rtol=0, atol=1e-4)


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
    loaded = torchsft.load_model(tmp_path / "dcp").state_dict()
    assert different(loaded, torchsft.load_model(source).state_dict()) == []


def test_an_export_is_loaded_by_transformers(source, tmp_path):
    model = torchsft.load_model(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    export(model, tmp_path / "hf", "fp32", source)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    assert different(found, model.state_dict()) == []


def test_an_fp8_export_has_its_matrices_in_fp8(source, experts, tmp_path):
    """Each linear map, `k_proj` and `v_proj` too, as a plain loop over blocks quantises it; the
    rest in bf16. The converter makes the same of a DCP directory.
    """
    for number, directory in enumerate((source, experts)):
        out, dcp = tmp_path / f"hf-{number}", tmp_path / f"dcp-{number}"
        export(torchsft.load_model(directory), out, "fp8", directory)
        found, before = read_tensors(out), read_tensors(directory)
        expected = {}
        for key, tensor in before.items():
            if is_fp8(key):
                expected[key], expected[f"{key}_scale_inv"] = quantised(tensor)
            else:
                expected[key] = tensor.bfloat16()
        assert different(found, expected) == []
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["weight_block_size"] == [128, 128]
        convert.to_dcp(directory, dcp, workers=1, progress=False)
        convert.to_hf(dcp, tmp_path / f"tool-{number}", dtype="fp8", workers=1, progress=False)
        assert different(read_tensors(tmp_path / f"tool-{number}"), found) == []


def test_transformers_reads_the_same_from_an_fp8_export(tmp_path, monkeypatch):
    """Its own fp8 loader, which knows no ragged blocks and asks for `accelerate` without using it
    on a CPU.
    """
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True
    )
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    config = tiny_qwen3_config(**sizes, head_dim=32)
    source = write_tiny_model(tmp_path / "source", config=config)
    export(torchsft.load_model(source), tmp_path / "hf", "fp8", source)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.float32,
    ).state_dict()
    ours = torchsft.load_model(tmp_path / "hf").state_dict()
    assert different({key: tensor.float() for key, tensor in loaded.items()}, ours) == []


LAYOUTS = {
    "tp4": (4, {"tp": 4}),  # ranks share key/value heads
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2, "pp_schedule": "1F1B"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_load_export_and_begin_as_one_process_does(ranks, experts, tmp_path, name):
    size, axes = LAYOUTS[name]
    seen = ranks(size, parts.weights, source=str(experts), work=str(tmp_path), name=name, **axes)
    model = torchsft.load_model(experts)
    expected = model.state_dict()
    initial = {
        name: model.initial_value(name, tuple(tensor.shape), 7) for name, tensor in expected.items()
    }
    for key, whole in (("loaded", expected), ("initial", initial)):
        found = {name: tensor for rank in seen for name, tensor in rank[key].items()}
        assert different(found, whole) == []
    export(model, tmp_path / "one", "bf16", experts)
    exported = read_tensors(tmp_path / name / "hf")
    assert different(exported, read_tensors(tmp_path / "one")) == []


def test_a_checkpoint_continues_on_another_layout(ranks, experts, tmp_path):
    """Written where ranks share key/value heads, read where a pipeline and an expert axis cut the
    model.
    """
    size, axes = LAYOUTS["tp4"]
    saved = ranks(size, parts.save, source=str(experts), directory=str(tmp_path), **axes)
    size, axes = LAYOUTS["pp2-ep2"]
    restored = ranks(size, parts.restore, source=str(experts), directory=str(tmp_path), **axes)
    found = {name: tensor for whole, _, _ in restored for name, tensor in whole.items()}
    assert different(found, saved[0][0]) == []


def test_a_layer_more_than_config_json_says_is_refused(experts, tmp_path):
    """Qwen3 has no layers for multi-token prediction that an export would carry through."""
    config = tiny_qwen3_config()
    source = write_tiny_model(tmp_path / "source", config=config)
    change_tensors(source, {"model.layers.3.self_attn.q_norm.weight": torch.ones(12)})
    with torch.device("meta"):
        model = build_model(config.to_dict() | {"architectures": None})
    with pytest.raises(InputError, match=r"holds 4 layers, but its config\.json has 3"):
        check_weights(source, model)
