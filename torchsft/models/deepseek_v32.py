"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with sparse attention in documents longer than index_topk.

There an indexer scores, for each token, all tokens before it, and the attention sees the index_topk
best; up to that length attention is exactly V3's. The indexer is never trained here: its choice has
no gradient, and DeepSeek trained it by a loss of its own. See arXiv:2512.02556, section 2.1.

Shape suffixes: T tokens of the microbatch, S of them on this rank, C of a chunk, D width, R query
latent, H heads of the indexer, I entries of these.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsft.config import InputError
from torchsft.models.attention import Documents, LatentAttention
from torchsft.models.config_json import refuse_if
from torchsft.models.decoder import Linear, local
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.models.rope import Pairing, rotate


@dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(DeepseekV3Config):
    """Sizes and constants of a DeepSeek-V3.2."""

    max_position_embeddings: int = 163840
    index_topk: int = 2048
    index_head_dim: int = 128
    index_n_heads: int = 64

    supported_values: ClassVar[Mapping[str, Any]] = {
        **DeepseekV3Config.supported_values,
        "mlp_bias": False,
    }
    only_layer_type = "indexed_attention"
    # Of the indexer: which entries are rotated together.
    index_pairing: ClassVar[Pairing] = "halves"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("q_lora_rank", "index_topk", "index_head_dim", "index_n_heads"):
            self.check_positive(name)
        refuse_if(
            self.index_head_dim < self.qk_rope_head_dim,
            f"index_head_dim = {self.index_head_dim} below the {self.qk_rope_head_dim} rotated "
            "entries (qk_rope_head_dim)",
        )

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer chooses tokens itself."""
        return True


class LayerNorm(nn.LayerNorm):
    """A layer norm whose weight and bias may be DTensors."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        weight, bias = local(self.weight), local(self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SparseIndexer(nn.Module):
    """Chooses, for each token, the `top_k` tokens of its document up to it with the largest scores:
    the sum over the indexer's heads of weight * relu(query . key).
    """

    def __init__(
        self,
        *,
        width: int,
        q_rank: int,
        heads: int,
        head_dim: int,
        pairing: Pairing,
        top_k: int,
    ) -> None:
        super().__init__()
        self.head_dim, self.pairing, self.top_k = head_dim, pairing, top_k
        self.scale = head_dim**-0.5 * heads**-0.5
        self.wq_b = Linear(q_rank, heads * head_dim, bias=False)
        self.wk = Linear(width, head_dim, bias=False)
        self.k_norm = LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = Linear(width, heads, bias=False)

    @torch.no_grad()
    def forward(self, x_SD: Tensor, q_TR: Tensor, documents: Documents) -> Tensor:
        """Return which tokens (columns) each token sees, bool [T, T]; padding sees padding."""

        def turn(x: Tensor) -> Tensor:
            return rotate(x, documents.cos_TP, documents.sin_TP, self.pairing, "start").float()

        k_SI, weights_SH = self.k_norm(self.wk(x_SD)), self.weights_proj(x_SD)
        k_TI, weights_TH = documents.layout.gather(k_SI, weights_SH)
        q_THI = turn(self.wq_b(q_TR).unflatten(-1, (-1, self.head_dim)))
        k_TI, weights_TH = turn(k_TI), weights_TH.float() * self.scale
        tokens, document_T = len(k_TI), documents.document_T
        place_T = torch.arange(tokens, device=k_TI.device)
        seen_TT = torch.zeros(tokens, tokens, dtype=torch.bool, device=k_TI.device)
        # So that the scores of all heads take little memory: 2^26 of them at a time.
        size = max(1, 2**26 // (tokens * q_THI.shape[1]))
        for part in place_T.split(size):
            scores_CHT = (q_THI[part] @ k_TI.T).relu()
            scores_CT = (weights_TH[part].unsqueeze(1) @ scores_CHT).squeeze(1)
            before_CT = place_T <= part.unsqueeze(1)
            visible_CT = before_CT & (document_T == document_T[part].unsqueeze(1))
            scores_CT.masked_fill_(~visible_CT, float("-inf"))
            best = scores_CT.topk(min(self.top_k, tokens), dim=-1, sorted=False).indices
            seen_TT[part] = torch.zeros_like(visible_CT).scatter_(1, best, True) & visible_CT
        return seen_TT


class SharedIndexer:
    """Stands where a layer takes the choice of a layer before it, which is not done here."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def __call__(self, x_SD: Tensor, q_TR: Tensor, documents: Documents) -> Tensor:
        """Refuse."""
        raise InputError(
            f"a document has {documents.longest} tokens, above index_topk = {self.top_k}, and "
            "layers that share the choice of others (indexer_types) are computed up to that length "
            f"alone; set --data.seq-len {self.top_k}"
        )


class DeepseekV32(DeepseekV3):
    """DeepSeek-V3.2; see `LanguageModel`."""

    config: DeepseekV32Config
    config_class = DeepseekV32Config
    untrained = ("model.layers.*.self_attn.indexer",)
    quantised = re.compile(
        DeepseekV3.quantised.pattern + r"|\.self_attn\.indexer\.(wq_b|wk)\.weight$"
    )

    def build_attention(self, layer: int) -> LatentAttention:
        """Make a layer's attention, with its indexer."""
        attention, config = super().build_attention(layer), self.config
        if not config.has_indexer(layer):
            attention.indexer = SharedIndexer(config.index_topk)
            return attention
        attention.indexer = SparseIndexer(
            width=config.hidden_size,
            q_rank=config.q_lora_rank,
            heads=config.index_n_heads,
            head_dim=config.index_head_dim,
            pairing=config.index_pairing,
            top_k=config.index_topk,
        )
        return attention


@dataclass(frozen=True, kw_only=True)
class GlmMoeDsaConfig(DeepseekV32Config):
    """Sizes and constants of a GLM-5."""

    q_lora_rank: int | None = 2048
    n_group: int = 1
    topk_group: int = 1
    max_position_embeddings: int = 202752
    rms_norm_eps: float = 1e-5
    index_n_heads: int = 32
    # of each layer, whether it chooses tokens itself (full) or takes the choice of the layer before
    # (shared)
    indexer_types: tuple[str, ...]

    apart = (*DeepseekV32Config.apart, "indexer_types")
    index_pairing = "neighbours"

    @classmethod
    def read_apart(cls, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Read which layers are dense, and which choose tokens themselves: by a list, by a pattern
        such as FFSS, or by the distance of those that do.
        """
        layers, kinds = values["num_hidden_layers"], config.get("indexer_types")
        kinds = kinds or config.get("index_topk_pattern")
        if isinstance(kinds, str):
            kinds = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in kinds]
        if kinds is None:
            every = max(config.get("index_topk_freq") or 1, 1)
            offset = config.get("index_skip_topk_offset", 2)
            numbers = (max(layer - offset + 1, 0) for layer in range(layers))
            kinds = ["shared" if number % every else "full" for number in numbers]
        known = isinstance(kinds, list) and set(kinds) <= {"full", "shared"}
        refuse_if(
            not known or len(kinds) != layers or kinds[0] != "full",
            f"indexer_types = {kinds!r}, but it must say full or shared of {layers} layers, and "
            "full of the first",
        )
        return super().read_apart(config, values) | {"indexer_types": tuple(kinds)}

    def has_indexer(self, layer: int) -> bool:
        """Whether a layer chooses tokens itself."""
        return self.indexer_types[layer : layer + 1] != ("shared",)  # MTP layers do


class GlmMoeDsa(DeepseekV32):
    """GLM-5; see `LanguageModel`."""

    config: GlmMoeDsaConfig
    config_class = GlmMoeDsaConfig
