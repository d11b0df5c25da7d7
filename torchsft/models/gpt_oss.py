"""gpt-oss (gpt-oss-20b, gpt-oss-120b).

Grouped-query attention with sinks, in every second layer through a window; experts with biases and
a clamped activation in all layers. See the model card, arXiv:2508.10925.

Shape suffixes: R rows routed to this rank's experts, D width, F expert width, E experts held here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchsft.models.config_json import refuse_if
from torchsft.models.grouped_query import GroupedQueryModel, SparseGroupedQueryConfig
from torchsft.models.language_model import ExpertImplementation
from torchsft.models.moe import Experts, MoE
from torchsft.models.routers import SoftmaxRouter
from torchsft.ops import plain
from torchsft.ops.grouped_linear import grouped_linear, grouped_linear_reference
from torchsft.ops.repetition import PRODUCTS

_SLIDING, _FULL = "sliding_attention", "full_attention"
# What transformers assumes where config.json says nothing of rotary embeddings.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(SparseGroupedQueryConfig):
    """Sizes and constants of a gpt-oss."""

    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    sliding_window: int | None = 128
    layer_types: tuple[str, ...]  # sliding_attention or full_attention, of each layer

    rope_theta = 150000.0
    apart = ("rope", "layer_types")
    null_says_something = ("sliding_window",)
    spellings = (
        *SparseGroupedQueryConfig.spellings,
        ("num_experts_per_tok", "experts_per_token"),
    )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GptOssConfig":
        """Read a config.json's object; see `GroupedQueryConfig.from_hf`."""
        if not config.get("rope_parameters") and not config.get("rope_scaling"):
            config = {**config, "rope_scaling": _ROPE}
        return super().from_hf(config)

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Read what each layer sees."""
        layers, kinds = values["num_hidden_layers"], config.get("layer_types")
        if kinds is None:
            kinds = [(_SLIDING, _FULL)[layer % 2] for layer in range(layers)]
        known = isinstance(kinds, list) and set(kinds) <= {_SLIDING, _FULL}
        refuse_if(
            not known or len(kinds) != layers,
            f"layer_types = {kinds!r}, but each of {layers} layers must be {_SLIDING} or {_FULL}",
        )
        return {"layer_types": tuple(kinds)}

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.sliding_window
        refuse_if(
            _SLIDING in self.layer_types and (window is None or window < 1),
            f"sliding_window = {window} and {_SLIDING} in layer_types; it must be at least 1",
        )

    def attention_window(self, layer: int) -> int | None:
        """How many tokens a token of a layer sees, itself the last; None: all."""
        return self.sliding_window if self.layer_types[layer] == _SLIDING else None


class ClampedExperts(Experts):
    """Experts with biases, of which gate and up projection alternate; stored [E, in, out]."""

    stored_singly = False

    def __init__(
        self,
        experts: int,
        width: int,
        expert_width: int,
        implementation: ExpertImplementation,
        *,
        alpha: float,  # factor of the gate inside of the sigmoid
        limit: float,  # of the gate from above, of up from both sides
    ) -> None:
        super().__init__(experts, width, expert_width, implementation)
        self.linear = grouped_linear if self.is_grouped else grouped_linear_reference
        self.alpha, self.limit = alpha, limit
        self.gate_up_proj = nn.Parameter(torch.empty(experts, width, 2 * expert_width))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * expert_width))
        self.down_proj = nn.Parameter(torch.empty(experts, expert_width, width))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, width))

    def stacked(self) -> list[nn.Parameter]:
        """See `Experts.stacked`."""
        return [
            *(self.gate_up_proj, self.gate_up_proj_bias),
            *(self.down_proj, self.down_proj_bias),
        ]

    def network(
        self,
        x_RD: Tensor,
        weights_R1: Tensor,
        offs: Tensor,
        *parameters: Tensor,
        order: None = None,
    ) -> Tensor:
        """See `Experts.network`."""
        if x_RD.shape[0] == 0:  # a rank that receives no rows: kernels need not support that
            # no rows, but a gradient (of 0) for each parameter
            unused = sum(parameter.sum() for parameter in parameters)
            return x_RD * weights_R1.to(x_RD.dtype) + 0 * unused
        both_RG = self.linear(x_RD, *parameters[:2], offs, name=PRODUCTS)
        hidden_RF = clamped_swiglu(both_RG, self.alpha, self.limit)
        weighted_RF = (hidden_RF * weights_R1).to(hidden_RF.dtype)
        return self.linear(weighted_RF, *parameters[2:], offs, weights_R1)


def clamped_swiglu(both_RG: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped. Only `both_RG` is kept for the
    backward pass.

    Args:
        both_RG: [R, 2F], gate and up in turn.
        alpha: factor of the gate inside of the sigmoid.
        limit: of the gate from above, of up from both sides.

    Returns:
        [R, F].
    """
    if plain():
        return clamped_swiglu_reference(both_RG, alpha, limit)
    return _ClampedSwiglu.apply(both_RG, alpha, limit)


def clamped_swiglu_reference(both_RG: Tensor, alpha: float, limit: float) -> Tensor:
    """`clamped_swiglu` in plain PyTorch."""
    gate, up = _clamped(both_RG, limit)
    activated = gate * torch.sigmoid(alpha * gate)
    return (up + 1) * activated


def _clamped(both_RG: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return gate and up projection [R, F] each, clamped, of what has them in turn."""
    gate, up = both_RG[..., ::2], both_RG[..., 1::2]
    return gate.clamp(max=limit), up.clamp(-limit, limit)


class _ClampedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_RG: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(both_RG)
        ctx.alpha, ctx.limit = alpha, limit
        return clamped_swiglu_reference(both_RG, alpha, limit)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None, None]:
        (both_RG,) = ctx.saved_tensors
        gate, up = _clamped(both_RG, ctx.limit)
        sigmoid = torch.sigmoid(ctx.alpha * gate)
        grad_gate = grad_RF * (up + 1) * sigmoid * (1 + ctx.alpha * gate * (1 - sigmoid))
        grads_RG = torch.stack([grad_gate, grad_RF * gate * sigmoid], dim=-1).flatten(-2)
        # what was clamped has no gradient
        kept_RG = torch.stack([gate, up], dim=-1).flatten(-2) == both_RG
        return grads_RG * kept_RG, None, None


class GptOss(GroupedQueryModel):
    """gpt-oss; see `LanguageModel`."""

    config: GptOssConfig
    config_class = GptOssConfig
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        **GroupedQueryModel.tensor_parallel,
        "model.layers.*.self_attn": "heads",
    }
    renamed: ClassVar[Mapping[str, str]] = {r"\.mlp\.gate\.": ".mlp.router."}
    quantised = None

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        options = {"output_bias": self.config.attention_bias, "sinks": True}
        return super().attention_options(layer) | options

    def build_moe(self, layer: int, implementation: ExpertImplementation) -> MoE:
        """Make a layer's router and experts."""
        config = self.config
        width, experts = config.hidden_size, config.num_local_experts
        # softmax over the chosen logits
        gate = SoftmaxRouter(
            width, experts, top_k=config.num_experts_per_tok, normalise=True, bias=True
        )
        routed = ClampedExperts(
            experts,
            width,
            config.intermediate_size,
            implementation,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
        )
        return MoE(gate, routed)
