"""What families with grouped-query attention share: the fields of their configurations, and how
their layers are built. Each family's file says what is special to it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.attention import GroupedQueryAttention
from torchsft.models.config_json import refuse_if
from torchsft.models.family import FamilyConfig, FamilyModel


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(FamilyConfig):
    """Sizes and constants of a model."""

    num_key_value_heads: int
    head_dim: int | None = None  # hidden_size / num_attention_heads; never None in a configuration

    @classmethod
    def complete(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields, with the width of heads."""
        width = values["hidden_size"] // max(1, values["num_attention_heads"])
        return {"head_dim": cls.head_dim or width} | values

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self.check_positive("head_dim")
        refuse_if(self.head_dim % 2, f"head_dim = {self.head_dim}, but it must be even")
        refuse_if(
            heads % kv_heads,
            f"{heads} num_attention_heads, which num_key_value_heads ({kv_heads}) does not divide",
        )

    @property
    def attention_cost(self) -> int:
        """Of queries, keys, values and output."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * self.head_dim * heads

    @property
    def pair_cost(self) -> int:
        """Of each head a score, from queries and keys, and what it takes of a value."""
        return self.num_hidden_layers * self.num_attention_heads * 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class SparseGroupedQueryConfig(GroupedQueryConfig):
    """Sizes and constants of a model with experts in all layers; `intermediate_size` is the width
    of one.
    """

    num_local_experts: int
    num_experts_per_tok: int

    spellings = (("num_local_experts", "num_experts"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_chosen(self.num_experts_per_tok, "num_local_experts")

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses."""
        return self.num_local_experts

    @property
    def expert_costs(self) -> tuple[int, int]:
        """Inner width of an expert, and how many a token meets."""
        return self.intermediate_size, self.num_experts_per_tok


class GroupedQueryModel(FamilyModel):
    """A family with grouped-query attention; see `LanguageModel`."""

    config: GroupedQueryConfig
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **FamilyModel.tensor_parallel,
        "model.layers.*.self_attn.q_proj": "column",
        "model.layers.*.self_attn.k_proj": "key_value",
        "model.layers.*.self_attn.v_proj": "key_value",
        "model.layers.*.self_attn.o_proj": "row",
    }
    # All linear maps of attention and feed-forward networks; not the router, norms, biases,
    # embeddings and what joins MTP layers.
    quantised = re.compile(
        r"\.(self_attn\.[qkvo]_proj"
        r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight$"
    )

    def build_attention(self, layer: int) -> GroupedQueryAttention:
        """Make a layer's attention."""
        config = self.config
        return GroupedQueryAttention(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            **self.attention_options(layer),
        )

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        config = self.config
        window = config.attention_window(layer)
        return {"rope": config.rope, "bias": config.attention_bias, "window": window}
