"""Comparing directories of every kind: nothing where nothing differs, and every difference by
name.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import torchsft
from tests.checkpoint.deepseek_format import write_deepseek
from tests.checkpoint.sources import (
    change_config,
    change_tensors,
    copy,
    read_tensors,
    weight_files,
    write_source,
)
from tools.conversion import convert
from tools.conversion.verify import info, verify
from torchsft.checkpoint.state import Checkpointer
from torchsft.config import InputError, Optim
from torchsft.optim.adamw import build_optimizer

SMALL = {"workers": 1, "part_elements": 700, "progress": False}
NORM = "model.norm.weight"


def differences(*sides, **options):
    found = verify(*sides, **(SMALL | options)).differences
    assert not any("\n" in line for line in found)
    return found


def notes(*sides, **options):
    findings = verify(*sides, **(SMALL | options))
    assert findings.differences == []
    return "\n".join(findings.notes)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One model in every kind of directory: bf16, its DCP, fp32, a training checkpoint; another in
    fp8, its DCP and bf16.
    """
    work = tmp_path_factory.mktemp("verify")
    write_source(work / "bf16", torch.bfloat16, sharded=True, mtp=True)
    write_deepseek(work / "fp8")
    for name in ("bf16", "fp8"):
        convert.to_dcp(work / name, work / f"{name}-dcp", file_bytes=60_000, **SMALL)
    convert.to_hf(work / "bf16-dcp", work / "fp32", dtype="fp32", **SMALL)
    convert.to_hf(work / "fp8-dcp", work / "fp8-bf16", dtype="bf16", **SMALL)
    model = torchsft.load_model(work / "bf16")
    optimizer = build_optimizer(model, Optim())
    config = {"model": {"path": str(work / "bf16")}}
    for step in (1, 2):
        Checkpointer(work).save(step, model, optimizer, extra={}, config=config, now=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return work


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("bf16", "bf16"),
        ("bf16", "bf16-dcp"),
        ("bf16-dcp", "bf16"),
        ("bf16-dcp", "bf16-dcp"),
        ("fp8", "fp8"),
        ("fp8", "fp8-dcp"),
        ("fp8-dcp", "fp8"),
        ("step-00000001", "step-00000001"),
    ],
)
def test_the_same_is_the_same(work, a, b):
    assert "tensors compared" in notes(work / a, work / b)


def test_a_training_checkpoint_against_what_it_began_with(work):
    """fp32 masters against bf16: the values are equal, the dtypes are not; MTP layers are not in
    it.
    """
    text = notes(work / "bf16", work / "step-00000001", tolerance=1e-6)
    own = {
        key: tensor
        for key, tensor in read_tensors(work / "bf16").items()
        if ".layers.3." not in key
    }
    assert (
        f"other dtypes, compared by value: {sum(t.dtype == torch.bfloat16 for t in own.values())} "
        f"tensors" in text
    )
    assert re.search(r"step-00000001 has none of 39 tensors \(model.layers.3", text)
    strict = differences(work / "step-00000001", work / "bf16")
    assert f"{NORM}: dtype F32 in {work / 'step-00000001'} and BF16 in {work / 'bf16'}" in strict
    assert not any("e_score_correction_bias" in line or "layers.3" in line for line in strict)
    assert "compared" in notes(work / "step-00000001", work / "fp32")
    # of another run, on other ranks
    run = {
        "model": {"path": str(work / "bf16")},
        "output": "elsewhere",
        "parallel": {"ep": 2},
        "train": {"seed": 1},
    }
    model = torchsft.load_model(work / "bf16")
    Checkpointer(work / "other").save(
        1, model, build_optimizer(model, Optim()), extra={}, config=run, now=True
    )
    text = notes(work / "step-00000001", work / "other" / "step-00000001")
    assert (
        re.search("of another run: train.*seed", text)
        and "output" not in text
        and "parallel" not in text
    )
    # two of them: the optimizer's state too, which the first does not have yet
    found = differences(work / "step-00000001", work / "step-00000002")
    assert any(
        re.search(r"only .*step-00000002 has \d+ tensors \(optimizer.state", line) for line in found
    )


def test_fp8_against_other_dtypes_within_a_tolerance(work):
    assert "config.json: quantization_config" in notes(
        work / "fp8", work / "fp8-bf16", tolerance=1e-2
    )
    strict = differences(work / "fp8", work / "fp8-bf16")
    assert any("dtype F8_E4M3" in line for line in strict) and any(
        "quantization_config" in line for line in strict
    )
    tight = differences(work / "fp8", work / "fp8-bf16", tolerance=1e-4)
    assert tight and all(
        re.search(r"values differ by up to \S+, where the largest is", line) for line in tight
    )


@pytest.mark.parametrize("a", ["bf16", "bf16-dcp"])
def test_one_flipped_bit_is_found(work, tmp_path, a):
    """In an expert of a sharded directory, on either side, in one process and in two."""
    other = copy(work / "bf16", tmp_path / "other")
    key = "model.layers.2.mlp.experts.6.gate_proj.weight"
    weight = read_tensors(other)[key].clone()
    weight.view(torch.int16)[15, 31] ^= 1
    change_tensors(other, {key: None})
    change_tensors(other, {key: weight})
    for sides in ((work / a, other), (other, work / a)):
        (line,) = differences(*sides)
        assert re.match(
            rf"{re.escape(key)}: 1 of 512 elements differ, the first at \[15, 31\]: "
            rf"\S+ in {sides[0]} and",
            line,
        )
    assert differences(work / a, other, tolerance=1e-2) == []
    if a == "bf16":
        assert len(differences(work / a, other, workers=2)) == 1


def test_flipped_bits_of_fp8_and_its_scales_are_found(work, tmp_path):
    other = copy(work / "fp8", tmp_path / "other")
    tensors = read_tensors(other)
    q, scale = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.3.self_attn.o_proj.weight_scale_inv",
    )
    changed = {q: tensors[q].clone(), scale: tensors[scale].clone()}
    changed[q].view(torch.uint8)[199, 159] ^= 1
    changed[scale].view(torch.int32)[0, 0] ^= 1
    change_tensors(other, dict.fromkeys(changed))
    change_tensors(other, changed)
    found = differences(work / "fp8", other)
    assert len(found) == 2
    assert any(
        line.startswith(f"{q}: 1 of 32000 elements differ, the first at [199, 159]")
        for line in found
    )
    assert f"{scale.removesuffix('_scale_inv')}: its fp8 scales differ" in found
    assert [line.split(":")[0] for line in differences(work / "fp8-dcp", other)] == [
        line.split(":")[0] for line in found
    ]


def test_keys_shapes_dtypes_and_nan(work, tmp_path):
    other = copy(work / "bf16", tmp_path / "other")
    tensors = read_tensors(other)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    nan = tensors["lm_head.weight"].clone()
    nan[5, 5] = torch.nan
    changes = {
        NORM: None,
        "model.layers.0.input_layernorm.weight": torch.ones(33, dtype=torch.bfloat16),
        bias: tensors[bias].bfloat16(),
        "lm_head.weight": nan,
        "some.counter": torch.tensor(3),
    }
    change_tensors(other, dict.fromkeys(changes.keys() - {"some.counter"}))
    change_tensors(other, {key: tensor for key, tensor in changes.items() if tensor is not None})
    found = differences(work / "bf16", other)
    assert sorted(line.split(":")[0] for line in found[2:]) == [
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        bias,
    ]
    assert found[0] == f"only {work / 'bf16'} has 1 tensor ({NORM})"
    assert found[1] == f"only {other} has 1 tensor (some.counter)"
    assert (
        f"model.layers.0.input_layernorm.weight: shape (32,) in {work / 'bf16'} and (33,) in "
        f"{other}" in found
    )
    assert f"{bias}: dtype F32 in {work / 'bf16'} and BF16 in {other}" in found
    found = differences(work / "bf16", other, tolerance=1)
    assert "lm_head.weight: one of them has nan or inf where the other has not" in found
    assert not any("lm_head" in line for line in differences(other, other))  # the same nan
    assert differences(other, other, tolerance=1e-3) == []


def test_config_differences_are_listed(work, tmp_path):
    other = copy(work / "bf16", tmp_path / "other")
    change_config(other, rms_norm_eps=1e-5, extra=[1])
    found = differences(work / "bf16", other)
    assert f"config.json: extra is absent in {work / 'bf16'} and [1] in {other}" in found
    assert len(found) == 2 and any("rms_norm_eps" in line for line in found)


@pytest.mark.parametrize("name", ["bf16-dcp", "step-00000002"])
def test_damaged_checkpoint_files_are_found(work, tmp_path, name):
    assert "sizes and checksums of its files are right" in notes(work / name)
    bad = copy(work / name, tmp_path / name)
    file = bad / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (line,) = differences(bad)
    assert re.match(
        rf"{bad}: __0_0.distcp has the checksum [0-9a-f]{{16}} instead of [0-9a-f]{{16}}", line
    )
    assert differences(bad, work / name) == differences(work / name, bad) == [line]
    file.write_bytes(data[:-1])
    assert differences(bad) == [
        f"{bad}: __0_0.distcp has {len(data) - 1} bytes instead of {len(data)}"
    ]
    file.unlink()
    assert differences(bad) == [f"{bad}: it has no __0_0.distcp"]
    (bad / "checkpoint.json").unlink()
    assert differences(bad) == [f"{bad}: it has no checkpoint.json"]


def test_one_directory_alone(work, tmp_path):
    assert (
        "its headers are sound, and it holds the weights that its config.json describes"
        in notes(work / "fp8")
    )
    bad = copy(work / "bf16", tmp_path / "bad")
    change_tensors(bad, {NORM: None})
    with pytest.raises(InputError, match=f"1 missing: {NORM}"):
        verify(bad, **SMALL)
    path = weight_files(bad)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        verify(bad, work / "bf16", **SMALL)


def test_dcp_of_another_model(work, tmp_path):
    other = write_source(
        tmp_path / "other", torch.bfloat16, sharded=False, mtp=False, n_routed_experts=12
    )
    found = differences(work / "bf16-dcp", other)
    assert any("n_routed_experts is 8" in line for line in found)
    assert any(
        re.search(r"only .*other has \d+ tensors \(model.layers.1.mlp.experts.10", line)
        for line in found
    )
    with pytest.raises(InputError, match="another model"):
        verify(work / "step-00000001", other, **SMALL)


def test_info_says_what_is_there(work):
    tensors = read_tensors(work / "fp8")
    mtp = [t for k, t in tensors.items() if k.startswith("model.layers.3.")]
    text = "\n".join(info(work / "fp8"))
    assert f"MTP layers: {len(mtp)} tensors of {sum(t.numel() for t in mtp):,} elements" in text
    assert "fp8 in blocks of 128 x 128" in text and "DeepseekV3ForCausalLM, 3 layers" in text
    assert "converted directory" in info(work / "fp8-dcp")[0] and "MTP layers" in "\n".join(
        info(work / "fp8-dcp")
    )
    text = "\n".join(info(work / "step-00000002"))
    assert f"after step 2 of a run that began with {work / 'bf16'}" in text
    assert re.search(r"weights: 47 tensors of \d", text) and "optimizer: " in text
    elements = sum(
        t.numel()
        for p in weight_files(work / "bf16")
        for k, t in load_file(p).items()
        if ".layers.3." not in k
    )
    assert f"weights: 47 tensors of {elements:,} elements; F32" in text
    with pytest.raises(InputError, match="does not exist"):
        info(work / "nowhere")
    assert json.loads((work / "bf16" / "config.json").read_text())["num_hidden_layers"] == 3
