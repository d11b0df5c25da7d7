"""Kimi-K2.5 to K2.7: DeepSeek-V3 as the language model of a model that sees.

Trained is the language model, on text: its configuration stands in `text_config`, its keys begin
with `language_model.`, and whatever else a directory holds (the vision tower and its projector) is
carried through. Kimi-K2 and Kimi-K2-Thinking are DeepSeek-V3 without that (deepseek_v3.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchsft.models.config_json import refuse_if
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.precision.formats import quantization_of


@dataclass(frozen=True, kw_only=True)
class KimiConfig(DeepseekV3Config):
    """Sizes and constants of the language model."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "KimiConfig":
        """Read a config.json's object; see `FamilyConfig.from_hf`."""
        text = config.get("text_config")
        refuse_if(not isinstance(text, Mapping), f"text_config = {text!r}, but an object is needed")
        refuse_if(config.get("tie_word_embeddings"), "tie_word_embeddings = True, but only False")
        return super().from_hf({**text, "quantization_config": quantization_of(config)})


class Kimi(DeepseekV3):
    """The language model of a Kimi-K2.5; see `LanguageModel`."""

    config: KimiConfig
    config_class = KimiConfig
    renamed: ClassVar[Mapping[str, str]] = {"^": "language_model."}
    # As the keys of files begin, and as transformers calls them.
    never_quantised = (
        "lm_head",
        "mm_projector",
        "model.mm_projector",
        "model.vision_tower",
        "vision_tower",
    )
