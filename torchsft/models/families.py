"""Which family of models an architecture belongs to: the only list of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torchsft.config import InputError
from torchsft.models.deepseek_v2 import DeepseekV2
from torchsft.models.deepseek_v3 import DeepseekV3, Glm4MoeLite
from torchsft.models.deepseek_v32 import DeepseekV32, GlmMoeDsa
from torchsft.models.glm4_moe import Glm4Moe
from torchsft.models.gpt_oss import GptOss
from torchsft.models.kimi import Kimi
from torchsft.models.language_model import LanguageModel, ModelConfig
from torchsft.models.llama import Llama, Mistral, Qwen2, SmolLM3
from torchsft.models.minimax_m2 import MiniMaxM2
from torchsft.models.qwen3 import Qwen3, Qwen3Moe


class Family(NamedTuple):
    """What a config.json calls the models of a class."""

    model_type: str  # stands for the architecture in a config.json that names none
    model: type[LanguageModel]


# `architectures` of config.json -> its family.
FAMILIES = {
    "DeepseekV2ForCausalLM": Family("deepseek_v2", DeepseekV2),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", DeepseekV3),
    "DeepseekV32ForCausalLM": Family("deepseek_v32", DeepseekV32),
    "Glm4MoeForCausalLM": Family("glm4_moe", Glm4Moe),
    "Glm4MoeLiteForCausalLM": Family("glm4_moe_lite", Glm4MoeLite),
    "GlmMoeDsaForCausalLM": Family("glm_moe_dsa", GlmMoeDsa),
    "GptOssForCausalLM": Family("gpt_oss", GptOss),
    "KimiK25ForConditionalGeneration": Family("kimi_k25", Kimi),  # as published
    "Kimi_K25ForConditionalGeneration": Family("kimi_k25", Kimi),  # as transformers writes it
    "LlamaForCausalLM": Family("llama", Llama),
    "MiniMaxM2ForCausalLM": Family("minimax_m2", MiniMaxM2),
    "MistralForCausalLM": Family("mistral", Mistral),
    "Qwen2ForCausalLM": Family("qwen2", Qwen2),
    "Qwen3ForCausalLM": Family("qwen3", Qwen3),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", Qwen3Moe),
    "SmolLM3ForCausalLM": Family("smollm3", SmolLM3),
}


def family_of(config: Mapping[str, Any]) -> type[LanguageModel]:
    """Return the class of the models that a config.json's object describes.

    Raises:
        InputError: it describes an architecture that is not in the list.
    """
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    for architecture, family in FAMILIES.items():
        if architecture in architectures:
            return family.model
        if not architectures and model_type == family.model_type:
            return family.model
    found = f"no architectures and model_type {model_type!r}"
    if architectures:
        found = ", ".join(architectures)
    *others, last = sorted(FAMILIES)
    known = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    raise InputError(f"config.json describes {found}, but only {known} supported")


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of the model that a config.json's object describes.

    Raises:
        InputError: see `family_of` and `ModelConfig.from_hf`.
    """
    return family_of(config).config_class.from_hf(config)


def build_model(config: Mapping[str, Any], **options: Any) -> LanguageModel:
    """Make the model that a config.json's object describes; its weights are whatever memory held.

    Args:
        options: see `LanguageModel`.

    Raises:
        InputError: see `family_of` and `ModelConfig.from_hf`.
    """
    return family_of(config)(read_model_config(config), **options)
