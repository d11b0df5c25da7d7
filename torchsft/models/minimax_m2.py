"""MiniMax-M2 and M2.1 to M2.7.

Grouped-query attention with one norm over all queries of a token and one over all keys, part of
each head rotated; experts without shared ones in all layers, chosen by sigmoid scores with a
correction bias. See transformers' modeling_minimax_m2.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.config_json import refuse_if
from torchsft.models.grouped_query import GroupedQueryModel, SparseGroupedQueryConfig
from torchsft.models.routers import GroupedSigmoidRouter


@dataclass(frozen=True, kw_only=True)
class MiniMaxM2Config(SparseGroupedQueryConfig):
    """Sizes and constants of a model."""

    head_dim: int | None = 128
    max_position_embeddings: int = 196608
    rotary_dim: int | None = None  # rotated entries of a head; None: partial_rotary_factor says

    rope_theta = 5000000.0
    partial_rotary_factor = 1.0
    # The published models name MTP modules and do not hold them; nothing says what theirs compute.
    mtp_layers = None
    supported_values: ClassVar[Mapping[str, Any]] = {
        **SparseGroupedQueryConfig.supported_values,
        "attention_bias": False,
        "norm_topk_prob": True,
        "qk_norm_type": "per_layer",
        "router_jitter_noise": 0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "sliding_window": None,
        "use_qk_norm": True,
        "use_routing_bias": True,
    }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MiniMaxM2Config":
        """Read a config.json's object; see `GroupedQueryConfig.from_hf`."""
        kinds = set(config.get("attn_type_list") or ())
        refuse_if(kinds - {1}, f"attn_type_list with {sorted(kinds)}; only 1 is supported")
        rotated, stated = config.get("rotary_dim"), config.get("partial_rotary_factor")
        if isinstance(rotated, int):
            partial = rotated / (config.get("head_dim") or cls.head_dim)
            both = f"rotary_dim = {rotated} and partial_rotary_factor = {stated}, not {partial}"
            refuse_if(stated not in (None, partial), f"{both}; keep one")
            config = {**config, "partial_rotary_factor": partial}
        return super().from_hf(config)


class MiniMaxM2(GroupedQueryModel):
    """MiniMax-M2; see `LanguageModel`."""

    config: MiniMaxM2Config
    config_class = MiniMaxM2Config
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **GroupedQueryModel.tensor_parallel,
        "model.layers.*.self_attn.q_norm": "column",
        "model.layers.*.self_attn.k_norm": "key_value",
    }
    renamed: ClassVar[Mapping[str, str]] = {
        r"\.mlp\.gate\.e_score": ".block_sparse_moe.e_score",
        r"\.mlp\.": ".block_sparse_moe.",
        r"(\.experts\.\d+)\.gate_proj": r"\1.w1",
        r"(\.experts\.\d+)\.down_proj": r"\1.w2",
        r"(\.experts\.\d+)\.up_proj": r"\1.w3",
    }
    quantised = re.compile(r"\.(self_attn\.[qkvo]_proj|experts\.\d+\.w[123])\.weight$")

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        norms = {"qk_norm_eps": self.config.rms_norm_eps, "norm_heads_together": True}
        return super().attention_options(layer) | norms

    def build_router(self) -> GroupedSigmoidRouter:
        """Make the router of a layer."""
        config = self.config
        return GroupedSigmoidRouter(
            config.hidden_size,
            config.num_local_experts,
            top_k=config.num_experts_per_tok,
            normalise=True,
        )
