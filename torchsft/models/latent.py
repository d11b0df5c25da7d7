"""What families with latent attention (MLA) share: the fields of their configurations, and how
their layers are built. Each family's file says what is special to it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.attention import LatentAttention
from torchsft.models.config_json import refuse_if
from torchsft.models.expert_groups import ExpertGroupsConfig
from torchsft.models.family import FamilyModel


@dataclass(frozen=True, kw_only=True)
class LatentConfig(ExpertGroupsConfig):
    """Sizes and constants of a model whose layers have experts, behind dense ones."""

    # Sizes without which no parameter has a shape.
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # The defaults are what transformers assumes where config.json is silent.
    q_lora_rank: int | None = 1536
    # Which layers are dense, dense or sparse of each; empty: those before first_k_dense_replace.
    mlp_layer_types: tuple[str, ...] = ()

    supported_values: ClassVar[Mapping[str, Any]] = {
        **ExpertGroupsConfig.supported_values,
        "moe_layer_freq": 1,
    }
    apart = ("rope", "mlp_layer_types")
    null_says_something = ("q_lora_rank",)  # that there is no query latent
    rope_width = "qk_rope_head_dim"
    pairing = "neighbours"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LatentConfig":
        """Read a config.json's object; see `FamilyConfig.from_hf`."""
        read = super().from_hf(config)
        heads, kv_heads = read.num_attention_heads, config.get("num_key_value_heads")
        refuse_if(
            kv_heads not in (None, heads),
            f"{kv_heads} num_key_value_heads for {heads} heads; MLA needs them equal",
        )
        return read

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Read which layers are dense."""
        kinds, layers = config.get("mlp_layer_types") or [], values["num_hidden_layers"]
        odd = len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}
        refuse_if(
            kinds and odd,
            f"mlp_layer_types = {kinds!r}, but it must say dense or sparse of {layers} layers",
        )
        return {"mlp_layer_types": tuple(kinds)}

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_if(
            self.qk_rope_head_dim % 2,
            f"qk_rope_head_dim = {self.qk_rope_head_dim}, but it must be even",
        )
        dims = f"v_head_dim = {self.v_head_dim} above the {self.qk_head_dim} of queries and keys"
        refuse_if(
            self.v_head_dim > self.qk_head_dim, f"{dims}, which the attention does not support"
        )

    @property
    def qk_head_dim(self) -> int:
        """Entries of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_key_value_heads(self) -> int:
        """Every head has keys and values of its own, expanded from one latent."""
        return self.num_attention_heads

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        if not self.mlp_layer_types:
            return super().routed_experts(layer)
        # MTP layers, behind those that are listed, have experts.
        dense = self.mlp_layer_types[layer : layer + 1] == ("dense",)
        return 0 if dense else self.n_routed_experts

    @property
    def attention_cost(self) -> int:
        """Of queries, keys and values, through their latents, and of the output."""
        width, heads = self.hidden_size, self.num_attention_heads
        q_out = heads * self.qk_head_dim
        q = width * q_out if self.q_lora_rank is None else self.q_lora_rank * (width + q_out)
        kv_a = width * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_b = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv_a + kv_b + heads * self.v_head_dim * width

    @property
    def pair_cost(self) -> int:
        """Of each head a score, from queries and keys, and what it takes of a value."""
        heads = self.num_hidden_layers * self.num_attention_heads
        return heads * (self.qk_head_dim + self.v_head_dim)


class LatentModel(FamilyModel):
    """A family with latent attention; see `LanguageModel`."""

    config: LatentConfig
    # Replicated are what makes the latents, the norms, the router and the shared experts.
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **FamilyModel.tensor_parallel,
        "model.layers.*.self_attn.q_proj": "column",
        "model.layers.*.self_attn.q_b_proj": "column",
        "model.layers.*.self_attn.kv_b_proj": "column",
        "model.layers.*.self_attn.o_proj": "row",
    }
    # All linear maps of attention and feed-forward networks; not the router, norms, biases,
    # embeddings and what joins MTP layers.
    quantised = re.compile(
        r"\.(self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
        r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight$"
    )

    def build_attention(self, layer: int) -> LatentAttention:
        """Make a layer's attention."""
        config = self.config
        return LatentAttention(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            v_dim=config.v_head_dim,
            rope=config.rope,
            bias=config.attention_bias,
        )
