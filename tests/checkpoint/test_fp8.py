"""Loading and exporting DeepSeek's block-scaled fp8, on one process and over ranks, against
`transformers` and plain loops.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM, FineGrainedFP8Config

import torchsft
from tests.checkpoint import parts
from tests.checkpoint.deepseek_format import (
    LAYERS,
    dequantised,
    is_fp8,
    plain,
    quantised,
    write_deepseek,
    write_plain,
)
from tests.checkpoint.sources import (
    INDEX,
    change_config,
    change_tensors,
    copy,
    read_tensors,
    same_bits,
    weight_files,
    write_source,
)
from torchsft.checkpoint.huggingface import check_weights, export
from torchsft.checkpoint.weight_files import WeightIndex
from torchsft.config import InputError

FP8 = torch.float8_e4m3fn
MTP = f"model.layers.{LAYERS}."
# Every weight's rows and columns are at most 128 or a multiple of it.
WHOLE_BLOCKS = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
# Ranks and options; the sizes leave shards that begin and end inside blocks.
LAYOUTS = {
    "ep2": (2, {"ep": 2}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2, "pp_schedule": "1F1B"}),
    "fsdp4": (4, {}),
    "ep4": (4, {"ep": 4}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2, "pp_schedule": "1F1B"}),
    "tp2-fsdp2-ep2": (4, {"tp": 2, "ep": 2}),
    "replicas": (4, {"dp_replicate": 2}),
}


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """As DeepSeek-V3 is published."""
    return write_deepseek(tmp_path_factory.mktemp("v3") / "source", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def v31(tmp_path_factory):
    """As DeepSeek-V3.1 is published: scales are powers of two."""
    return write_deepseek(
        tmp_path_factory.mktemp("v31") / "source", power_of_two=True, q_lora_rank=None
    )


@pytest.fixture(scope="module", params=["v3", "v31"])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(v3, tmp_path_factory):
    """What `transformers` makes of the dequantised copy, in fp32."""
    copied = write_plain(v3, tmp_path_factory.mktemp("reference") / "plain")
    return DeepseekV3ForCausalLM.from_pretrained(copied, dtype=torch.float32)


def different(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in expected if not same_bits(found[key], expected[key])]


def test_the_source_is_what_it_should_be(v3, v31):
    """Ragged blocks, several per row and column, scales apart from their weight, and powers of two
    in V3.1.
    """
    tensors, where = read_tensors(v3), json.loads((v3 / INDEX).read_text())["weight_map"]
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    assert tensors["model.layers.0.self_attn.kv_b_proj.weight_scale_inv"].shape == (3, 2)
    assert any(
        where[key] != where[f"{key}_scale_inv"] for key in where if f"{key}_scale_inv" in where
    )
    scales = torch.cat(
        [t.flatten() for key, t in read_tensors(v31).items() if key.endswith("_scale_inv")]
    )
    assert (scales.frexp().mantissa == 0.5).all() and len(scales.unique()) > 2


def test_values_are_those_that_transformers_loads(v3, reference):
    model = torchsft.load_model(v3)
    assert different(model.state_dict(), reference.state_dict()) == []
    tokens = torch.randint(0, 256, (40,))
    with torch.no_grad():
        logits = model(
            tokens, positions=torch.arange(40), cu_seqlens=torch.tensor([0, 40], dtype=torch.int32)
        )
        torch.testing.assert_close(logits, reference(tokens[None]).logits[0], rtol=0, atol=1e-4)


def test_a_bf16_model_is_rounded_once(v3, reference):
    expected = {
        key: t if key.endswith("bias") else t.bfloat16()
        for key, t in reference.state_dict().items()
    }
    assert different(torchsft.load_model(v3, dtype=torch.bfloat16).state_dict(), expected) == []


# --------------------------------------------------------------------------------------------------
# exporting


def test_what_training_did_not_change_comes_back_bit_by_bit(source, tmp_path):
    export(torchsft.load_model(source), tmp_path / "hf", "fp8", source, max_shard_bytes=200_000)
    # scales, MTP and bias too
    assert different(read_tensors(tmp_path / "hf"), read_tensors(source)) == []
    assert len(weight_files(tmp_path / "hf")) > 5
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert (
        index["weight_map"].keys() == json.loads((source / INDEX).read_text())["weight_map"].keys()
    )
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(source).values())
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config | {
        "dtype": "bfloat16"
    }


def test_what_training_changed_is_quantised_from_the_masters(source, tmp_path):
    """The same largest values in bf16, so that rounding twice cannot be better anywhere."""
    model = torchsft.load_model(source)
    weight = model.model.layers["1"].self_attn.o_proj.weight
    master = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.02
    master[::32, ::32] = 0.125  # in every block
    with torch.no_grad():
        weight.copy_(master)
        model.model.layers["2"].mlp.experts.gate_up_proj[5, 48 + 7, 9] = 0.7
        model.model.norm.weight[3] += 0.5
    export(model, tmp_path / "hf", "fp8", source)
    before, after = read_tensors(source), read_tensors(tmp_path / "hf")
    changed, up = (
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.experts.5.up_proj.weight",
    )
    assert {key.removesuffix("_scale_inv") for key in different(after, before)} == {
        changed,
        up,
        "model.norm.weight",
    }
    power_of_two = (
        json.loads((source / "config.json").read_text())["quantization_config"].get("scale_fmt")
        == "ue8m0"
    )
    q, scale = quantised(master, power_of_two)
    assert same_bits(after[changed], q) and same_bits(after[f"{changed}_scale_inv"], scale)
    error = (dequantised(after[changed], after[f"{changed}_scale_inv"]) - master).abs()
    rounded_twice = (dequantised(*quantised(master.bfloat16(), power_of_two)) - master).abs()
    assert (error <= rounded_twice).all() and (error < rounded_twice).sum() > 20
    # 48 x 160 are two blocks: one has the changed value, the other keeps its bytes.
    assert torch.equal(after[up].view(torch.uint8)[:, 128:], before[up].view(torch.uint8)[:, 128:])


def test_transformers_reads_the_same_from_source_and_export(tmp_path, monkeypatch):
    """Its own fp8 loader, which knows no ragged blocks and asks for `accelerate` without using it
    on a CPU.
    """
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True
    )
    source = write_deepseek(tmp_path / "source", **WHOLE_BLOCKS)
    model = torchsft.load_model(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    export(model, tmp_path / "hf", "fp8", source)
    for directory in (source, tmp_path / "hf"):
        fp32 = FineGrainedFP8Config(dequantize=True)
        loaded = DeepseekV3ForCausalLM.from_pretrained(
            directory, quantization_config=fp32, dtype=torch.float32
        ).state_dict()
        ours = torchsft.load_model(directory).state_dict()
        assert different({key: tensor.float() for key, tensor in loaded.items()}, ours) == []
        assert loaded["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_without_fp8_nothing_of_it_is_left(v3, reference, tmp_path, word, dtype):
    """The MTP layer too is in a dtype that a loader can use; the routing biases keep their bits."""
    export(torchsft.load_model(v3), tmp_path / "hf", word, v3)
    raw, values = read_tensors(v3), plain(read_tensors(v3))
    expected = {}
    for key, tensor in values.items():
        kept = key.endswith("bias") or (key.startswith(MTP) and not is_fp8(key))
        expected[key] = tensor if kept else tensor.to(dtype)
    found = read_tensors(tmp_path / "hf")
    assert different(found, expected) == []
    assert all(
        same_bits(found[key], raw[key]) for key in raw if key.endswith("e_score_correction_bias")
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == str(dtype).removeprefix(
        "torch."
    )
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == dtype
    tokens = torch.randint(0, 256, (1, 12))
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 15)
    if dtype == torch.float32:
        assert torch.equal(model(tokens).logits, reference(tokens).logits)


def test_a_bf16_source_is_exported_in_fp8(tmp_path):
    """DeepSeek's choice of weights, the MTP layer's among them, with DeepSeek-V3's
    quantization_config.
    """
    source = write_source(tmp_path / "source", torch.bfloat16, sharded=True, mtp=True)
    export(torchsft.load_model(source), tmp_path / "hf", "fp8", source)
    expected = read_tensors(source)
    for key in [key for key in expected if is_fp8(key)]:
        expected[key], expected[f"{key}_scale_inv"] = quantised(expected[key])
    assert different(read_tensors(tmp_path / "hf"), expected) == []
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    described = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert config["quantization_config"] == described and config["dtype"] == "bfloat16"
    again = torchsft.load_model(tmp_path / "hf").state_dict()
    assert same_bits(again["lm_head.weight"], expected["lm_head.weight"].float())
    export(torchsft.load_model(tmp_path / "hf"), tmp_path / "hf2", "fp8", tmp_path / "hf")
    assert different(read_tensors(tmp_path / "hf2"), expected) == []


def test_a_stale_description_does_not_name_the_fp8_that_is_written(tmp_path):
    """Of a source whose weights are bf16: the export's config.json describes what the export
    holds.
    """
    source = write_source(tmp_path / "source", torch.bfloat16, sharded=False, mtp=False)
    model = torchsft.load_model(source)
    export(model, tmp_path / "expected", "fp8", source)
    for stale in ({"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, "fp8"):
        change_config(source, quantization_config=stale)
        export(model, tmp_path / "hf", "fp8", source)
        assert different(read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "expected")) == []
        assert (tmp_path / "hf" / "config.json").read_bytes() == (
            tmp_path / "expected" / "config.json"
        ).read_bytes()


def test_carried_fp8_is_copied_without_being_decoded(v3, tmp_path, monkeypatch):
    model, decoded = torchsft.load_model(v3), []
    values = WeightIndex.values
    monkeypatch.setattr(
        WeightIndex,
        "values",
        lambda index, key, part: decoded.append(key) or values(index, key, part),
    )
    export(model, tmp_path / "hf", "fp8", v3)
    assert decoded and not any(map(is_fp8, decoded))


def test_a_source_without_weights_serves_an_fp8_export(v3, tmp_path):
    bare = copy(v3, tmp_path / "bare")
    for path in [*weight_files(bare), bare / INDEX]:
        path.unlink()
    export(torchsft.load_model(v3), tmp_path / "hf", "fp8", bare)
    keys = {key for key in read_tensors(v3) if not key.startswith(MTP)}
    assert read_tensors(tmp_path / "hf").keys() == keys


# --------------------------------------------------------------------------------------------------
# bad input


def test_a_stale_description_of_bf16_weights_does_no_harm(v3, reference, tmp_path):
    """DeepSeek's own script to bf16 leaves quantization_config behind."""
    stale = copy(v3, tmp_path / "stale")
    values = {key: t.bfloat16() if is_fp8(key) else t for key, t in plain(read_tensors(v3)).items()}
    for path in [*weight_files(stale), stale / INDEX]:
        path.unlink()
    save_file(values, stale / "model.safetensors")
    loaded = torchsft.load_model(stale).state_dict()
    key = "model.layers.0.self_attn.o_proj.weight"
    assert same_bits(loaded[key], reference.state_dict()[key].bfloat16().float())


@pytest.mark.parametrize(
    "key",
    ["model.layers.1.self_attn.q_a_proj.weight", "model.layers.2.mlp.experts.7.down_proj.weight"],
)
def test_values_that_are_not_finite_are_refused(v3, tmp_path, key):
    scale = read_tensors(v3)[f"{key}_scale_inv"].clone()
    scale[-1, -1] = float("nan")
    bad = copy(v3, tmp_path / "bad")
    change_tensors(bad, {f"{key}_scale_inv": None})
    change_tensors(bad, {f"{key}_scale_inv": scale})
    with pytest.raises(InputError, match=f"{key} holds nan or inf"):
        torchsft.load_model(bad)
    model = torchsft.load_model(v3)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.inf)  # the embedding, which stays bf16
        model.model.layers["0"].mlp.up_proj.weight[-1, -1] = torch.nan
    with pytest.raises(
        InputError,
        match=r"^model\.layers\.0\.mlp\.up_proj\.weight holds nan or "
        r"inf, which cannot be",
    ):
        export(model, tmp_path / "hf", "fp8", v3)
    assert not (tmp_path / "hf").exists()


def test_weights_of_another_size_are_named_without_their_scales(v3, tmp_path):
    bad = copy(v3, tmp_path / "bad")
    change_config(bad, kv_lora_rank=133)
    with pytest.raises(
        InputError,
        match=r"9 of another shape: .*kv_a_proj_with_mqa\.weight "
        r"\(\(140, 160\)",
    ) as error:
        check_weights(bad, parts.meta_model(bad))
    assert "_scale_inv" not in str(error.value) and "unexpected" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# over ranks


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, ranks, v3, tmp_path_factory):
    """Name, what each rank saw, and the fp8 export."""
    name, work = request.param, tmp_path_factory.mktemp("work")
    count, axes = LAYOUTS[name]
    seen = ranks(count, parts.weights, source=str(v3), work=str(work), name=name, dtype=FP8, **axes)
    return name, seen, work / name / "hf"


def test_every_layout_loads_what_transformers_loads(layout, reference):
    _, seen, _ = layout
    expected = reference.state_dict()
    assert set().union(*(rank["loaded"] for rank in seen)) == expected.keys()
    assert [
        key
        for rank in seen
        for key, tensor in rank["loaded"].items()
        if not same_bits(tensor, expected[key])
    ] == []


def test_every_layout_exports_the_source_s_bytes(layout, v3):
    _, _, exported = layout
    assert different(read_tensors(exported), read_tensors(v3)) == []


def test_each_rank_reads_only_its_part(layout, v3):
    """The sum over the ranks is the size of the weights, each as often as there are copies of it,
    and next to nothing more: the scales of blocks that lie on two ranks.
    """
    name, seen, _ = layout
    tensors = {key: t for key, t in read_tensors(v3).items() if not key.startswith(MTP)}
    expected = sum(tensor.nbytes * copies(key, name) for key, tensor in tensors.items())
    read = [rank["read"] for rank in seen]
    assert expected <= sum(read) < 1.001 * expected
    if "pp" not in name:
        assert max(read) < 1.002 * expected / len(read)


def copies(key, name):
    """How many ranks hold each element of a tensor: routing biases lie on every rank of a stage,
    and tensor parallelism leaves the latents' matrices, norms, routers and shared experts whole.
    """
    if key.endswith("e_score_correction_bias"):
        return LAYOUTS[name][0] // (2 if "pp2" in name else 1)
    cut = "embed_tokens lm_head q_b_proj kv_b_proj o_proj .experts. layers.0.mlp".split()
    return (
        2 if name == "replicas" or ("tp2" in name and not any(part in key for part in cut)) else 1
    )
