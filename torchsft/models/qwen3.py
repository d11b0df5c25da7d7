"""Qwen3, dense and with experts (Qwen3-8B, Qwen3-30B-A3B, Qwen3-235B-A22B).

Grouped-query attention with a norm of each query and key; mixture-of-experts layers have no shared
experts. See the technical report, arXiv:2505.09388.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.config_json import refuse_if
from torchsft.models.grouped_query import GroupedQueryConfig, GroupedQueryModel
from torchsft.models.routers import SoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(GroupedQueryConfig):
    """Sizes and constants of a dense model."""

    head_dim: int | None = 128

    supported_values: ClassVar[Mapping[str, Any]] = {
        **GroupedQueryConfig.supported_values,
        "use_sliding_window": False,
    }
    only_layer_type = "full_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """Sizes and constants of a model with experts."""

    head_dim: int | None = None
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    # Layers decoder_sparse_step - 1, 2 * decoder_sparse_step - 1 and so on have experts, except
    # those that are named dense.
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    apart = ("rope", "mlp_only_layers")
    spellings = (("num_experts", "num_local_experts"),)

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Read which layers are dense."""
        dense = config.get("mlp_only_layers") or []
        odd = not isinstance(dense, list) or not all(type(layer) is int for layer in dense)
        refuse_if(odd, f"mlp_only_layers = {dense!r}, but it must be a list of layers")
        return {"mlp_only_layers": tuple(dense)}

    def __post_init__(self) -> None:
        super().__post_init__()
        step = self.decoder_sparse_step
        refuse_if(step < 1, f"decoder_sparse_step = {step}, but it must be at least 1")
        self.check_chosen(self.num_experts_per_tok, "num_experts")

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        sparse = (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers
        return self.num_experts if sparse else 0

    @property
    def expert_costs(self) -> tuple[int, int]:
        """Inner width of an expert, and how many a token meets."""
        return self.moe_intermediate_size, self.num_experts_per_tok


class Qwen3(GroupedQueryModel):
    """Qwen3 without experts; see `LanguageModel`."""

    config: Qwen3Config
    config_class = Qwen3Config

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        config = self.config
        options = {"output_bias": config.attention_bias, "qk_norm_eps": config.rms_norm_eps}
        return super().attention_options(layer) | options


class Qwen3Moe(Qwen3):
    """Qwen3 with experts in all layers or some."""

    config: Qwen3MoeConfig
    config_class = Qwen3MoeConfig

    def build_router(self) -> SoftmaxRouter:
        """Make the router of a layer with experts."""
        config = self.config
        return SoftmaxRouter(
            config.hidden_size,
            config.num_experts,
            top_k=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
        )
