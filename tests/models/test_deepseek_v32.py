"""What is special to DeepSeek-V3.2 and GLM-5: the indexer and what it chooses."""

import pytest
import torch

from tests.checkpoint.sources import change_tensors, read_tensors, same_bits
from tests.families import tiny
from tests.models.oracle import logits_of, our_model, packed
from tests.models.test_parity import reference
from tests.tiny import write_tiny_model
from torchsft import load_model
from torchsft.checkpoint.huggingface import export
from torchsft.config import InputError
from torchsft.models.families import read_model_config


def test_the_choice_equals_a_loop_over_tokens():
    """In float64, head by head; chunks of queries, and padding, which sees itself."""
    model = our_model(reference("deepseek_v32"))
    indexer = model.model.layers["0"].self_attn.indexer
    seen = []
    indexer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    inputs = packed([30, 70], padding=4)
    logits_of(model, inputs)
    x_SD, q_TR, documents = seen[0]
    got = indexer.forward(x_SD, q_TR, documents)
    with torch.no_grad():
        k = indexer.k_norm(indexer.wk(x_SD)).double()
        q = indexer.wq_b(q_TR).unflatten(-1, (32, 20)).double()
        weights = indexer.weights_proj(x_SD).double()
    cos, sin = documents.cos_TP.double(), documents.sin_TP.double()

    def turned(entries, place):
        first, second = entries[:4], entries[4:8]
        c, s = cos[place], sin[place]
        return torch.cat([first * c - second * s, second * c + first * s, entries[8:]])

    document = [0] * 30 + [1] * 70 + [2] * 4
    for token in range(104):
        scores = {}
        for other in range(token + 1):
            if document[other] == document[token]:
                key = turned(k[other], other)
                scores[other] = sum(
                    weights[token, head] * (turned(q[token, head], token) @ key).relu()
                    for head in range(32)
                ).item()
        chosen = got[token].nonzero().flatten().tolist()
        others = [scores[other] for other in scores.keys() - set(chosen)]
        assert len(chosen) == min(24, len(scores)) and scores.keys() >= set(chosen)
        # rounding may swap two that are equal
        assert not others or min(scores[other] for other in chosen) > max(others) - 1e-6


def test_up_to_the_limit_the_attention_is_that_of_all_tokens():
    """To the bit, and a token more makes a difference."""
    sparse, dense = (our_model(reference("deepseek_v32", index_topk=n)) for n in (24, 1000))
    for length, same in ((24, True), (40, False)):
        inputs = packed([5, length])
        with torch.no_grad():
            assert torch.equal(logits_of(sparse, inputs), logits_of(dense, inputs)) == same


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_same():
    model = our_model(reference("deepseek_v32", qk_nope_head_dim=24, v_head_dim=16))
    inputs = packed([60, 20], padding=8)
    with torch.no_grad():
        expected = logits_of(model, inputs)
        model.attention = "flex"
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=0, atol=1e-5)


def test_layers_that_share_a_choice_refuse_longer_documents():
    model = our_model(reference("glm_moe_dsa", "layers share choices", index_topk=24))
    logits_of(model, packed([24, 20]))
    with pytest.raises(InputError, match="has 25 tokens, above index_topk = 24"):
        logits_of(model, packed([25]))


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        ({}, "FFFF"),
        ({"index_topk_freq": 2}, "FFSF"),
        ({"index_topk_pattern": "FSFS"}, "FSFS"),
        ({"indexer_types": ["full", "full", "shared", "shared"]}, "FFSS"),
    ],
)
def test_which_layers_choose_is_read_as_transformers_reads_it(said, kinds):
    from transformers import GlmMoeDsaConfig

    described = {k: v for k, v in tiny("glm_moe_dsa").to_dict().items() if k != "indexer_types"}
    config = read_model_config(described | said)
    assert "".join(kind[0].upper() for kind in config.indexer_types) == kinds
    theirs = GlmMoeDsaConfig(**{k: v for k, v in described.items() if v is not None}, **said)
    assert tuple(theirs.indexer_types) == config.indexer_types


def test_exports_have_the_indexer_as_it_was(tmp_path):
    """In the source's dtypes: transformers keeps one of its matrices in fp32."""
    source = write_tiny_model(
        tmp_path / "source", config=tiny("deepseek_v32"), dtype=torch.bfloat16
    )
    key = "model.layers.2.self_attn.indexer.weights_proj.weight"
    change_tensors(source, {key: torch.randn(32, 32)})
    before = read_tensors(source)
    model = load_model(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in model.constants():
                parameter.mul_(1.1)
    export(model, tmp_path / "hf", "bf16", source)
    after = read_tensors(tmp_path / "hf")
    assert before.keys() == after.keys() and after[key].dtype == torch.float32
    for name in before:
        constant = ".indexer." in name or name.endswith("e_score_correction_bias")
        assert same_bits(after[name], before[name]) == constant, name


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank = None"),
        ("deepseek_v32", {"index_topk": 0}, "index_topk = 0"),
        ("deepseek_v32", {"index_head_dim": 4}, "index_head_dim = 4 below the 8 rotated"),
        ("deepseek_v32", {"layer_types": ["full_attention"] * 4}, "only indexed_attention"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] * 4}, "full of the first"),
        ("glm_moe_dsa", {"indexer_types": ["full"] * 3}, "of 4 layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(family, change, message):
    with pytest.raises(InputError, match=message):
        read_model_config(tiny(family).to_dict() | change)
