"""DeepSeek-V3 and models of its architecture (R1, V3.1, Kimi-K2, Moonlight).

MLA attention, leading dense layers, then mixture-of-experts layers with shared experts; see the
technical report, arXiv:2412.19437, section 2.1.

Shape suffixes: S tokens on this rank, E experts, G expert groups, K choices per token.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchsft.models.attention import LatentAttention
from torchsft.models.config_json import read_fields, read_rope, refuse_if, required_fields
from torchsft.models.decoder import Float32Buffers, SwigluMLP
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
_SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "attention_dropout": 0,
}

# Names under which transformers takes one setting.
_SPELLINGS = (
    ("n_routed_experts", "num_local_experts"),
    ("num_nextn_predict_layers", "num_mtp_layers"),
)


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(ModelConfig):
    """Sizes and constants of a model, named as in config.json (rope: both spellings of it,
    parsed).
    """

    # Sizes without which no parameter has a shape.
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # The defaults are what transformers assumes where config.json is silent.
    q_lora_rank: int | None = 1536
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    # MTP layers that the checkpoint may hold behind the last layer; not computed here
    num_nextn_predict_layers: int | None = None
    rope: Rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekV3Config":
        """Read a config.json's object (transformers 5's style or the official repositories').

        Raises:
            InputError: it describes weights quantised otherwise than in DeepSeek's fp8, or values
                that this code does not compute, or lacks a size.
        """
        values = read_fields(
            config,
            cls,
            spellings=_SPELLINGS,
            supported_values=_SUPPORTED_VALUES,
            null_says_something=("q_lora_rank",),  # that there is no query latent
        )
        heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
        refuse_if(
            kv_heads not in (None, heads),
            f"{kv_heads} num_key_value_heads for {heads} heads; MLA needs them equal",
        )
        rope = read_rope(
            config, config["qk_rope_head_dim"], "neighbours", cls.max_position_embeddings
        )
        return cls(**values, rope=rope)

    def __post_init__(self) -> None:
        for name in (*required_fields(type(self)), "n_shared_experts", "n_group", "topk_group"):
            refuse_if(
                getattr(self, name) < 1,
                f"{name} = {getattr(self, name)}, but it must be at least 1",
            )
        refuse_if(
            self.qk_rope_head_dim % 2,
            f"qk_rope_head_dim = {self.qk_rope_head_dim}, but it must be even",
        )
        dims = f"v_head_dim = {self.v_head_dim} above the {self.qk_head_dim} of queries and keys"
        refuse_if(
            self.v_head_dim > self.qk_head_dim, f"{dims}, which the attention does not support"
        )
        experts, groups, open_groups = self.n_routed_experts, self.n_group, self.topk_group
        refuse_if(
            experts % groups,
            f"{experts} n_routed_experts, which n_group ({groups}) does not divide",
        )
        refuse_if(
            open_groups > groups, f"topk_group = {open_groups}, but only {groups} groups (n_group)"
        )
        each = f"{experts} n_routed_experts in {groups} groups"
        refuse_if(
            open_groups < groups and experts // groups < 2,
            f"{each}, but groups compete by their best two",
        )
        chosen, reachable = self.num_experts_per_tok, experts // groups * open_groups
        few = f"the {open_groups} groups open to a token (topk_group) hold only {reachable} experts"
        refuse_if(chosen > reachable, f"num_experts_per_tok = {chosen}, but {few}")

    @property
    def qk_head_dim(self) -> int:
        """Entries of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_key_value_heads(self) -> int:
        """Every head has keys and values of its own, expanded from one latent."""
        return self.num_attention_heads

    @property
    def mtp_layers(self) -> int | None:
        """MTP layers that the checkpoint may hold; None where config.json does not say."""
        return self.num_nextn_predict_layers

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        return self.n_routed_experts if layer >= self.first_k_dense_replace else 0

    @property
    def split_widths(self) -> dict[str, int]:
        """Tensor parallelism splits dense layers; experts stay whole."""
        if self.first_k_dense_replace == 0:
            return {}
        return {"intermediate_size": self.intermediate_size}

    def layer_costs(self) -> list[int]:
        """Multiply-adds per token in the matrices of each layer: attention, and a dense network or
        router, K routed experts and shared ones.
        """
        width, heads = self.hidden_size, self.num_attention_heads
        q_out = heads * self.qk_head_dim
        q = width * q_out if self.q_lora_rank is None else self.q_lora_rank * (width + q_out)
        kv_a = width * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_b = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention = q + kv_a + kv_b + heads * self.v_head_dim * width
        dense = 3 * width * self.intermediate_size
        used_experts = self.num_experts_per_tok + self.n_shared_experts
        router = width * self.n_routed_experts
        moe = 3 * width * self.moe_intermediate_size * used_experts + router
        return [
            attention + (moe if self.is_moe(layer) else dense)
            for layer in range(self.num_hidden_layers)
        ]

    @property
    def pair_cost(self) -> int:
        """Of each head a score, from queries and keys, and what it takes of a value."""
        heads = self.num_hidden_layers * self.num_attention_heads
        return heads * (self.qk_head_dim + self.v_head_dim)


class GroupedSigmoidRouter(Float32Buffers):
    """Chooses K (`top_k`) of E experts for every token; everything here is fp32 whatever the model
    computes in.

    Experts are split into G groups of neighbours, and those of `top_groups` groups may be chosen.
    `normalise` divides a token's K weights by their sum; `scale` is the factor of the weights after
    that.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        top_k: int,
        groups: int,
        top_groups: int,
        normalise: bool,
        scale: float,
    ) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = top_k, groups, top_groups
        self.normalise, self.scale = normalise, scale
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_SD: Tensor) -> Routing:
        """Choose experts. Weights are the sigmoid scores; the correction bias takes part in the
        choice alone.

        Groups compete by the sum of their two best biased scores, and experts of the other groups
        are out (-inf: a fill of 0, as in DeepSeek's first public code, lets them win over negative
        biased scores; transformers 5 uses -inf too).
        """
        logits_SE = router_logits(x_SD, self.weight)
        scores_SE = logits_SE.sigmoid()
        choice_SE = scores_SE.detach() + self.e_score_correction_bias
        if self.top_groups < self.groups:
            choice_SGe = choice_SE.unflatten(1, (self.groups, -1))
            group_scores_SG = choice_SGe.topk(2, dim=-1).values.sum(-1)
            best_groups = group_scores_SG.topk(self.top_groups, dim=-1, sorted=False).indices
            out_SG = torch.ones_like(group_scores_SG, dtype=torch.bool)
            out_SG.scatter_(1, best_groups, False)
            choice_SE = choice_SGe.masked_fill(out_SG.unsqueeze(-1), float("-inf")).flatten(1)
        experts_SK = choice_SE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_SK = scores_SE.gather(1, experts_SK)
        if self.normalise:
            weights_SK = weights_SK / (weights_SK.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights_SK * self.scale, experts_SK, scores_SE, logits_SE)


class DeepseekV3(LanguageModel):
    """DeepSeek-V3; see `LanguageModel`."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    # Replicated are what makes the latents, the norms, the router and the shared experts.
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **LanguageModel.tensor_parallel,
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

    def build_layer(self, layer: int, experts: ExpertImplementation) -> DecoderLayer:
        """Latent attention; a dense network in the first layers, then experts."""
        config = self.config
        attention = LatentAttention(
            width=config.hidden_size,
            heads=config.num_attention_heads,
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            v_dim=config.v_head_dim,
            rope=config.rope,
            bias=config.attention_bias,
        )
        if config.is_moe(layer):
            network = self._build_moe(experts)
        else:
            network = SwigluMLP(config.hidden_size, config.intermediate_size)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, network)

    def _build_moe(self, implementation: ExpertImplementation) -> MoE:
        config = self.config
        width, expert_width = config.hidden_size, config.moe_intermediate_size
        gate = GroupedSigmoidRouter(
            width,
            config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
        routed = Experts(config.n_routed_experts, width, expert_width, implementation)
        shared = SwigluMLP(width, expert_width * config.n_shared_experts)
        return MoE(gate, routed, shared)
