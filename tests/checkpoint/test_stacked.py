"""Experts that `transformers` stored stacked: the same model as with experts one by one, and what
is refused by name.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

import torchsft
from tests.checkpoint.sources import INDEX, change_tensors, copy, read_tensors, same_bits
from tests.models.oracle import hf_logits, logits_of, packed
from tests.tiny import write_tiny_model
from tools.conversion.convert import to_dcp, to_hf
from tools.conversion.verify import info, verify
from torchsft.checkpoint.huggingface import export
from torchsft.checkpoint.weight_files import WeightIndex
from torchsft.config import InputError

EXPERTS = "model.layers.2.mlp.experts"
QUIET = {"workers": 1, "progress": False}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """`single` and `stacked`: the same bf16 model, both as transformers writes it, the latter in
    several files.
    """
    directory = tmp_path_factory.mktemp("stacked")
    write_tiny_model(directory / "single", dtype=torch.bfloat16)
    model = DeepseekV3ForCausalLM.from_pretrained(directory / "single", dtype=torch.bfloat16)
    model.save_pretrained(directory / "single")  # both by the same hand
    model.save_pretrained(directory / "stacked", save_original_format=False, max_shard_size="60KB")
    stored = json.loads((directory / "stacked" / INDEX).read_text())["weight_map"]
    assert f"{EXPERTS}.gate_up_proj" in stored and not any(f"{EXPERTS}.3." in key for key in stored)
    return directory


def test_the_model_is_that_of_experts_one_by_one(inputs):
    one, other = (torchsft.load_model(inputs / name) for name in ("single", "stacked"))
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    inputs_of_both = packed([9, 8])
    reference = DeepseekV3ForCausalLM.from_pretrained(inputs / "stacked", dtype=torch.float32)
    expected = hf_logits(reference, inputs_of_both)
    torch.testing.assert_close(logits_of(other, inputs_of_both), expected, rtol=0, atol=1e-4)


def test_a_slice_of_an_expert_reads_only_its_bytes(inputs):
    index, expected = WeightIndex(inputs / "stacked"), read_tensors(inputs / "single")
    for part in ("gate_proj", "up_proj", "down_proj"):
        key = f"{EXPERTS}.5.{part}.weight"
        before = index.bytes_read
        values = index.read(key, (slice(2, 5),))
        assert same_bits(values, expected[key][2:5])
        assert index.bytes_read - before == values.nbytes


def test_there_and_back_in_the_published_layout(inputs, tmp_path):
    to_dcp(inputs / "stacked", tmp_path / "dcp", **QUIET)
    to_hf(tmp_path / "dcp", tmp_path / "hf", **QUIET)
    export(
        torchsft.load_model(inputs / "stacked"),
        tmp_path / "exported",
        "bf16",
        inputs / "stacked",
    )
    keys = read_tensors(inputs / "single").keys()
    for directory in (tmp_path / "hf", tmp_path / "exported"):
        assert read_tensors(directory).keys() == keys
    for a, b in (("single", "stacked"), ("stacked", "single")):
        assert verify(inputs / a, inputs / b, **QUIET).differences == []
    assert verify(inputs / "stacked", tmp_path / "dcp", **QUIET).differences == []
    assert any("experts are stored stacked" in line for line in info(inputs / "stacked"))
    assert not any("experts are stored stacked" in line for line in info(inputs / "single"))


def test_verify_names_the_expert_that_differs(inputs, tmp_path):
    other = copy(inputs / "stacked", tmp_path / "other")
    key = f"{EXPERTS}.gate_up_proj"
    changed = read_tensors(other)[key]
    changed[6, 20, 3] += 1  # row 20 of 32: the upper half is the gate
    change_tensors(other, {key: changed})
    found = verify(inputs / "single", other, **QUIET).differences
    assert len(found) == 1 and found[0].startswith(
        f"{EXPERTS}.6.up_proj.weight: 1 of 512 elements differ"
    ), found
    assert "the first at [4, 3]" in found[0]


def refusal(directory) -> str:
    with pytest.raises(InputError) as error:
        torchsft.load_model(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_whole_stack_is_refused_with_names(inputs, tmp_path):
    tensors = read_tensors(inputs / "stacked")
    single = {f"{EXPERTS}.0.up_proj.weight": torch.zeros(16, 32, dtype=torch.bfloat16)}
    up, down = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
    fp8 = tensors[up].to(torch.float8_e4m3fn)
    cases = {
        "both": (
            single,
            rf"stacked \(.*gate_up_proj.*\) and one by one "
            rf"\({re.escape(next(iter(single)))}\)",
        ),
        "lonely": ({down: None}, rf"stored stacked, but {re.escape(down)} is absent"),
        "few": (
            {up: tensors[up][:7], down: tensors[down][:7]},
            r"missing: "
            r".*experts\.7\.gate_proj\.weight",
        ),
        "many": ({up: tensors[up].repeat(2, 1, 1)}, r"unexpected: .*experts\.8\.gate_proj\.weight"),
        "narrow": (
            {up: tensors[up][:, :30]},
            r"gate_proj\.weight \(\(15, 32\) instead of \(16, "
            r"32\)\)",
        ),
        "odd": (
            {up: tensors[up][:, :31]},
            rf"{re.escape(up)} \(BF16, \(8, 31, 32\)\) cannot be "
            rf"split into experts",
        ),
        "flat": ({up: tensors[up].flatten(0, 1)}, r"cannot be split into experts"),
        "fp8": ({up: fp8}, rf"{re.escape(up)} holds stacked experts in fp8"),
        "scaled": ({f"{up}_scale_inv": torch.ones(8, 1, 1)}, r"holds stacked experts in fp8"),
    }
    for name, (changes, sentence) in cases.items():
        directory = copy(inputs / "stacked", tmp_path / name)
        (directory / INDEX).unlink()
        for path in directory.glob("*.safetensors"):
            path.unlink()
        kept = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
        save_file(
            {key: tensor.contiguous() for key, tensor in kept.items()},
            directory / "model.safetensors",
        )
        assert re.search(sentence, refusal(directory)), (name, refusal(directory))


def test_stacks_of_one_layer_do_not_excuse_single_experts_of_another(inputs, tmp_path):
    """A directory of two halves was put together by mistake; which of them is meant cannot be
    known.
    """
    directory = copy(inputs / "stacked", tmp_path / "halves")
    of_layer_1 = {
        k: v
        for k, v in read_tensors(inputs / "single").items()
        if k.startswith("model.layers.1.mlp.experts.")
    }
    gone = dict.fromkeys(
        ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
    )
    tensors = {
        k: v
        for path in directory.glob("*.safetensors")
        for k, v in load_file(path).items()
        if k not in gone
    }
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors | of_layer_1, directory / "model.safetensors")
    assert "and one by one (model.layers.1.mlp.experts.0.down_proj.weight" in refusal(directory)
