"""Every family that torchsft computes: tiny models of it, with its features on and off, and the
published models that its recipe has presets for.

What must hold for each of them is tested over these tables: tests/models/test_parity.py (logits and
gradients of `transformers`, strict configurations, FLOPs), tests/checkpoint/test_families.py
(conversions and exports), tests/distributed/test_families.py (layouts, resuming) and
tests/parallel/test_scale.py (presets). A family's own file of tests has what is special to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from recipes import (
    deepseek_v2_sft,
    deepseek_v3_sft,
    deepseek_v32_sft,
    glm4_moe_sft,
    gpt_oss_sft,
    llama_sft,
    minimax_m2_sft,
    qwen3_sft,
)
from tools.published import PUBLISHED as PUBLISHED
from torchsft.models.families import FAMILIES

# Each recipe's module.
RECIPES: list[ModuleType] = [
    deepseek_v2_sft,
    deepseek_v3_sft,
    deepseek_v32_sft,
    glm4_moe_sft,
    gpt_oss_sft,
    llama_sft,
    minimax_m2_sft,
    qwen3_sft,
]

# Widths that differ from each other; 4 layers, 4 query heads.
SIZES = dict(
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    initializer_range=0.1,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=12)
LATENT = SIZES | dict(
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class TinyFamily:
    """Tiny models of one architecture.

    Attributes:
        architecture: key of torchsft.models.families.FAMILIES.
        sizes: what transformers' configuration is made with.
        cases: name -> what is changed in it: features on and off.
        in_memory: pattern -> replacement, applied in order to our names: where `transformers` has
            other names in memory; None: those of the files.
        inert: fields of transformers' configuration that change nothing that is computed here,
            besides those that do so in no family.
    """

    architecture: str
    sizes: Mapping[str, Any]
    cases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    in_memory: Mapping[str, str] | None = None
    inert: frozenset[str] = frozenset()

    def config(self, **changes: Any) -> PreTrainedConfig:
        """Return transformers' configuration."""
        kind = CONFIG_MAPPING[FAMILIES[self.architecture].model_type]
        made = kind(**{**self.sizes, **changes})
        made.architectures = [self.architecture]
        return made


# Derived from others, of other versions, and keys and values, which must be as many as heads.
LATENT_INERT = frozenset(
    {"pretraining_tp", "output_router_logits", "head_dim", "qk_head_dim", "num_key_value_heads"}
)

TINY = {
    "deepseek_v2": TinyFamily(
        "DeepseekV2ForCausalLM",
        LATENT
        | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)
        | dict(first_k_dense_replace=1, routed_scaling_factor=2.0, n_shared_experts=2),
        {
            "as V2-Lite": {"q_lora_rank": None, "topk_method": "greedy", "n_group": None},
            "biases, tied, yarn": {
                "attention_bias": True,
                "tie_word_embeddings": True,
                "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            },
        },
        inert=LATENT_INERT,
    ),
    "deepseek_v32": TinyFamily(
        "DeepseekV32ForCausalLM",
        LATENT
        | dict(n_group=4, topk_group=2, first_k_dense_replace=1)
        # many heads, so that no scores are equal (all of their relus zero)
        | dict(index_topk=24, index_head_dim=20, index_n_heads=32),
        {
            "longest document within the choice": {"index_topk": 100},
            "yarn, tied": {
                "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
                "tie_word_embeddings": True,
            },
        },
        inert=LATENT_INERT,
    ),
    "glm_moe_dsa": TinyFamily(
        "GlmMoeDsaForCausalLM",
        LATENT
        | dict(v_head_dim=20, first_k_dense_replace=1)
        # many heads, so that no scores are equal (all of their relus zero)
        | dict(index_topk=24, index_head_dim=20, index_n_heads=32),
        {
            "layers share choices": {
                "indexer_types": ["full", "shared", "full", "shared"],
                "index_topk": 100,
            },
            "dense layers listed": {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]},
        },
        inert=LATENT_INERT,
    ),
    "glm4_moe": TinyFamily(
        "Glm4MoeForCausalLM",
        GROUPED
        | dict(moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3)
        | dict(attention_bias=True, n_group=4, topk_group=2, routed_scaling_factor=2.5),
        {
            "norms, no biases, one group, two shared experts": {
                "use_qk_norm": True,
                "attention_bias": False,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 2,
                "first_k_dense_replace": 3,
            },
            "whole heads rotated, not normalised, tied, one key/value head": {
                "rope_parameters": YARN | {"partial_rotary_factor": 1.0},
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                "first_k_dense_replace": 0,
                "num_key_value_heads": 1,
            },
            "yarn on half a head, norms": {
                "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
                "use_qk_norm": True,
                "head_dim": 8,
            },
        },
        inert=frozenset({"output_router_logits"}),
    ),
    "glm4_moe_lite": TinyFamily(
        "Glm4MoeLiteForCausalLM",
        LATENT | dict(v_head_dim=20, n_group=2, topk_group=1),
        {
            "no query latent, not normalised": {"q_lora_rank": None, "norm_topk_prob": False},
            "dense layers listed": {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]},
            "yarn": {"rope_parameters": YARN, "attention_bias": True},
        },
        inert=LATENT_INERT,
    ),
    "llama": TinyFamily(
        "LlamaForCausalLM",
        GROUPED,
        {
            "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
            "llama3 rope": {"rope_parameters": LLAMA3},
            "as many key/value heads": {"num_key_value_heads": None, "head_dim": None},
        },
        inert=frozenset({"pretraining_tp"}),
    ),
    "gpt_oss": TinyFamily(
        "GptOssForCausalLM",
        GROUPED
        | dict(
            intermediate_size=16,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=11,
            swiglu_limit=0.5,  # is met
            rope_parameters=YARN | {"rope_theta": 150000.0, "factor": 32.0, "truncate": False},
        ),
        {
            "all layers full, without biases": {
                "layer_types": ["full_attention"] * 4,
                "attention_bias": False,
            },
            "all layers see themselves alone, tied": {
                "layer_types": ["sliding_attention"] * 4,
                "sliding_window": 1,
                "tie_word_embeddings": True,
            },
            "wide clamps, whole pairs, one key/value head": {
                "swiglu_limit": 7.0,
                "swiglu_alpha": 0.7,
                "num_key_value_heads": 1,
                "rope_parameters": YARN,
            },
            "a window beyond every document, no yarn": {
                "sliding_window": 200,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        # of a loss that is not computed here, and of a name for what experts compute
        inert=frozenset({"router_aux_loss_coef", "output_router_logits"}),
    ),
    "minimax_m2": TinyFamily(
        "MiniMaxM2ForCausalLM",
        GROUPED
        | dict(intermediate_size=16, num_local_experts=8, num_experts_per_tok=3, rotary_dim=6),
        {
            "whole heads rotated, tied, one key/value head": {
                "rotary_dim": None,
                "tie_word_embeddings": True,
                "num_key_value_heads": 1,
            },
            "yarn on a part, as many key/value heads": {
                "rotary_dim": None,
                "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
                "num_key_value_heads": 4,
                "num_experts_per_tok": 2,
            },
        },
        in_memory={r"\.gate\.e_score": ".e_score"},
        inert=frozenset({"router_aux_loss_coef", "output_router_logits"}),
    ),
    "mistral": TinyFamily(
        "MistralForCausalLM",
        GROUPED | {"sliding_window": 20},
        {"tied, without a window": {"tie_word_embeddings": True, "sliding_window": None}},
    ),
    "qwen2": TinyFamily(
        "Qwen2ForCausalLM",
        {key: value for key, value in GROUPED.items() if key != "head_dim"},
        {"tied, yarn": {"tie_word_embeddings": True, "rope_parameters": YARN}},
        inert=frozenset({"sliding_window", "max_window_layers"}),
    ),
    "smollm3": TinyFamily(
        "SmolLM3ForCausalLM",
        {key: value for key, value in GROUPED.items() if key != "head_dim"},
        {
            "other layers without rope": {"no_rope_layers": [0, 1, 1, 0]},
            # biases of keys move nothing where there is no rope: their gradient is zero
            "biases": {"no_rope_layers": [1, 1, 1, 1], "attention_bias": True},
            "untied": {"tie_word_embeddings": False, "no_rope_layer_interval": 2},
        },
        inert=frozenset({"sliding_window"}),
    ),
}

# Fields that change nothing in the computation of training, in any family.
INERT = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"),
    # of generation, outputs and other heads in old files of every model
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type", "is_decoder"),
    *("add_cross_attention", "cross_attention_hidden_size", "_name_or_path", "finetuning_task"),
}


def cases() -> list[tuple[str, str]]:
    """Return (family, case) of every tiny model; "" is the case that changes nothing."""
    return [(name, case) for name, family in TINY.items() for case in ("", *family.cases)]


def name_in_transformers(architecture: str, name: str) -> str:
    """Return what `transformers` calls one of our parameters or buffers in memory."""
    for family in TINY.values():
        if family.architecture == architecture and family.in_memory is not None:
            for pattern, replacement in family.in_memory.items():
                name = re.sub(pattern, replacement, name)
            return name
    return FAMILIES[architecture].model.hf_key(name)


def tiny(family: str, case: str = "", **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model."""
    found = TINY[family]
    return found.config(**{**(found.cases[case] if case else {}), **changes})
