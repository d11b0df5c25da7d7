"""Converted directories and training checkpoints by Hugging Face key: the same tensors, slices,
values, scales and bytes.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchsft
from tests.checkpoint.deepseek_format import is_fp8, plain, write_deepseek
from tests.checkpoint.sources import change_config, copy, read_tensors, same_bits, write_source
from tools.conversion import convert
from tools.conversion.convert import slices
from tools.conversion.training import is_training
from torchsft.checkpoint.converted import ConvertedWeights, is_dcp
from torchsft.checkpoint.huggingface import check_weights, read_config
from torchsft.checkpoint.state import Checkpointer
from torchsft.config import InputError, Optim
from torchsft.optim.adamw import build_optimizer


def to_dcp(source, out):
    convert.to_dcp(source, out, workers=1, part_elements=3000, file_bytes=60_000, progress=False)
    return out


def opened(directory, config_of=None):
    pieces = convert.meta_model(read_config(config_of or directory)).checkpoint_pieces()
    return ConvertedWeights(directory, pieces)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("bf16") / "source", torch.bfloat16, sharded=True, mtp=True
    )


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_deepseek(tmp_path_factory.mktemp("fp8") / "source")


@pytest.fixture(scope="module")
def dcp8(fp8):
    return to_dcp(fp8, fp8.with_name("dcp"))


@pytest.fixture(scope="module")
def dcp16(bf16):
    return to_dcp(bf16, bf16.with_name("dcp"))


def test_keys_shapes_and_values_are_those_of_the_source(bf16, dcp16):
    expected, weights = read_tensors(bf16), opened(dcp16)
    assert weights.tensors.keys() == expected.keys() and not weights.packed
    for key, tensor in expected.items():
        assert weights.tensors[key].shape == tuple(tensor.shape)
        assert same_bits(weights.read_whole(key), tensor) and same_bits(
            weights.values(key, ()), tensor
        ), key
        assert weights.scales(key) is None


def test_fp8_weights_are_their_values_and_know_their_scales(fp8, dcp8):
    tensors, weights = read_tensors(fp8), opened(dcp8)
    values = plain(tensors)
    assert weights.packed.keys() == {key for key in values if is_fp8(key)}
    # Scales of the model's weights are told by `scales` alone; MTP layers are as they were.
    mtp = {key for key in tensors if key.startswith("model.layers.3.")}
    assert weights.tensors.keys() == values.keys() | mtp
    for key, value in values.items():
        assert same_bits(weights.values(key, ()), value), key
        scales, expected = weights.scales(key), tensors.get(f"{key}_scale_inv")
        assert scales is None if expected is None else same_bits(scales, expected), key
    for key in mtp:
        assert same_bits(weights.read_whole(key), tensors[key]), key


def test_any_slice(fp8, dcp8):
    """Of a plain weight, an expert in a stacked tensor, a carried fp8 weight with ragged blocks,
    and a vector.
    """
    values, weights = plain(read_tensors(fp8)), opened(dcp8)
    keys = [
        "model.embed_tokens.weight",
        "model.layers.2.mlp.experts.5.up_proj.weight",
        "model.layers.3.self_attn.kv_b_proj.weight",
        "model.layers.3.self_attn.q_b_proj.weight",
        "model.norm.weight",
    ]

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.sampled_from(keys), st.data())
    def check(key, data):
        bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in values[key].shape]
        index = tuple(slice(a, b) for a, b in bounds[: data.draw(st.integers(0, len(bounds)))])
        assert same_bits(weights.values(key, index), values[key][index])

    check()


def test_only_the_bytes_of_a_slice_are_read(tmp_path):
    """Of a tensor large enough that its chunk is not read whole."""
    source = write_source(
        tmp_path / "source", torch.bfloat16, sharded=False, mtp=False, vocab_size=4096
    )
    convert.to_dcp(source, tmp_path / "dcp", workers=1, progress=False)
    weights, key = opened(tmp_path / "dcp"), "model.embed_tokens.weight"
    weights.read(key, (slice(0, 1),))  # and the headers of its archive, once
    before = weights.bytes_read
    part = weights.read(key, (slice(100, 1100),))
    assert weights.bytes_read - before == part.nbytes == 64_000
    assert same_bits(part, read_tensors(source)[key][100:1100])


def test_a_training_checkpoint_has_the_models_weights(bf16, tmp_path):
    model = torchsft.load_model(bf16)
    Checkpointer(tmp_path).save(
        3, model, build_optimizer(model, Optim()), extra={}, config={}, now=True
    )
    place = tmp_path / "step-00000003"
    assert is_dcp(place) and is_training(place)
    weights = opened(place, config_of=bf16)
    expected = {
        key: tensor.float()
        for key, tensor in read_tensors(bf16).items()
        if not key.startswith("model.layers.3.")
    }
    assert weights.tensors.keys() == expected.keys()
    assert all(same_bits(weights.values(key, ()), tensor) for key, tensor in expected.items())


def test_a_model_loads_from_it(bf16, dcp16, fp8, dcp8):
    assert is_dcp(dcp16) and not is_training(dcp16) and not is_dcp(bf16)
    for source, dcp in ((bf16, dcp16), (fp8, dcp8)):
        expected, found = (
            torchsft.load_model(source).state_dict(),
            torchsft.load_model(dcp).state_dict(),
        )
        assert [
            name for name, tensor in expected.items() if not same_bits(tensor, found[name])
        ] == []


def test_what_does_not_fit_is_refused(bf16, dcp16, tmp_path):
    other = copy(dcp16, tmp_path / "other")
    change_config(other, n_routed_experts=16)
    with pytest.raises(InputError, match=r"not a complete checkpoint: config.json has \d+ bytes"):
        opened(other)
    with pytest.raises(
        InputError,
        match=r"another model.*experts.down_proj is \(8, 32, 16\) "
        r"instead of \(16, 32, 16\)",
    ):
        opened(dcp16, config_of=other)
    change_config(other, n_routed_experts=8, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"another model.*model.layers.2.* instead of absent"):
        opened(dcp16, config_of=other)
    change_config(other, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"another model.*model.layers.3.* is absent instead of"):
        opened(dcp16, config_of=other)
    absent = copy(dcp16, tmp_path / "absent")
    (absent / "__1_0.distcp").unlink()
    with pytest.raises(InputError, match=r"it has no __1_0\.distcp"):
        opened(absent)
    (absent / "checkpoint.json").unlink()
    with pytest.raises(InputError, match=r"it has no checkpoint\.json"):
        opened(absent)


def test_check_weights_takes_it(bf16, dcp16):
    """What the trainer calls."""
    weights = check_weights(
        dcp16, convert.meta_model(json.loads((bf16 / "config.json").read_text()))
    )
    assert isinstance(weights, ConvertedWeights)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("shape", [(), (7,), (10, 3), (2, 3, 5), (0, 4), (4, 0)])
def test_slices_cover_a_tensor_once(shape, multiple):
    count = torch.zeros(shape)
    parts = list(slices(shape, 13, multiple))
    for index in parts:
        assert all(part.step is None for part in index)
        count[index] += 1
        row = torch.Size(shape[1:]).numel()
        assert count[index].numel() <= max(13, multiple * row)
    assert (count == 1).all() and len(parts) >= 1
    assert all((index[0].stop - index[0].start) % multiple == 0 for index in parts[:-1])
