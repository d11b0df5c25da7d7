"""GLM-4.5, 4.5-Air, 4.6 and 4.7.

Grouped-query attention of which half of each head is rotated, in the large ones with a norm of each
query and key; leading dense layers, then DeepSeek-V3's router and experts. See the report,
arXiv:2508.06471.
"""

from dataclasses import dataclass
from typing import Any

from torchsft.models.expert_groups import SigmoidGroupsConfig, SigmoidGroupsModel
from torchsft.models.grouped_query import GroupedQueryConfig, GroupedQueryModel


@dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(SigmoidGroupsConfig, GroupedQueryConfig):
    """Sizes and constants of a model."""

    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    first_k_dense_replace: int = 1
    num_nextn_predict_layers: int | None = 1
    use_qk_norm: bool = False

    partial_rotary_factor = 0.5


class Glm4Moe(SigmoidGroupsModel, GroupedQueryModel):
    """GLM-4.5 and its like; see `LanguageModel`."""

    config: Glm4MoeConfig
    config_class = Glm4MoeConfig

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        config = self.config
        eps = config.rms_norm_eps if config.use_qk_norm else None
        return super().attention_options(layer) | {"qk_norm_eps": eps}
