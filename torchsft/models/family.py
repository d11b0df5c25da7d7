"""What all families share: the fields of their configurations, how config.json becomes one, what
layers cost and how they are built. `models/grouped_query.py` and `models/latent.py` add attention.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torchsft.models.attention import Attention
from torchsft.models.config_json import read_fields, read_rope, refuse_if, required_fields
from torchsft.models.decoder import SwigluMLP
from torchsft.models.language_model import (
    DecoderLayer,
    ExpertImplementation,
    LanguageModel,
    ModelConfig,
)
from torchsft.models.moe import Experts, MoE, Router
from torchsft.models.rope import Pairing, Rope


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(ModelConfig):
    """Sizes and constants of a model, named as in config.json (rope: parsed); those of a dense one,
    to which families with experts add theirs.
    """

    # Sizes without which no parameter has a shape.
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # The defaults are what transformers assumes where config.json is silent.
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope: Rope

    mtp_layers: ClassVar[int | None] = 0
    # Settings of which one value is supported; a config.json that says another one describes
    # another computation.
    supported_values: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "attention_dropout": 0}
    # Fields that `from_hf` reads otherwise than as numbers; other names of fields; those whose null
    # is not their default.
    apart: ClassVar[Collection[str]] = ("rope",)
    spellings: ClassVar[Sequence[tuple[str, str]]] = ()
    null_says_something: ClassVar[Collection[str]] = ()
    only_layer_type: ClassVar[str | None] = None  # the one of `layer_types`; others are refused
    # Of the rotary embedding: the field that says how many entries of a head have a position; base
    # and rotated part of these where config.json is silent (None: only all of them are supported).
    rope_width: ClassVar[str] = "head_dim"
    pairing: ClassVar[Pairing] = "halves"
    rope_theta: ClassVar[float] = 10000.0
    partial_rotary_factor: ClassVar[float | None] = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json's object (transformers 5's style or the official repositories').

        Raises:
            InputError: it describes weights quantised in an unknown way, or values that this code
                does not compute, or lacks a size.
        """
        values = read_fields(config, cls)
        if cls.only_layer_type is not None:
            kinds = sorted(set(config.get("layer_types") or ()) - {cls.only_layer_type})
            refuse_if(
                kinds,
                f"layer_types with {', '.join(kinds)}; only {cls.only_layer_type} is supported",
            )
        values = cls.complete(values) | cls.read_apart(config, values)
        values["rope"] = read_rope(config, cls, values[cls.rope_width])
        return cls(**values)

    @classmethod
    def complete(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields, with those that follow from others."""
        return dict(values)

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `apart` but rope, by name.

        Args:
            config: config.json's object.
            values: the fields that were read as numbers.

        Raises:
            InputError: see `from_hf`.
        """
        return {}

    def __post_init__(self) -> None:
        for name in required_fields(type(self)):
            self.check_positive(name)

    def check_positive(self, name: str) -> None:
        """Refuse a field below 1."""
        value = getattr(self, name)
        refuse_if(value is None or value < 1, f"{name} = {value}, but it must be at least 1")

    def check_chosen(self, chosen: int, name: str) -> None:
        """Refuse more chosen experts than the field `name` says there are."""
        experts = getattr(self, name)
        refuse_if(chosen > experts, f"num_experts_per_tok = {chosen}, but only {experts} {name}")

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer among which its router chooses; 0: it is dense."""
        return 0

    @property
    def expert_costs(self) -> tuple[int, int]:
        """Inner width of an expert, and how many a token meets: routed and shared ones."""
        return 0, 0

    @property
    def split_widths(self) -> dict[str, int]:
        """Tensor parallelism splits dense layers; experts stay whole."""
        if all(map(self.is_moe, range(self.num_hidden_layers))):
            return {}
        return {"intermediate_size": self.intermediate_size}

    @property
    @abstractmethod
    def attention_cost(self) -> int:
        """Multiply-adds per token in the matrices of a layer's attention."""

    def layer_costs(self) -> list[int]:
        """Multiply-adds per token in the matrices of each layer: attention and network."""
        layers = range(self.num_hidden_layers)
        return [self.attention_cost + self._network_cost(layer) for layer in layers]

    def _network_cost(self, layer: int) -> int:
        """Multiply-adds per token in a layer's network: dense, or router and used experts."""
        experts = self.routed_experts(layer)
        if experts == 0:
            return 3 * self.hidden_size * self.intermediate_size
        width, used = self.expert_costs
        return self.hidden_size * (3 * width * used + experts)


class FamilyModel(LanguageModel):
    """A family of models; see `LanguageModel`."""

    config: FamilyConfig
    build_attention: Callable[[int], Attention]  # by the layer's number in the whole model
    build_router: Callable[[], Router]  # of a layer with experts

    def build_layer(self, layer: int, experts: ExpertImplementation) -> DecoderLayer:
        """Make a layer, by its number in the whole model."""
        config = self.config
        if config.is_moe(layer):
            network = self.build_moe(layer, experts)
        else:
            network = SwigluMLP(config.hidden_size, config.intermediate_size)
        attention = self.build_attention(layer)
        return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, network)

    def build_moe(self, layer: int, implementation: ExpertImplementation) -> MoE:
        """Make a layer's router and experts, with shared ones where a token meets more than the
        routed ones.
        """
        gate, config = self.build_router(), self.config
        width, used = config.expert_costs
        routed = Experts(config.routed_experts(layer), config.hidden_size, width, implementation)
        shared = used - gate.top_k
        return MoE(gate, routed, SwigluMLP(config.hidden_size, shared * width) if shared else None)
