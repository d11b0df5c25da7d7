"""Qwen3, dense and with experts, against `transformers` in fp32."""

import pytest
import torch
from safetensors.torch import load_file

from tests.models.oracle import hf_logits, hf_loss, hf_qwen3, logits_of, our_model, packed
from tools.published import QWEN3_30B, QWEN3_235B
from torchsft import ops
from torchsft.config import InputError
from torchsft.models.families import build_model, read_model_config
from torchsft.models.language_model import LanguageModel
from torchsft.models.qwen3 import Qwen3Moe
from torchsft.models.rope import Rope, Yarn
from torchsft.models.routers import SoftmaxRouter

CASES = {
    "as Qwen3-MoE": {},
    "as Qwen3, dense": {"dense": True},
    "dense and tied": {"dense": True, "tie_word_embeddings": True},
    "all layers with experts": {"mlp_only_layers": []},
    "every second layer with experts": {"mlp_only_layers": [], "decoder_sparse_step": 2},
    "weights not normalised": {"norm_topk_prob": False},
    "attention bias": {"attention_bias": True},
    "as many key/value heads": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "other norm epsilon": {"rms_norm_eps": 1e-2},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
# The published file, as far as it matters here.
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case):
    """Documents packed, with padding; transformers sees each alone."""
    reference = hf_qwen3(**CASES[case])
    model = our_model(reference)
    inputs = packed([9, 32, 100], padding=11)
    expected = hf_logits(reference, inputs)
    got = logits_of(model, inputs)[: len(expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    expected_loss = hf_loss(expected, inputs)
    expected_loss.backward()
    loss = model(**inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    expected_gradients = {name: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    errors = {
        name: ((gradients[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected_gradients.items()
    }
    assert all(error <= 1e-4 for error in errors.values()), errors


@pytest.mark.parametrize("case", ["as Qwen3-MoE", "dense and tied"])
def test_three_optimizer_steps_equal_transformers(case):
    """AdamW on the mean loss, with a large eps, so that rounding does not decide the direction of
    an element without a gradient; other documents in each step.
    """
    reference = hf_qwen3(**CASES[case])
    model = our_model(reference)
    options = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(m.parameters(), **options) for m in (reference, model)]
    for step in range(3):
        inputs = packed([9 + step, 32, 20], padding=3, seed=step)
        weight = inputs["loss_weights"].sum()
        (hf_loss(hf_logits(reference, inputs), inputs) / weight).backward()
        (model(**inputs) / weight).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{"experts": "loop"}, {"attention": "flex"}])
def test_every_implementation_computes_the_same(options):
    """fp32 sums in another order; head_dim 16, since flex takes no other on some versions."""
    reference = hf_qwen3(head_dim=16)
    inputs = packed([9, 1, 40], padding=6)
    with torch.no_grad():
        expected, got = our_model(reference)(**inputs), our_model(reference, **options)(**inputs)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_plain_twins_compute_the_same_loss_and_gradients():
    reference = hf_qwen3()
    inputs = packed([9, 1, 40], padding=6)
    fast, slow = our_model(reference), our_model(reference, experts="loop")
    fast(**inputs).backward()
    ops.use_plain(True)
    try:
        slow(**inputs).backward()
    finally:
        ops.use_plain(False)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max(), name


def test_a_microbatch_of_padding_alone_gives_zero_gradients():
    model = our_model(hf_qwen3())
    loss = model(**packed([], padding=8))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_the_router_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    gate = SoftmaxRouter(12, 8, top_k=3, normalise=True)
    torch.nn.init.normal_(gate.weight)
    x_SD = torch.randn(20, 12)
    weights_SK, experts_SK, scores_SE, _ = gate(x_SD)
    torch.testing.assert_close(scores_SE.sum(-1), torch.ones(20))
    for token in range(20):
        scores = (x_SD[token] @ gate.weight.T).exp().tolist()
        chosen = sorted(range(8), key=lambda e: -scores[e])[:3]
        total = sum(scores[e] for e in chosen)
        expected = {e: scores[e] / total for e in chosen}
        pairs = zip(experts_SK[token].tolist(), weights_SK[token].tolist(), strict=True)
        assert dict(pairs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN3_30B, 30_532_122_624),
        (QWEN3_235B, 235_093_634_560),
        (QWEN3_8B, 8_190_735_360),
    ],
)
def test_published_models_have_their_number_of_parameters(config, parameters):
    """As the model cards' safetensors metadata say; built on the meta device."""
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_flops_equal_a_count_by_hand():
    """3 layers: q and o 32x48 each, k and v 32x24 each = 4608; experts 3x32x16 of 3 and router
    32x8 = 4864 in layers 0 and 2, dense 3x32x48 = 4608 in layer 1; head 32x61. Scores and values: 3
    layers x 4 heads x (50 + 18) pairs x 24.
    """
    config = our_model(hf_qwen3()).config
    multiply_adds = 16 * (3 * 4608 + 2 * 4864 + 4608 + 32 * 61) + 3 * 4 * (50 + 18) * 24
    assert config.flops([10, 6]) == 6 * multiply_adds


SIZES = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, r"4 num_attention_heads, which num_key_value_heads \(3\)"),
        ({"num_key_value_heads": None}, "lacks num_key_value_heads"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_attention_heads": "4"}, "num_attention_heads = '4', but numbers are needed"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"num_local_experts": 16}, "num_experts = 8 and num_local_experts = 16, two names"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9, but only 8"),
        ({"use_sliding_window": True}, "use_sliding_window = True, but only False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "with sliding_attention; only"),
        ({"head_dim": 7}, "head_dim = 7, but it must be even"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu'"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers = '0', but it must be a list"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
        ({"quantization_config": {"quant_method": "awq"}}, "only DeepSeek's fp8"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        read_model_config(SIZES | change)


def test_absent_fields_mean_what_transformers_assumes():
    from transformers import Qwen3Config, Qwen3MoeConfig

    for reference, absent in ((Qwen3MoeConfig(**SIZES), ()), (Qwen3Config(**SIZES), ("experts",))):
        architecture = f"{type(reference).__name__.removesuffix('Config')}ForCausalLM"
        config = read_model_config(SIZES | {"architectures": [architecture]})
        names = ["rms_norm_eps", "initializer_range", "attention_bias", "tie_word_embeddings"]
        names += ["max_position_embeddings"]
        if not absent:
            names += ["norm_topk_prob", "decoder_sparse_step"]
        for name in names:
            assert getattr(config, name) == getattr(reference, name), name
        head_dim = getattr(reference, "head_dim", 32 // 4)
        assert config.head_dim == head_dim
        theta = reference.rope_parameters["rope_theta"]
        assert config.rope == Rope(dim=head_dim, theta=theta, pairing="halves")


def test_the_spellings_of_transformers_and_of_published_files_mean_the_same():
    published = read_model_config(QWEN3_30B)
    modern = {
        key: value
        for key, value in QWEN3_30B.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype", "num_experts")
    }
    modern |= {
        "num_local_experts": 128,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    assert read_model_config(modern) == published
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = read_model_config(QWEN3_30B | {"rope_scaling": yarn}).rope
    assert rope.yarn == Yarn(factor=4.0, original_context=32768)


def test_checkpoint_pieces_are_the_keys_of_a_saved_checkpoint(tmp_path):
    """transformers writes experts one by one; the pieces name all its keys, once, in their
    shapes.
    """
    reference = hf_qwen3()
    reference.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    pieces = [p for parts in our_model(reference).checkpoint_pieces().values() for p in parts]
    assert sorted(piece.key for piece in pieces) == sorted(on_disk)
    assert all(tuple(on_disk[piece.key].shape) == piece.hf_shape for piece in pieces)


def test_norms_begin_at_one_whatever_they_are_called():
    model: LanguageModel = our_model(hf_qwen3(attention_bias=True))
    for name, parameter in model.named_parameters():
        value = model.initial_value(name, tuple(parameter.shape), seed=0)
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert value.std().item() == pytest.approx(0.1, rel=0.2), name


def test_the_quantised_matrices_are_those_of_the_published_fp8_release():
    """Qwen3-30B-A3B-FP8: its `modules_to_not_convert` are the head, the norms and the routers;
    embeddings are no linear maps.
    """
    layer = "model.layers.3."
    names = [f"self_attn.{name}_proj" for name in "qkvo"]
    names += [
        f"mlp.{part}{name}_proj" for part in ("", "experts.127.") for name in ("gate", "up", "down")
    ]
    assert all(Qwen3Moe.is_quantised(f"{layer}{name}.weight") for name in names)
    others = [f"{layer}{name}" for name in ("mlp.gate", "input_layernorm", "self_attn.q_norm")]
    others += ["lm_head", "model.norm", "model.embed_tokens"]
    assert not any(Qwen3Moe.is_quantised(f"{name}.weight") for name in others)
    assert not Qwen3Moe.is_quantised(f"{layer}self_attn.q_proj.bias")
