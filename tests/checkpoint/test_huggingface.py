"""Hugging Face directory -> model -> Hugging Face directory on one process, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import fsspec
import pytest
import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

import torchsft
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
from torchsft.checkpoint.huggingface import (
    check_moving_bias,
    check_weights,
    export,
    initialise_weights,
    read_config,
)
from torchsft.config import InputError
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config

VARIANTS = {
    "bf16-sharded-mtp": {"dtype": torch.bfloat16, "sharded": True, "mtp": True},
    "fp32-tied-without-q-lora": {
        "dtype": torch.float32,
        "sharded": False,
        "mtp": False,
        "tie_word_embeddings": True,
        "q_lora_rank": None,
    },
    "fp16": {"dtype": torch.float16, "sharded": False, "mtp": False},
    "bf16-tied-sharded": {
        "dtype": torch.bfloat16,
        "sharded": True,
        "mtp": False,
        "tie_word_embeddings": True,
    },
    "fp32-mtp-without-q-lora": {
        "dtype": torch.float32,
        "sharded": False,
        "mtp": True,
        "q_lora_rank": None,
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    options = VARIANTS[request.param]
    return write_source(tmp_path_factory.mktemp(request.param) / "source", **options), options[
        "dtype"
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("source") / "source",
        torch.bfloat16,
        sharded=True,
        mtp=True,
        num_hidden_layers=3,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("single") / "source", torch.float32, sharded=False, mtp=False
    )


def meta_model(directory):
    with torch.device("meta"):
        return DeepseekV3(DeepseekV3Config.from_hf(read_config(directory)))


def refusal(directory, model=None):
    """The sentence with which a directory is refused."""
    with pytest.raises(InputError) as error:
        check_weights(directory, model or meta_model(directory))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip_is_bit_identical(variant, tmp_path):
    directory, dtype = variant
    export(
        torchsft.load_model(directory), tmp_path / "hf", dtype, directory, max_shard_bytes=50_000
    )
    before, after = read_tensors(directory), read_tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert same_bits(tensor, after[key]), key
    # data + header
    assert max(path.stat().st_size for path in weight_files(tmp_path / "hf")) < 50_000 + 20_000


def test_index_names_every_tensor_and_its_file(source, tmp_path):
    export(
        torchsft.load_model(source), tmp_path / "hf", torch.bfloat16, source, max_shard_bytes=50_000
    )
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert (
        index["weight_map"].keys() == json.loads((source / INDEX).read_text())["weight_map"].keys()
    )
    tensors = read_tensors(tmp_path / "hf")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = weight_files(tmp_path / "hf")
    assert [p.name for p in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert set(index["weight_map"].values()) == {path.name for path in files}


def test_transformers_loads_the_export_and_agrees(variant, tmp_path):
    directory, _ = variant
    model = torchsft.load_model(directory)
    export(model, tmp_path / "hf", "fp32", directory)
    tokens = torch.randint(0, 256, (40,))
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert reference.dtype == torch.float32
    original = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = original(tokens[None]).logits[0]
        assert torch.equal(reference(tokens[None]).logits[0], expected)
        logits = model(
            tokens, positions=torch.arange(40), cu_seqlens=torch.tensor([0, 40], dtype=torch.int32)
        )
    # the project's bound for fp32 logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith("<s><|im_start|>user")
    generated = reference.generate(
        tokens[None, :4], max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert generated.shape == (1, 7)


def test_everything_that_is_not_weights_is_taken_over(source, tmp_path):
    changed = copy(source, tmp_path / "source")
    change_config(
        changed,
        torch_dtype="float32",
        quantization_config={"quant_method": "fp8"},
        auto_map={"a": "b.C"},
    )
    (changed / "tiktoken.model").write_bytes(b"\0\1")
    (changed / "additional_chat_templates").mkdir()
    (changed / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (changed / "pytorch_model.bin.index.json").write_text("{}")
    export(torchsft.load_model(source), tmp_path / "hf", "bf16", changed)
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    for name in (
        "configuration_deepseek.py",
        "tiktoken.model",
        "additional_chat_templates/tools.jinja",
    ):
        assert (tmp_path / "hf" / name).read_bytes() == (changed / name).read_bytes()
    assert not (tmp_path / "hf" / "pytorch_model.bin.index.json").exists()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = json.loads((changed / "config.json").read_text())
    del expected["quantization_config"]
    assert config == expected | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_masters_are_rounded_once_and_the_bias_not_at_all(single, tmp_path):
    model = torchsft.load_model(single)
    export(model, tmp_path / "hf", "bf16", single)
    before, after = read_tensors(single), read_tensors(tmp_path / "hf")
    for key, tensor in before.items():
        assert same_bits(after[key], tensor if key.endswith("bias") else tensor.bfloat16()), key


def test_loading_in_bf16_keeps_the_bias_fp32(single):
    model = torchsft.load_model(single, dtype=torch.bfloat16)
    assert not model.training and all(
        p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()
    )
    tensors = read_tensors(single)
    for layer in (1, 2):
        key = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert same_bits(model.state_dict()[key], tensors[key])


def test_initialisation_is_the_given_value(single):
    model = torchsft.load_model(single)
    initialise_weights(model, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, model.initial_value(name, tuple(tensor.shape), 3)), name


def test_a_source_without_weights_serves_a_random_model(single, tmp_path):
    bare = copy(single, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    export(torchsft.load_model(single), tmp_path / "hf", "fp32", bare)
    assert read_tensors(tmp_path / "hf").keys() == read_tensors(single).keys()


def test_an_export_appears_only_when_complete(single, tmp_path, monkeypatch):
    model = torchsft.load_model(single)
    monkeypatch.setattr("torchsft.checkpoint.huggingface.copy_side_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "hf", "fp32", single)
    assert not (tmp_path / "hf").exists()
    monkeypatch.undo()
    export(model, tmp_path / "hf", "fp32", single)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_older_export_is_replaced_and_other_directories_are_not(single, tmp_path):
    model = torchsft.load_model(single)
    export(model, tmp_path / "hf", "fp32", single, max_shard_bytes=50_000)
    export(model, tmp_path / "hf", "bf16", single)
    assert [path.name for path in weight_files(tmp_path / "hf")] == [
        "model-00001-of-00001.safetensors"
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no exported model"):
        export(model, tmp_path / "mine", "fp32", single)
    with pytest.raises(InputError, match="also its source"):
        export(model, single, "fp32", single)


def test_an_export_to_a_remote_folder(source, tmp_path, monkeypatch):
    """Written in place, config.json last, so that an interrupted one is not taken for complete; the
    next one replaces it.
    """
    model, url = torchsft.load_model(source), "memory://bucket/run/hf"
    system = fsspec.filesystem("memory")
    system.makedirs("/bucket/run")
    monkeypatch.setattr("torchsft.checkpoint.huggingface.copy_side_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, url, "bf16", source)
    names = [path.rsplit("/", 1)[1] for path in system.ls("/bucket/run/hf", detail=False)]
    assert names and not {"config.json", INDEX} & set(names)
    monkeypatch.undo()
    export(model, url, "bf16", source, max_shard_bytes=50_000)
    export(model, tmp_path / "local", "bf16", source, max_shard_bytes=50_000)
    system.get("/bucket/run/hf", str(tmp_path / "fetched"), recursive=True)
    local, fetched = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("local", "fetched")
    )
    assert local == fetched and "tokenizer.json" in local
    system.pipe_file("/bucket/precious/thesis.tex", b"precious")
    with pytest.raises(InputError, match="holds no exported model"):
        export(model, "memory://bucket/precious", "bf16", source)


def memory(field):
    """A line of /proc/self/status in bytes: VmRSS is resident now, VmHWM its maximum."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory the way Linux does"
)
def test_export_holds_one_tensor_at_a_time(single, tmp_path):
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 64}
    bare = copy(single, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    change_config(bare, **wide)
    model = meta_model(bare).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()  # resident from here on
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    before = memory("VmRSS")
    export(model, tmp_path / "hf", "bf16", bare)
    grown = memory("VmHWM") - before
    written = sum(path.stat().st_size for path in weight_files(tmp_path / "hf"))
    # The largest tensor takes 0.6 MB; the rest of the bound is what Python itself allocates.
    assert written > 50e6 and grown < 10e6


def test_missing_unexpected_and_misshapen_keys_are_all_named(source, tmp_path):
    bad = copy(source, tmp_path / "bad")
    change_tensors(
        bad,
        {
            "model.layers.1.mlp.experts.5.up_proj.weight": None,
            "model.norm.weight": None,
            "model.layers.0.mlp.extra.weight": torch.zeros(2),
            "model.layers.2.self_attn.o_proj.weight": torch.zeros(32, 63, dtype=torch.bfloat16),
        },
    )
    text = refusal(bad)
    assert (
        "2 missing" in text
        and "model.layers.1.mlp.experts.5.up_proj.weight" in text
        and "model.norm.weight" in text
    )
    assert "1 unexpected: model.layers.0.mlp.extra.weight" in text
    assert (
        "1 of another shape: model.layers.2.self_attn.o_proj.weight ((32, 63) instead of (32, 64))"
        in text
    )


def test_a_long_list_is_cut_with_its_count(source, tmp_path):
    bad = copy(source, tmp_path / "bad")
    experts = [key for key in read_tensors(bad) if ".experts." in key and ".layers.1." in key]
    change_tensors(bad, dict.fromkeys(experts))
    text = refusal(bad)
    assert "24 missing" in text and "and 4 more" in text and text.count(".experts.") == 20


def test_a_tied_head_on_disk_must_equal_the_embedding(tmp_path):
    tied = write_source(
        tmp_path / "tied", torch.bfloat16, sharded=False, mtp=False, tie_word_embeddings=True
    )
    embedding = read_tensors(tied)["model.embed_tokens.weight"]
    change_tensors(
        tied,
        {
            "lm_head.weight": embedding.clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    export(torchsft.load_model(tied), tmp_path / "hf", "bf16", tied)
    assert "lm_head.weight" not in read_tensors(tmp_path / "hf")
    head = embedding.clone()
    head[-1, -1] += 1
    change_tensors(tied, {"lm_head.weight": head})
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tied)


def test_unknown_tensors_are_taken_over_with_a_note(source, tmp_path, capsys):
    """Named as no weight of the model could be; of any dtype. What looks like one of its own is
    refused (above).
    """
    unknown = {
        "model.vision.weight": torch.arange(6).reshape(2, 3),
        "router_statistics": torch.tensor(2.5, dtype=torch.float64),
        "model.layers.weird": torch.tensor([True, False]),
    }
    more = copy(source, tmp_path / "more")
    change_tensors(more, unknown | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    export(torchsft.load_model(more), tmp_path / "hf", "bf16", more)
    found = read_tensors(tmp_path / "hf")
    assert found.keys() == read_tensors(source).keys() | unknown.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in unknown.items())
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert str(more) in note and all(key in note for key in unknown) and "inv_freq" not in note


def test_weights_must_be_floating(single, tmp_path):
    bad = copy(single, tmp_path / "bad")
    change_tensors(bad, {"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    assert "model.norm.weight (I32)" in refusal(bad)


def test_a_coarse_routing_bias_cannot_be_moved(single, tmp_path):
    """An export has it in the dtype of the source, where small updates would be lost."""
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    bad = copy(single, tmp_path / "bad")
    with torch.device("meta"):
        model = DeepseekV3(DeepseekV3Config.from_hf(read_config(bad)))
    check_moving_bias(check_weights(bad, model), model)
    change_tensors(bad, {key: read_tensors(bad)[key].bfloat16()})
    with pytest.raises(
        InputError, match=f"{re.escape(key)} is BF16, which is too coarse for --rou"
    ):
        check_moving_bias(check_weights(bad, model), model)


def test_configurations_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="a JSON list, not an object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_weights_that_are_not_finite_are_refused(source, tmp_path, key):
    """A nan in an unused embedding row or in the routing bias would not show in the loss."""
    bad = copy(source, tmp_path / "bad")
    tensor = read_tensors(bad)[key].clone()
    tensor.view(-1)[-1] = float("nan")
    change_tensors(bad, {key: None})
    change_tensors(bad, {key: tensor})
    with pytest.raises(InputError, match=f"{re.escape(key)} holds nan or inf"):
        torchsft.load_model(bad)
