"""DeepSeek-V3 and models of its architecture (R1, V3.1, Kimi-K2, Moonlight), and GLM-4.7-Flash.

MLA attention, leading dense layers, then mixture-of-experts layers with shared experts; see the
technical report, arXiv:2412.19437, section 2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.expert_groups import SigmoidGroupsConfig, SigmoidGroupsModel
from torchsft.models.latent import LatentConfig, LatentModel


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(SigmoidGroupsConfig, LatentConfig):
    """Sizes and constants of a model."""

    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 4096

    supported_values: ClassVar[Mapping[str, Any]] = {
        **SigmoidGroupsConfig.supported_values,
        **LatentConfig.supported_values,
        "rope_interleave": True,
    }


class DeepseekV3(SigmoidGroupsModel, LatentModel):
    """DeepSeek-V3; see `LanguageModel`."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config


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
