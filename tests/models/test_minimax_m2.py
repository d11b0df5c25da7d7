"""What is special to MiniMax-M2."""

import json

import pytest
import torch

import torchsft
from tests.checkpoint.sources import read_tensors, same_bits
from tests.families import tiny
from tests.tiny import write_tiny_model
from tools.published import MINIMAX_M2
from torchsft.checkpoint.huggingface import export
from torchsft.config import InputError
from torchsft.models.families import build_model, read_model_config
from torchsft.precision.blockwise import scale_shape


def published():
    with torch.device("meta"):
        return build_model(MINIMAX_M2)


def test_the_published_number_is_met_with_correction_biases_and_fp8_scales():
    """So the matrices that are fp8 are the right ones."""
    pieces = [piece for parts in published().checkpoint_pieces().values() for piece in parts]
    scales = [scale_shape(p.hf_shape) for p in pieces if published_is_fp8(p.key)]
    numbers = [torch.Size(shape).numel() for shape in [*(p.hf_shape for p in pieces), *scales]]
    assert sum(numbers) == 228_703_644_928


def published_is_fp8(key):
    """By modules_to_not_convert: of the matrices in layers, all but the router."""
    inside = key.startswith("model.layers.") and key.endswith(".weight")
    return inside and "norm" not in key and ".gate." not in key


def test_keys_and_what_is_fp8_are_those_of_the_release():
    model = published()
    keys = {p.key for parts in model.checkpoint_pieces().values() for p in parts}
    assert {key for key in keys if model.is_quantised(key)} == set(filter(published_is_fp8, keys))
    moe = "model.layers.61.block_sparse_moe"
    assert {f"{moe}.gate.weight", f"{moe}.e_score_correction_bias"} <= keys
    assert {f"{moe}.experts.255.{part}.weight" for part in ("w1", "w2", "w3")} <= keys
    down = model.checkpoint_pieces()["model.layers.61.mlp.experts.down_proj"][0]
    assert (down.key, down.hf_shape) == (f"{moe}.experts.0.w2.weight", (3072, 1536))
    attention = model.model.layers["61"].self_attn
    assert (len(attention.q_norm.weight), len(attention.k_norm.weight)) == (6144, 1024)


def test_an_fp8_release_comes_back_as_it_was(tmp_path):
    """Also the name that it has for e4m3."""
    plain, fp8 = tmp_path / "plain", tmp_path / "fp8"
    write_tiny_model(plain, config=tiny("minimax_m2"), dtype=torch.bfloat16)
    export(torchsft.load_model(plain), fp8, "fp8", plain)
    described = json.loads((fp8 / "config.json").read_text())
    described["quantization_config"] = MINIMAX_M2["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(described))
    export(torchsft.load_model(fp8), tmp_path / "again", "fp8", fp8)
    before, after = read_tensors(fp8), read_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(same_bits(after[key], before[key]) for key in before)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale_inv" in before
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == MINIMAX_M2["quantization_config"]


def test_rotated_entries_are_said_in_either_way():
    stated = {k: v for k, v in MINIMAX_M2.items() if k != "rotary_dim"}
    by_factor = stated | {"partial_rotary_factor": 0.5}
    table = {"rope_type": "default", "rope_theta": 5000000, "partial_rotary_factor": 0.5}
    silent = {key: value for key, value in stated.items() if key != "rope_theta"}
    ropes = [
        read_model_config(said).rope
        for said in (MINIMAX_M2, by_factor, silent | {"rope_parameters": table})
    ]
    assert {(rope.dim, rope.theta, rope.place, rope.pairing) for rope in ropes} == {
        (64, 5000000.0, "start", "halves")
    }
    assert read_model_config(stated).rope.dim == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 6, "partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25, not 0.5"),
        ({"attn_type_list": [1, 0, 1, 1]}, r"attn_type_list with \[0, 1\]; only 1 is supported"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9, but only 8 num_local_experts"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head', but only 'per_layer'"),
        ({"use_routing_bias": False}, "use_routing_bias = False, but only True"),
        ({"shared_intermediate_size": 64}, "shared_intermediate_size = 64, but only 0"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    described = tiny("minimax_m2").to_dict()
    with pytest.raises(InputError, match=message):
        read_model_config(described | change)


def test_mtp_modules_are_named_in_the_config_and_not_trained():
    with pytest.raises(InputError, match=r"--model\.mtp is train, but config\.json has 0 layers"):
        build_model(MINIMAX_M2, mtp="train")
