"""Qwen3, dense and with experts (Qwen3-8B, Qwen3-30B-A3B, Qwen3-235B-A22B).

Grouped-query attention with a norm of each query and key; mixture-of-experts layers have no shared
experts. See the technical report, arXiv:2505.09388.

Shape suffixes: S tokens on this rank, E experts, K choices per token.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchsft.models.attention import GroupedQueryAttention
from torchsft.models.config_json import read_fields, read_rope, refuse_if, required_fields
from torchsft.models.decoder import SwigluMLP
from torchsft.models.language_model import (
    DecoderLayer,
    ExpertImplementation,
    LanguageModel,
    ModelConfig,
)
from torchsft.models.moe import Experts, MoE, Routing, router_logits
from torchsft.models.rope import Rope

# Fields with one supported value; a config.json that says another one describes another
# computation.
_SUPPORTED_VALUES = {"hidden_act": "silu", "attention_dropout": 0, "use_sliding_window": False}
# Fields that `from_hf` reads otherwise than as numbers.
_APART = ("rope", "mlp_only_layers")


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """Sizes and constants of a dense model, named as in config.json (rope: parsed)."""

    # Sizes without which no parameter has a shape.
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    # The defaults are what transformers assumes where config.json is silent.
    head_dim: int = 128
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope: Rope

    mtp_layers: ClassVar[int] = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """Read a config.json's object.

        Raises:
            InputError: it describes weights quantised otherwise than in DeepSeek's fp8, or values
                that this code does not compute, or lacks a size.
        """
        return cls(**cls._values(config))

    @classmethod
    def _values(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        spellings = (("num_experts", "num_local_experts"),)
        values = read_fields(
            config, cls, apart=_APART, spellings=spellings, supported_values=_SUPPORTED_VALUES
        )
        kinds = set(config.get("layer_types") or ()) - {"full_attention"}
        refuse_if(
            kinds, f"layer_types with {', '.join(sorted(kinds))}; only full_attention is supported"
        )
        head_dim = values.get("head_dim", cls.head_dim)
        values["rope"] = read_rope(config, head_dim, "halves", cls.max_position_embeddings)
        return values

    def __post_init__(self) -> None:
        for name in (*required_fields(type(self), _APART), "head_dim"):
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
        return [attention + self.network_cost(layer) for layer in layers]

    def network_cost(self, layer: int) -> int:
        """Multiply-adds per token in a layer's feed-forward network."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def pair_cost(self) -> int:
        """Of each head a score, from queries and keys, and what it takes of a value."""
        return self.num_hidden_layers * self.num_attention_heads * 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """Sizes and constants of a model with experts."""

    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    # Layers decoder_sparse_step - 1, 2 * decoder_sparse_step - 1 and so on have experts, except
    # those that are named dense.
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Read a config.json's object; see `Qwen3Config.from_hf`."""
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        known = isinstance(width, int) and isinstance(heads, int) and heads > 0
        if known and config.get("head_dim") is None:
            config = {**config, "head_dim": width // heads}
        dense = config.get("mlp_only_layers") or []
        odd = not isinstance(dense, list) or not all(type(layer) is int for layer in dense)
        refuse_if(odd, f"mlp_only_layers = {dense!r}, but it must be a list of layers")
        return cls(**cls._values(config), mlp_only_layers=tuple(dense))

    def __post_init__(self) -> None:
        super().__post_init__()
        step = self.decoder_sparse_step
        refuse_if(step < 1, f"decoder_sparse_step = {step}, but it must be at least 1")
        chosen, experts = self.num_experts_per_tok, self.num_experts
        refuse_if(
            chosen > experts, f"num_experts_per_tok = {chosen}, but only {experts} num_experts"
        )

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        sparse = (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers
        return self.num_experts if sparse else 0

    def network_cost(self, layer: int) -> int:
        """Multiply-adds per token in a layer's network: router and K experts, or a dense one."""
        if not self.is_moe(layer):
            return super().network_cost(layer)
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        return expert * self.num_experts_per_tok + self.hidden_size * self.num_experts


class SoftmaxRouter(nn.Module):
    """Chooses the K (`top_k`) of E experts with the largest softmax scores, which weigh them;
    `normalise` divides a token's K weights by their sum. Everything here is fp32.
    """

    def __init__(self, width: int, experts: int, *, top_k: int, normalise: bool) -> None:
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_SD: Tensor) -> Routing:
        """Choose experts."""
        logits_SE = router_logits(x_SD, self.weight)
        scores_SE = logits_SE.softmax(-1)
        weights_SK, experts_SK = scores_SE.topk(self.top_k, dim=-1, sorted=False)
        if self.normalise:
            weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True)
        return Routing(weights_SK, experts_SK, scores_SE, logits_SE)


class Qwen3(LanguageModel):
    """Qwen3 without experts; see `LanguageModel`."""

    config: Qwen3Config
    config_class = Qwen3Config
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **LanguageModel.tensor_parallel,
        "model.layers.*.self_attn.q_proj": "column",
        "model.layers.*.self_attn.k_proj": "key_value",
        "model.layers.*.self_attn.v_proj": "key_value",
        "model.layers.*.self_attn.o_proj": "row",
    }
    # All linear maps of attention and feed-forward networks; not the router, norms, biases and
    # embeddings.
    quantised = re.compile(
        r"\.(self_attn\.[qkvo]_proj|mlp\.(experts\.\d+\.)?(gate|up|down)_proj)\.weight$"
    )

    def build_layer(self, layer: int, experts: ExpertImplementation) -> DecoderLayer:
        """Grouped-query attention and a feed-forward network."""
        config = self.config
        attention = GroupedQueryAttention(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope=config.rope,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm_eps=config.rms_norm_eps,
        )
        network = self.build_network(layer, experts)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, network)

    def build_network(self, layer: int, experts: ExpertImplementation) -> SwigluMLP | MoE:
        """Make a layer's feed-forward network."""
        return SwigluMLP(self.config.hidden_size, self.config.intermediate_size)


class Qwen3Moe(Qwen3):
    """Qwen3 with experts in all layers or some."""

    config: Qwen3MoeConfig
    config_class = Qwen3MoeConfig

    def build_network(self, layer: int, experts: ExpertImplementation) -> SwigluMLP | MoE:
        """Make a layer's feed-forward network."""
        config = self.config
        if not config.is_moe(layer):
            return super().build_network(layer, experts)
        gate = SoftmaxRouter(
            config.hidden_size,
            config.num_experts,
            top_k=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
        )
        routed = Experts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size, experts
        )
        return MoE(gate, routed)
