"""MTP layers that are trained: read from published fp8 files and converted directories, and written
back to the bit, with the shared weights in every place that the source has for them.
"""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint.deepseek_format import LAYERS, plain, write_deepseek
from tests.checkpoint.sources import (
    add_mtp,
    change_tensors,
    copy,
    read_tensors,
    same_bits,
    write_source,
)
from tools.conversion.convert import to_dcp
from torchsft.checkpoint.hf_directory import read_config
from torchsft.checkpoint.huggingface import check_weights, export, load_weights
from torchsft.config import InputError
from torchsft.models.families import build_model

MTP = f"model.layers.{LAYERS}."
COPIES = {
    f"{MTP}embed_tokens.weight": "model.embed_tokens.weight",
    f"{MTP}shared_head.head.weight": "lm_head.weight",
}


def load(directory):
    """The model with its MTP layers."""
    with torch.device("meta"):
        model = build_model(read_config(directory), mtp="train")
    index = check_weights(directory, model)
    load_weights(model.to_empty(device="cpu"), index)
    return model


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """As DeepSeek-V3 is published."""
    return write_deepseek(tmp_path_factory.mktemp("v3") / "source")


def test_what_was_not_changed_comes_back_to_the_bit_and_copies_are_the_shared_weights(v3, tmp_path):
    model, before = load(v3), read_tensors(v3)
    values = plain(before)
    for name in ("eh_proj", "enorm", "self_attn.kv_b_proj", "shared_head.norm"):
        tensor = model.state_dict()[f"{MTP}{name}.weight"]
        assert torch.equal(tensor, values[f"{MTP}{name}.weight"].float()), name
    export(model, tmp_path / "same", "fp8", v3)
    same = read_tensors(tmp_path / "same")
    assert same.keys() == before.keys()
    assert [key for key, tensor in before.items() if not same_bits(same[key], tensor)] == []

    changed = [*COPIES.values(), f"{MTP}eh_proj.weight", f"{MTP}self_attn.o_proj.weight"]
    with torch.no_grad():
        for name in changed:
            dict(model.named_parameters())[name].neg_()
    export(model, tmp_path / "other", "fp8", v3)
    other = read_tensors(tmp_path / "other")
    differ = {key for key, tensor in before.items() if not same_bits(other[key], tensor)}
    assert differ == {*changed, *COPIES}
    for key, name in COPIES.items():
        assert same_bits(other[key], other[name])


def test_a_converted_directory_serves_as_well(tmp_path):
    source = write_source(tmp_path / "source", torch.bfloat16, sharded=True, mtp=False)
    add_mtp(source)
    to_dcp(source, tmp_path / "dcp", workers=1, progress=False)
    expected, found = load(source).state_dict(), load(tmp_path / "dcp").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_files_without_the_copies_or_without_the_layers(v3, tmp_path):
    """Some publish one and not the other: an export has what the source has."""
    bare = copy(v3, tmp_path / "bare")
    change_tensors(bare, dict.fromkeys(COPIES))
    export(load(bare), tmp_path / "out", "fp8", bare)
    assert read_tensors(tmp_path / "out").keys() == read_tensors(v3).keys() - COPIES.keys()
    change_tensors(bare, {f"{MTP}eh_proj.weight": None})
    with pytest.raises(InputError, match=r"1 missing: model\.layers\.3\.eh_proj\.weight"):
        load(bare)
