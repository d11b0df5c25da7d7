"""Models released in INT4 (Kimi-K2-Thinking: DeepSeek-V3's architecture, experts packed) and in
MXFP4 (gpt-oss): loaded, converted, exported with every group that did not change, and verified.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

import torchsft
from tests.checkpoint import parts
from tests.checkpoint.sources import change_config, change_tensors, read_tensors, same_bits
from tests.families import tiny
from tests.precision.test_low_bit import INT4
from tests.tiny import tiny_config, write_tiny_model
from tools.conversion import convert
from tools.conversion.verify import verify
from torchsft.checkpoint.huggingface import export
from torchsft.config import InputError
from torchsft.precision.formats import Int4Groups, Mxfp4

FORMATS = ["int4", "mxfp4"]
SMALL = {"workers": 1, "part_elements": 9000, "progress": False}


def pack(directory, form, packed, quantization):
    """Replace the weights that `packed` names by parts, with scales that no rule would give."""
    changed = {}
    for key, tensor in read_tensors(directory).items():
        if packed(key):
            made = form.encode(tensor.float(), None, key)
            scales = made[key + form.scales]
            made[key + form.scales] = scales * 1.25 if scales.is_floating_point() else scales + 1
            changed |= {key: None} | made | form.constants(key, tuple(tensor.shape))
    change_tensors(directory, changed)
    change_config(directory, quantization_config=quantization)
    return directory


@pytest.fixture(scope="module", params=FORMATS)
def source(request, tmp_path_factory):
    """A release, its other weights in bf16."""
    directory = tmp_path_factory.mktemp(request.param) / "source"
    if request.param == "int4":
        config = tiny_config(hidden_size=64, moe_intermediate_size=32)
        write_tiny_model(directory, config=config, dtype=torch.bfloat16)
        return pack(directory, Int4Groups(), lambda key: ".mlp.experts." in key, INT4)
    config = tiny("gpt_oss", hidden_size=64, intermediate_size=32)
    write_tiny_model(directory, config=config, dtype=torch.bfloat16)
    ends = ("experts.gate_up_proj", "experts.down_proj")
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    description = {"quant_method": "mxfp4", "modules_to_not_convert": [*others, "lm_head"]}
    return pack(directory, Mxfp4(), lambda key: key.endswith(ends), description)


def form_of(source):
    return json.loads((source / "config.json").read_text())["quantization_config"]["quant_method"]


def word(source):
    return "mxfp4" if form_of(source) == "mxfp4" else "int4"


def different(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in expected if not same_bits(found[key], expected[key])]


def test_there_and_back_every_bit_is_the_same(source, tmp_path):
    """Hugging Face -> DCP -> Hugging Face, in many small parts; `verify` says so too."""
    convert.to_dcp(source, tmp_path / "dcp", file_bytes=40_000, **SMALL)
    convert.to_hf(
        tmp_path / "dcp", tmp_path / "hf", dtype=word(source), max_shard_bytes=50_000, **SMALL
    )
    assert different(read_tensors(tmp_path / "hf"), read_tensors(source)) == []
    before, after = (
        json.loads((directory / "config.json").read_text())
        for directory in (source, tmp_path / "hf")
    )
    assert before["quantization_config"] == after["quantization_config"]
    for other in ("dcp", "hf"):
        findings = verify(source, tmp_path / other, workers=1, progress=False)
        faults = [line for line in findings.differences if "torch_dtype" not in line]
        assert faults == []


def test_what_training_did_not_change_keeps_its_bytes(source, tmp_path):
    """One value of one expert changes: its group, and no other, has another scale or other values;
    what is exported is what is read back, to half a step.
    """
    model = torchsft.load_model(source)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter[3, 5, 20] += 0.7
    export(model, tmp_path / "hf", word(source), source)
    before, after = read_tensors(source), read_tensors(tmp_path / "hf")
    odd = different(after, before)
    assert 1 <= len(odd) <= 2 and all("layers.1.mlp.experts" in key for key in odd)
    for key in odd:
        groups = (after[key] != before[key]).nonzero()
        # values of a row (INT4: 4 words a group; MXFP4: 16 bytes), or one scale
        assert len(groups) <= (1 if key.endswith(("_scale", "_scales")) else 16)
        assert len({tuple(place[:-1].tolist()) for place in groups}) == 1
    again = dict(torchsft.load_model(tmp_path / "hf").named_parameters())
    largest = parameter.abs().max()
    for key, value in again.items():
        expected = dict(model.named_parameters())[key]
        packed = key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if key != name:
            assert torch.equal(value, expected if packed else expected.bfloat16().float())
        assert (value - expected).abs().max() <= largest / 4


def test_transformers_reads_the_same_from_an_mxfp4_export(source, tmp_path):
    """Its own loader, in bf16, which holds every value."""
    if word(source) != "mxfp4":
        pytest.skip("transformers reads INT4 only with the package compressed-tensors")
    ours = torchsft.load_model(source)
    export(ours, tmp_path / "hf", "mxfp4", source)
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options).state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs[ours.hf_key(name)], value.bfloat16()), name


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_other_formats_are_exported_too(source, tmp_path, dtype):
    """The tool makes the same of a DCP directory as a run does; nothing of the release's format is
    left, and config.json says so.
    """
    model = torchsft.load_model(source)
    if dtype == "fp8" and word(source) == "mxfp4":  # a family of which nobody reads fp8
        with pytest.raises(InputError, match="reads a GptOss in fp8"):
            export(model, tmp_path / "hf", dtype, source)
        return
    export(model, tmp_path / "hf", dtype, source)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ("quantization_config" in config) == (dtype == "fp8")
    convert.to_dcp(source, tmp_path / "dcp", **SMALL)
    convert.to_hf(tmp_path / "dcp", tmp_path / "tool", dtype=dtype, **SMALL)
    found = read_tensors(tmp_path / "hf")
    assert different(read_tensors(tmp_path / "tool"), found) == []
    assert not any(tensor.dtype in (torch.int32, torch.uint8) for tensor in found.values())
    if dtype == "bf16":
        again = dict(torchsft.load_model(tmp_path / "hf").named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(again[name], parameter.bfloat16().float()), name


def test_ranks_load_and_export_the_same(ranks, source, tmp_path):
    axes = {"tp": 2, "ep": 2}
    seen = ranks(
        2,
        parts.weights,
        source=str(source),
        work=str(tmp_path),
        name="r",
        dtype=word(source),
        **axes,
    )
    expected = torchsft.load_model(source).state_dict()
    found = {name: tensor for rank in seen for name, tensor in rank["loaded"].items()}
    assert different(found, expected) == []
    assert different(read_tensors(tmp_path / "r" / "hf"), read_tensors(source)) == []


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_format_of_few_bits_needs_a_release_in_it(tmp_path, dtype):
    source = write_tiny_model(tmp_path / "source")
    with pytest.raises(InputError, match=f"export {dtype} .* needs a source that is released in"):
        export(torchsft.load_model(source), tmp_path / "hf", dtype, source)


def test_parts_that_do_not_fit_are_refused_by_name(source, tmp_path):
    form = Mxfp4() if word(source) == "mxfp4" else Int4Groups()
    tensors = read_tensors(source)
    key = next(key for key in tensors if key.endswith(form.scales) and tensors[key].shape[-1] > 1)

    def refusal(**changes):
        directory = tmp_path / f"source-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        for path in source.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        if "tensors" in changes:
            change_tensors(directory, changes["tensors"])
        if "config" in changes:
            change_config(directory, **changes["config"])
        with pytest.raises(InputError) as error:
            torchsft.load_model(directory)
        return str(error.value)

    assert f"weights lack parts of them ({key})" in refusal(tensors={key: None})
    cut = tensors[key][..., :1].contiguous()
    assert f"{key} (" in refusal(tensors={key: cut})
    assert "quantization_config = null" in refusal(config={"quantization_config": None})
    unknown = {"quant_method": "gptq", "bits": 4}
    assert "MXFP4 are supported; give such" in refusal(config={"quantization_config": unknown})


def test_what_the_model_lacks_is_converted_too(source, tmp_path):
    """Weights of the release's format that no parameter takes (MTP layers are such), and tensors
    whose keys merely look like parts of it.
    """
    directory = shutil.copytree(source, tmp_path / "more")
    form = Mxfp4() if word(source) == "mxfp4" else Int4Groups()
    shape = (2, 64, 3) if word(source) == "mxfp4" else (4, 64)
    weight = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    made = form.encode(weight, None, "vision.weight") | form.constants("vision.weight", shape)
    named = {"vision.alpha": torch.ones(5, 7), "vision.alpha_scale": torch.ones(3)}
    change_tensors(directory, made | named | {"vision.num_blocks": torch.ones(2)})
    convert.to_dcp(directory, tmp_path / "dcp", file_bytes=40_000, **SMALL)
    convert.to_hf(tmp_path / "dcp", tmp_path / "hf", dtype=word(source), **SMALL)
    assert different(read_tensors(tmp_path / "hf"), read_tensors(directory)) == []
    assert verify(directory, tmp_path / "dcp", workers=1, progress=False).differences == []
