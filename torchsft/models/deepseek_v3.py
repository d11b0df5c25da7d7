"""DeepSeek-V3 and models of its architecture (R1, V3.1, Kimi-K2, Moonlight), and GLM-4.7-Flash.

MLA attention, leading dense layers, then mixture-of-experts layers with shared experts; see the
technical report, arXiv:2412.19437, section 2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.latent import LatentConfig, LatentModel
from torchsft.models.routers import GroupedSigmoidRouter


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(LatentConfig):
    """Sizes and constants of a model."""

    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 4096
    # MTP layers that the checkpoint may hold behind the last layer
    num_nextn_predict_layers: int | None = None

    supported_values: ClassVar[Mapping[str, Any]] = {
        **LatentConfig.supported_values,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }
    spellings = (
        ("n_routed_experts", "num_local_experts"),
        ("num_nextn_predict_layers", "num_mtp_layers"),
    )
    rivals = 2

    @property
    def mtp_layers(self) -> int | None:
        """MTP layers that the checkpoint may hold; None where config.json does not say."""
        return self.num_nextn_predict_layers


class DeepseekV3(LatentModel):
    """DeepSeek-V3; see `LanguageModel`."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config

    def build_router(self) -> GroupedSigmoidRouter:
        """Make the router of a layer with experts."""
        config = self.config
        return GroupedSigmoidRouter(
            config.hidden_size,
            config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            groups=config.n_group,
            top_groups=config.topk_group,
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLiteConfig(DeepseekV3Config):
    """Sizes and constants of a GLM-4.7-Flash."""

    q_lora_rank: int | None = 768
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.8
    max_position_embeddings: int = 202752
    rms_norm_eps: float = 1e-5

    supported_values: ClassVar[Mapping[str, Any]] = {
        **DeepseekV3Config.supported_values,
        "first_k_dense_replace": 1,
    }


class Glm4MoeLite(DeepseekV3):
    """GLM-4.7-Flash: DeepSeek-V3's attention and router in other sizes; see `LanguageModel`."""

    config: Glm4MoeLiteConfig
    config_class = Glm4MoeLiteConfig
