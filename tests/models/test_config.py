"""Reading config.json: the styles that exist, and what is refused."""

import json

import pytest
import torch

from torchsft.config import InputError
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.models.rope import Rope, Yarn

SIZES = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
# The fields of the official files that matter here.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "first_k_dense_replace": 1,
    "rope_theta": 50000.0,
    "vocab_size": 163840,
    "rope_scaling": V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0},
}
MOONLIGHT = V3 | {
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_theta": 50000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 163840,
    "routed_scaling_factor": 2.446,
    "num_nextn_predict_layers": 0,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    ("config", "billions"), [(V3, 671.0), (KIMI_K2, 1026.4), (MOONLIGHT, 15.96)]
)
def test_official_models_have_their_published_number_of_parameters(config, billions):
    """671 B (main model), 1 T and 16 B as their reports say, without MTP layers; built on the meta
    device.
    """
    with torch.device("meta"):
        model = DeepseekV3(DeepseekV3Config.from_hf(config))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_both_spellings_of_rope_mean_the_same():
    official = DeepseekV3Config.from_hf(V3)
    assert official.rope.theta == 10000.0
    assert official.rope.yarn == Yarn(
        factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0
    )
    scaling = {key: value for key, value in V3["rope_scaling"].items() if key != "type"}
    modern = {
        key: value
        for key, value in V3.items()
        if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    modern |= {
        "rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 10000.0},
        "dtype": "bfloat16",
    }
    assert DeepseekV3Config.from_hf(modern) == official
    assert DeepseekV3Config.from_hf(MOONLIGHT).rope == Rope(dim=64, theta=50000.0)


def test_absent_fields_mean_what_transformers_assumes():
    from transformers import DeepseekV3Config as Reference

    reference = Reference(**SIZES | {"first_k_dense_replace": Reference().first_k_dense_replace})
    config = DeepseekV3Config.from_hf(
        {key: value for key, value in SIZES.items() if key != "first_k_dense_replace"}
    )
    names = (
        "q_lora_rank n_shared_experts first_k_dense_replace norm_topk_prob routed_scaling_factor "
        "rms_norm_eps"
    )
    for name in [*names.split(), "initializer_range", "attention_bias", "tie_word_embeddings"]:
        assert getattr(config, name) == getattr(reference, name), name
    assert config.rope == Rope(dim=8, theta=reference.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config = "
            r'{"quant_method": "fp8"}.*bf16 or fp32',
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            r"quantization_config = "
            r".*awq.*only DeepSeek's fp8",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            r'"weight_block_size": \[128\]}',
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "fmt": "e5m2",
                    "weight_block_size": [128, 128],
                }
            },
            "e4m3",
        ),
        ({"hidden_size": None, "v_head_dim": None}, "lacks hidden_size, v_head_dim"),
        ({"n_group": 3}, "8 n_routed_experts, which n_group \\(3\\)"),
        ({"topk_group": 5}, "topk_group = 5, but only 4 groups"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5.* only 4 experts"),
        ({"n_group": 8, "topk_group": 4}, "8 n_routed_experts in 8 groups.*best two"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7.*even"),
        ({"v_head_dim": 64}, "v_head_dim = 64 above the 20"),
        ({"num_key_value_heads": 2}, "2 num_key_value_heads for 4 heads"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope type 'linear'.*'default', 'yarn', 'llama3' are",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax', but only 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy', but only 'noaux_tc'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        DeepseekV3Config.from_hf(SIZES | change)


def test_widths_that_grouped_mm_cannot_take_are_refused_with_the_remedy():
    config = DeepseekV3Config.from_hf(SIZES | {"moe_intermediate_size": 12})
    with pytest.raises(InputError, match=r"moe_intermediate_size \(12\).*--model.experts loop"):
        DeepseekV3(config)
    DeepseekV3(config, experts="loop")


def test_flops_equal_a_count_by_hand():
    """Matrices of SIZES with q_lora 24 and one dense layer of three; two documents of 10 and 6
    tokens.

    Attention: q_a 32x24, q_b 24x80, kv_a 32x28, kv_b 20x112, o 64x32 = 768 + 1920 + 896 + 2240 +
    2048 = 7872.
    Dense: 3x32x48 = 4608. MoE: (3 routed + 1 shared) x 3x32x16 + router 32x8 = 6144 + 256 = 6400.
    Head: 32x64 = 2048.
    Tokens: 16 x (3 x 7872 + 4608 + 2 x 6400 + 2048). Scores and values: 3 layers x 4 heads x (50 +
    18) pairs x 36.
    """
    config = DeepseekV3Config.from_hf(SIZES | {"q_lora_rank": 24})
    multiply_adds = 16 * (3 * 7872 + 4608 + 2 * 6400 + 2048) + 3 * 4 * (50 + 18) * (20 + 16)
    assert config.flops([10, 6]) == 6 * multiply_adds
    assert config.flops([]) == 0
    direct = DeepseekV3Config.from_hf(SIZES | {"q_lora_rank": None})
    assert config.flops([10]) - direct.flops([10]) == 6 * 10 * 3 * (768 + 1920 - 32 * 80)


YARN = V3["rope_scaling"]
NEW_YARN = {key: value for key, value in YARN.items() if key != "type"} | {"rope_type": "yarn"}
AGREEING = {
    "both tables": {
        "rope_parameters": NEW_YARN | {"rope_theta": 5e4},
        "rope_scaling": YARN,
        "rope_theta": 50000,
    },
    "both types": {"rope_scaling": YARN | {"rope_type": "yarn"}, "rope_theta": 5e4},
    "theta inside and outside": {
        "rope_parameters": NEW_YARN | {"rope_theta": 5e4},
        "rope_theta": 5e4,
    },
    "theta inside": {"rope_scaling": YARN | {"rope_theta": 5e4}},
    "nothing in one": {"rope_parameters": NEW_YARN | {"rope_theta": 5e4}, "rope_scaling": None},
}


@pytest.mark.parametrize("name", AGREEING)
def test_two_spellings_of_rope_that_agree_mean_what_transformers_reads(name):
    from transformers import DeepseekV3Config as Reference

    sizes = SIZES | {"max_position_embeddings": 163840}
    ours = DeepseekV3Config.from_hf(sizes | AGREEING[name]).rope
    theirs = Reference(**json.loads(json.dumps(sizes | AGREEING[name]))).rope_parameters
    assert (ours.theta, ours.yarn.factor, theirs["rope_type"]) == (
        theirs["rope_theta"],
        theirs["factor"],
        "yarn",
    )
    assert (
        ours.theta == 5e4
        and ours.yarn.original_context == theirs["original_max_position_embeddings"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": NEW_YARN, "rope_scaling": YARN | {"factor": 32}},
            "factor = 40 in rope_parameters and 32 in rope_scal",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
            "beta_fast = None in rope_parameters and 32",
        ),
        (
            {"rope_parameters": NEW_YARN | {"mscale": None}, "rope_scaling": YARN},
            "mscale = None .* and 1.0",
        ),
        (
            {"rope_parameters": NEW_YARN | {"rope_theta": 5e4}, "rope_scaling": YARN},
            "rope_theta = 50000.0 .* and 10000.0",
        ),
        (
            {"rope_scaling": YARN | {"rope_type": "default"}},
            "type = 'yarn' and rope_type = 'default' in rope_scaling",
        ),
        (
            {"rope_parameters": NEW_YARN | {"rope_theta": 1e4}, "rope_theta": 5e4},
            "rope_theta = 50000.0 and another one, 10000.0",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn', but it must be an object"),
        (
            {"num_local_experts": 16},
            "n_routed_experts = 8 and num_local_experts = 16, two names of one setting",
        ),
        ({"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_mtp_layers = 2"),
        (
            {"dtype": "bfloat16", "torch_dtype": "float32"},
            "dtype = 'bfloat16' and torch_dtype = 'float32'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ],
)
def test_two_spellings_that_differ_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        DeepseekV3Config.from_hf(SIZES | change)


def test_two_names_that_agree_are_read():
    change = {"num_local_experts": 8, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert DeepseekV3Config.from_hf(SIZES | change) == DeepseekV3Config.from_hf(SIZES)
