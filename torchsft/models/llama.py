"""Dense models of Llama's kind: Llama 2 and 3, SmolLM2 and SmolLM3, Mistral, Qwen2 and Qwen2.5.

They differ in which projections have biases and, SmolLM3, in layers without rotary embedding. See
The Llama 3 Herd of Models, arXiv:2407.21783.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.config_json import refuse_if
from torchsft.models.grouped_query import GroupedQueryConfig, GroupedQueryModel


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(GroupedQueryConfig):
    """Sizes and constants of a Llama or SmolLM2."""

    max_position_embeddings: int = 2048

    supported_values: ClassVar[Mapping[str, Any]] = {
        **GroupedQueryConfig.supported_values,
        "mlp_bias": False,
    }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a config.json's object; see `GroupedQueryConfig.from_hf`."""
        if config.get("num_key_value_heads") is None:
            config = {**config, "num_key_value_heads": config.get("num_attention_heads")}
        return super().from_hf(config)


class Llama(GroupedQueryModel):
    """Llama or SmolLM2; see `LanguageModel`."""

    config: LlamaConfig
    config_class = LlamaConfig

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        return super().attention_options(layer) | {"output_bias": self.config.attention_bias}


@dataclass(frozen=True, kw_only=True)
class MistralConfig(GroupedQueryConfig):
    """Sizes and constants of a Mistral."""

    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # tokens that a token sees in every layer; None: all

    null_says_something = ("sliding_window",)

    supported_values: ClassVar[Mapping[str, Any]] = {
        **GroupedQueryConfig.supported_values,
        "attention_bias": False,
        "layer_types": None,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.sliding_window
        refuse_if(
            window is not None and window < 1,
            f"sliding_window = {window}, but it must be at least 1",
        )

    def attention_window(self, layer: int) -> int | None:
        """How many tokens a token sees, itself the last; None: all."""
        return self.sliding_window


class Mistral(GroupedQueryModel):
    """Mistral; see `LanguageModel`."""

    config: MistralConfig
    config_class = MistralConfig


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(GroupedQueryConfig):
    """Sizes and constants of a Qwen2 or Qwen2.5."""

    attention_bias: bool = True  # of queries, keys and values, not of the output

    supported_values: ClassVar[Mapping[str, Any]] = {
        **GroupedQueryConfig.supported_values,
        "attention_bias": True,
        "use_sliding_window": False,
    }
    only_layer_type = "full_attention"


class Qwen2(GroupedQueryModel):
    """Qwen2 or Qwen2.5; see `LanguageModel`."""

    config: Qwen2Config
    config_class = Qwen2Config


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LlamaConfig):
    """Sizes and constants of a SmolLM3."""

    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    no_rope_layer_interval: int = 4
    # for each layer whether it has a rotary embedding; empty: all but every interval's last
    no_rope_layers: tuple[int, ...] = ()

    rope_theta = 2000000.0
    apart = ("rope", "no_rope_layers")
    supported_values: ClassVar[Mapping[str, Any]] = {
        **LlamaConfig.supported_values,
        "use_sliding_window": False,
    }
    only_layer_type = "full_attention"

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Read which layers have a rotary embedding."""
        layers, rotated = values["num_hidden_layers"], config.get("no_rope_layers")
        if rotated is None:
            return {}
        odd = not isinstance(rotated, list) or not set(rotated) <= {0, 1} or len(rotated) < layers
        refuse_if(odd, f"no_rope_layers = {rotated!r}, but it must have 0 or 1 for {layers} layers")
        return {"no_rope_layers": tuple(rotated)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("no_rope_layer_interval")

    def has_rope(self, layer: int) -> bool:
        """Whether a layer has a rotary embedding (1 in the list, despite its name)."""
        if self.no_rope_layers:
            return self.no_rope_layers[layer] == 1
        return (layer + 1) % self.no_rope_layer_interval != 0


class SmolLM3(Llama):
    """SmolLM3; see `LanguageModel`."""

    config: SmolLM3Config
    config_class = SmolLM3Config

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Return what a layer's `GroupedQueryAttention` has besides its sizes."""
        without = {} if self.config.has_rope(layer) else {"rope": None}
        return super().attention_options(layer) | without
