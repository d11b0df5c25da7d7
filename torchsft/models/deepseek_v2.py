"""DeepSeek-V2, V2-Lite and Coder-V2.

MLA attention as in V3 (the Lite ones project queries directly); the router has softmax scores, of
which the best are chosen, in V2 and Coder-V2 among a few groups of experts, and no correction bias.
See arXiv:2405.04434, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.config_json import refuse_if
from torchsft.models.latent import LatentConfig, LatentModel
from torchsft.models.routers import SoftmaxRouter

_METHODS = ("greedy", "group_limited_greedy")


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(LatentConfig):
    """Sizes and constants of a model."""

    n_shared_experts: int = 2
    max_position_embeddings: int = 2048
    topk_method: str = "greedy"  # or group_limited_greedy, which heeds n_group and topk_group

    supported_values: ClassVar[Mapping[str, Any]] = {
        **LatentConfig.supported_values,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "mlp_bias": False,
    }
    apart = (*LatentConfig.apart, "topk_method")
    spellings = (("n_routed_experts", "num_experts"),)
    rivals = 1

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Read how experts are chosen; without groups their numbers say nothing."""
        method = config.get("topk_method") or cls.topk_method
        refuse_if(
            method not in _METHODS,
            f"topk_method = {method!r}, but only {' and '.join(_METHODS)} are supported",
        )
        apart = super().read_apart(config, values) | {"topk_method": method}
        return apart if method != "greedy" else apart | {"n_group": 1, "topk_group": 1}


class DeepseekV2(LatentModel):
    """DeepSeek-V2; see `LanguageModel`."""

    config: DeepseekV2Config
    config_class = DeepseekV2Config

    def build_router(self) -> SoftmaxRouter:
        """Make the router of a layer with experts."""
        config = self.config
        return SoftmaxRouter(
            config.hidden_size,
            config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            normalise=False,
            groups=config.n_group,
            top_groups=config.topk_group,
            scale=config.routed_scaling_factor,
        )
