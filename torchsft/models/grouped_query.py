"""What families with grouped-query attention share: the fields of their configurations, and how
their layers are built. Each family's file says what is special to it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.attention import GroupedQueryAttention
from torchsft.models.config_json import read_fields, read_rope, refuse_if, required_fields
from torchsft.models.decoder import SwigluMLP
from torchsft.models.language_model import (
    DecoderLayer,
    ExpertImplementation,
    LanguageModel,
    ModelConfig,
)
from torchsft.models.moe import Experts, MoE, Router
from torchsft.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(ModelConfig):
    """Sizes and constants of a model, named as in config.json (rope: parsed); those of a dense one,
    to which families with experts add theirs.
    """

    # Sizes without which no parameter has a shape.
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    # The defaults are what transformers assumes where config.json is silent.
    head_dim: int | None = None  # hidden_size / num_attention_heads; never None in a configuration
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope: Rope

    mtp_layers: ClassVar[int | None] = 0
    # Settings of which one value is supported; a config.json that says another one describes
    # another computation.
    supported_values: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0}
    # Fields that `from_hf` reads otherwise than as numbers, and names of one setting.
    apart: ClassVar[Collection[str]] = ("rope",)
    spellings: ClassVar[Sequence[tuple[str, str]]] = ()
    null_says_something: ClassVar[Collection[str]] = ()
    # Of the rotary embedding, where config.json is silent: its base, and the part of a head that is
    # rotated.
    rope_theta: ClassVar[float] = 10000.0
    partial_rotary_factor: ClassVar[float | None] = None  # None: only all of it is supported
    only_full_attention: ClassVar[bool] = False  # whether other `layer_types` are refused

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GroupedQueryConfig":
        """Read a config.json's object.

        Raises:
            InputError: it describes weights quantised in an unknown way, or values that this code
                does not compute, or lacks a size.
        """
        values = read_fields(
            config,
            cls,
            apart=cls.apart,
            spellings=cls.spellings,
            supported_values=cls.supported_values,
            null_says_something=cls.null_says_something,
        )
        if cls.only_full_attention:
            kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
            refuse_if(
                kinds, f"layer_types with {', '.join(kinds)}; only full_attention is supported"
            )
        heads = max(1, values["num_attention_heads"])
        values.setdefault("head_dim", cls.head_dim or values["hidden_size"] // heads)
        values["rope"] = read_rope(
            config,
            values["head_dim"],
            "halves",
            cls.max_position_embeddings,
            default_theta=cls.rope_theta,
            default_partial=cls.partial_rotary_factor,
        )
        return cls(**values, **cls.read_apart(config))

    @classmethod
    def read_apart(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `apart`, without rope, by name.

        Raises:
            InputError: see `from_hf`.
        """
        return {}

    def __post_init__(self) -> None:
        for name in (*required_fields(type(self), self.apart), "head_dim"):
            value = getattr(self, name)
            refuse_if(value < 1, f"{name} = {value}, but it must be at least 1")
        refuse_if(self.head_dim % 2, f"head_dim = {self.head_dim}, but it must be even")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        refuse_if(
            heads % kv_heads,
            f"{heads} num_attention_heads, which num_key_value_heads ({kv_heads}) does not divide",
        )

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        return 0

    @property
    def expert_costs(self) -> tuple[int, int]:
        """Inner width of an expert, and how many a token meets: routed and shared ones."""
        raise AssertionError("a family without experts")

    @property
    def split_widths(self) -> dict[str, int]:
        """Tensor parallelism splits dense layers; experts stay whole."""
        if all(map(self.is_moe, range(self.num_hidden_layers))):
            return {}
        return {"intermediate_size": self.intermediate_size}

    def layer_costs(self) -> list[int]:
        """Multiply-adds per token in the matrices of each layer: attention and network."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * heads
        layers = range(self.num_hidden_layers)
        return [attention + self._network_cost(layer) for layer in layers]

    def _network_cost(self, layer: int) -> int:
        """Multiply-adds per token in a layer's network: dense, or router and used experts."""
        experts = self.routed_experts(layer)
        if experts == 0:
            return 3 * self.hidden_size * self.intermediate_size
        width, used = self.expert_costs
        return self.hidden_size * (3 * width * used + experts)

    @property
    def pair_cost(self) -> int:
        """Of each head a score, from queries and keys, and what it takes of a value."""
        return self.num_hidden_layers * self.num_attention_heads * 2 * self.head_dim


class GroupedQueryModel(LanguageModel):
    """A family with grouped-query attention; see `LanguageModel`."""

    config: GroupedQueryConfig
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **LanguageModel.tensor_parallel,
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

    def build_layer(self, layer: int, experts: ExpertImplementation) -> DecoderLayer:
        """Grouped-query attention and a feed-forward network."""
        config = self.config
        attention = GroupedQueryAttention(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            **self.attention_options(layer),
        )
        if config.is_moe(layer):
            network = self.build_moe(layer, experts)
        else:
            network = SwigluMLP(config.hidden_size, config.intermediate_size)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, network)

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        config = self.config
        window = config.attention_window(layer)
        return {"rope": config.rope, "bias": config.attention_bias, "window": window}

    def build_moe(self, layer: int, implementation: ExpertImplementation) -> MoE:
        """Make a layer's router and experts, with shared ones where a token meets more than the
        routed ones.
        """
        gate, config = self.build_router(), self.config
        width, used = config.expert_costs
        routed = Experts(config.routed_experts(layer), config.hidden_size, width, implementation)
        shared = used - gate.top_k
        return MoE(gate, routed, SwigluMLP(config.hidden_size, shared * width) if shared else None)

    def build_router(self) -> Router:
        """Make the router of a layer with experts."""
        raise AssertionError("a family without experts")
