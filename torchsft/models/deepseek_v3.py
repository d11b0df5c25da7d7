"""DeepSeek-V3 and models of its architecture (R1, V3.1, Kimi-K2, Moonlight).

MLA attention, leading dense layers, then mixture-of-experts layers with shared experts; see the
technical report, arXiv:2412.19437, section 2.1. Parameter names are the keys of the Hugging Face
checkpoint, experts stacked.

Shape suffixes: T tokens (all rows of the microbatch folded), S of them on this rank between blocks
(models/decoder.py), D width, V vocabulary, N documents, P rope pairs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsft.config import InputError
from torchsft.models.attention import (
    Implementation,
    LatentAttention,
    Packing,
    choose_implementation,
    packing,
)
from torchsft.models.decoder import (
    Embedding,
    Layout,
    Linear,
    Piece,
    RMSNorm,
    SwigluMLP,
    local,
    seeded_normal,
)
from torchsft.models.loss import vocabulary_loss
from torchsft.models.moe import Experts, MoE, Router
from torchsft.models.rope import Rope, RotaryEmbedding, Yarn

ARCHITECTURE = "DeepseekV3ForCausalLM"

# Fields with one supported value; a config.json that says another one describes another
# computation.
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "attention_dropout": 0,
}

# Names under which transformers takes one setting.
_SPELLINGS = (
    ("n_routed_experts", "num_local_experts"),
    ("num_nextn_predict_layers", "num_mtp_layers"),
    ("dtype", "torch_dtype"),
)

# What tensor parallelism does to which modules; parallel/tensor.py says what the styles mean.
# Modules that are not named are replicated: what makes the latents, the norms, the router and the
# shared experts.
TENSOR_PARALLEL = {
    "model.embed_tokens": "vocabulary",
    "model.layers.*.self_attn.q_proj": "column",
    "model.layers.*.self_attn.q_b_proj": "column",
    "model.layers.*.self_attn.kv_b_proj": "column",
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.mlp": "gather",  # of dense layers
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
    "lm_head": "vocabulary",
}

# What --train.freeze and --optim.groups call parts of the model (optim/selection.py).
PARTS = {
    "router": "model.layers.*.mlp.gate",
    "embeddings": "model.embed_tokens",
    "experts": "model.layers.*.mlp.experts",
    "layers": "model.layers",
}


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config:
    """Sizes and constants of a model, named as in config.json (rope: both spellings of it,
    parsed).
    """

    # Sizes without which no parameter has a shape.
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # The defaults are what transformers assumes where config.json is silent.
    q_lora_rank: int | None = 1536
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    # MTP layers that the checkpoint may hold behind the last layer; not computed here
    num_nextn_predict_layers: int = 0
    rope: Rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekV3Config":
        """Read a config.json's object (transformers 5's style or the official repositories').

        InputError where it describes another architecture, weights quantised otherwise than
        DeepSeek's fp8, or values that this code does not compute, and where it lacks a size.
        """
        architectures, model_type = config.get("architectures"), config.get("model_type")
        if ARCHITECTURE not in (architectures or []) and (
            architectures or model_type != "deepseek_v3"
        ):
            found = (
                ", ".join(architectures)
                if architectures
                else f"no architectures and model_type {model_type!r}"
            )
            raise InputError(f"config.json describes {found}, but only {ARCHITECTURE} is supported")
        quantization = config.get("quantization_config")
        if quantization and described_block(config) is None:
            raise InputError(
                f"config.json has quantization_config = {json.dumps(quantization)}, but only "
                f"DeepSeek's fp8 (e4m3, blocks such"
                " as [128, 128]) is supported; give such a checkpoint, or a bf16 or fp32 one"
            )
        _refuse_contradictions(config)
        missing = [key for key in _REQUIRED if config.get(key) is None]
        if missing:
            raise InputError(
                f"config.json lacks {', '.join(missing)}, without which the model has no shape"
            )
        odd = [f"{key} = {config[key]!r}" for key in _REQUIRED if not isinstance(config[key], int)]
        odd += [
            f"{key} = {config[key]!r}"
            for key in _OPTIONAL
            if not isinstance(config.get(key), int | float | None)
        ]
        _refuse_if(odd, f"{', '.join(odd)}, but numbers are needed there")
        for key, value in _FIXED.items():
            _refuse_if(
                config.get(key) not in (None, value),
                f"{key} = {config.get(key)!r}, but only {value!r} is supported",
            )
        heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
        _refuse_if(
            kv_heads not in (None, heads),
            f"{kv_heads} num_key_value_heads for {heads} heads; MLA needs them equal",
        )
        # null stands for the default, except where it says that there is no query latent
        said = [
            key
            for key in _REQUIRED + _OPTIONAL
            if key in config and (config[key] is not None or key == "q_lora_rank")
        ]
        return cls(**{key: config[key] for key in said}, rope=_rope(config))

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "n_shared_experts", "n_group", "topk_group"):
            _refuse_if(
                getattr(self, name) < 1,
                f"{name} = {getattr(self, name)}, but it must be at least 1",
            )
        _refuse_if(
            self.qk_rope_head_dim % 2,
            f"qk_rope_head_dim = {self.qk_rope_head_dim}, but it must be even",
        )
        dims = f"v_head_dim = {self.v_head_dim} above the {self.qk_head_dim} of queries and keys"
        _refuse_if(
            self.v_head_dim > self.qk_head_dim, f"{dims}, which the attention does not support"
        )
        experts, groups, open_groups = self.n_routed_experts, self.n_group, self.topk_group
        _refuse_if(
            experts % groups,
            f"{experts} n_routed_experts, which n_group ({groups}) does not divide",
        )
        _refuse_if(
            open_groups > groups, f"topk_group = {open_groups}, but only {groups} groups (n_group)"
        )
        each = f"{experts} n_routed_experts in {groups} groups"
        _refuse_if(
            open_groups < groups and experts // groups < 2,
            f"{each}, but groups compete by their best two",
        )
        wanted, reachable = self.num_experts_per_tok, experts // groups * open_groups
        few = f"the {open_groups} groups open to a token (topk_group) hold only {reachable} experts"
        _refuse_if(wanted > reachable, f"num_experts_per_tok = {wanted}, but {few}")

    @property
    def qk_head_dim(self) -> int:
        """Entries of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether layer (from 0) has experts."""
        return layer >= self.first_k_dense_replace

    def layer_costs(self) -> list[int]:
        """Multiply-adds per token in the matrices of each layer: attention, and a dense network or
        router, K routed experts and shared ones.
        """
        width, heads = self.hidden_size, self.num_attention_heads
        q_out = heads * self.qk_head_dim
        q = width * q_out if self.q_lora_rank is None else self.q_lora_rank * (width + q_out)
        kv_a = width * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_b = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        attention = q + kv_a + kv_b + heads * self.v_head_dim * width
        dense = 3 * width * self.intermediate_size
        used_experts = self.num_experts_per_tok + self.n_shared_experts
        moe = 3 * width * self.moe_intermediate_size * used_experts + width * self.n_routed_experts
        return [
            attention + (moe if self.is_moe(layer) else dense)
            for layer in range(self.num_hidden_layers)
        ]

    @property
    def head_cost(self) -> int:
        """Multiply-adds per token of the output embedding, whose logits are the loss's."""
        return self.vocab_size * self.hidden_size

    @property
    def embedding_cost(self) -> int:
        """Of the input embedding, which copies a row: next to nothing."""
        return self.hidden_size

    def flops(self, document_lengths: list[int]) -> float:
        """FLOPs of one training step (forward and backward, 3 x forward) over documents of these
        lengths.

        2 per multiply-add. Every matrix that a token meets counts once (`layer_costs` and the
        output embedding, not the input embedding), and attention counts its causal half: L^2 / 2
        pairs per head for a document of L tokens, each qk_head_dim + v_head_dim multiply-adds.
        """
        per_token = self.head_cost + sum(self.layer_costs())
        pairs = (
            self.num_hidden_layers
            * self.num_attention_heads
            * sum(length**2 / 2 for length in document_lengths)
        )
        multiply_adds = per_token * sum(document_lengths) + pairs * (
            self.qk_head_dim + self.v_head_dim
        )
        return 3 * 2 * float(multiply_adds)


_REQUIRED = [
    field.name
    for field in fields(DeepseekV3Config)
    if field.default is MISSING and field.name != "rope"
]
_OPTIONAL = [field.name for field in fields(DeepseekV3Config) if field.default is not MISSING]


def _refuse_if(refused: Any, problem: str) -> None:
    if refused:
        raise InputError(f"config.json has {problem}")


def described_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an fp8 block by a config.json; None where it does not describe
    block-scaled e4m3 weights.
    """
    fp8 = config.get("quantization_config")
    block = fp8.get("weight_block_size") if isinstance(fp8, Mapping) else None
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        return None
    return (
        tuple(block)
        if fp8.get("quant_method") == "fp8" and fp8.get("fmt", "e4m3") == "e4m3"
        else None
    )


def _refuse_contradictions(config: Mapping[str, Any]) -> None:
    for names in _SPELLINGS:
        said = {name: config[name] for name in names if config.get(name) is not None}
        values = list(said.values())
        both = " and ".join(f"{name} = {value!r}" for name, value in said.items())
        _refuse_if(
            len(values) == 2 and values[0] != values[1],
            f"{both}, two names of one setting; keep one",
        )


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary embeddings, with `rope_type` and `rope_theta` in it.

    `rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta` beside it (official).
    Programs differ in which one they prefer, so where there are both they must say the same.
    """
    names = [name for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    read = [_rope_table(name, config) for name in names or ["rope_parameters"]]
    if len(read) == 2:
        for key in sorted(read[0].keys() | read[1].keys()):
            values = [table.get(key) for table in read]
            both = f"{key} = {values[0]!r} in rope_parameters and {values[1]!r} in rope_scaling"
            _refuse_if(values[0] != values[1], f"{both}; keep one of the two tables")
    return read[0]


def _rope_table(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """One of the two tables, with what stands beside it."""
    table = config.get(name) or {}
    _refuse_if(not isinstance(table, Mapping), f"{name} = {table!r}, but it must be an object")
    table = {key: value for key, value in table.items() if value is not None}
    old, new = table.pop("type", None), table.get("rope_type")
    _refuse_if(
        old and new and old != new, f"type = {old!r} and rope_type = {new!r} in {name}; keep one"
    )
    table["rope_type"] = new or old or "default"
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1)):
        inside, outside = table.get(key), config.get(key)
        both = f"{key} = {outside!r} and another one, {inside!r}, in {name}"
        _refuse_if(None not in (inside, outside) and inside != outside, f"{both}; keep one")
        table[key] = next((value for value in (inside, outside) if value is not None), default)
    return table


def _rope(config: Mapping[str, Any]) -> Rope:
    values = _rope_settings(config)
    kind, theta, turned = (
        values["rope_type"],
        float(values["rope_theta"]),
        values["partial_rotary_factor"],
    )
    _refuse_if(turned != 1, f"partial_rotary_factor = {turned}, only 1 is supported")
    _refuse_if(
        kind not in ("default", "yarn"),
        f"rope type {kind!r}, but only 'default' and 'yarn' are supported",
    )
    yarn = None
    if kind == "yarn":
        longest = config.get("max_position_embeddings") or DeepseekV3Config.max_position_embeddings
        original = values.get("original_max_position_embeddings") or longest
        factor = float(values.get("factor") or longest / original)
        said = {key: values[key] for key in ("beta_fast", "beta_slow") if values.get(key)}
        said |= {
            key: values[key]
            for key in ("mscale", "mscale_all_dim", "attention_factor", "truncate")
            if key in values
        }
        yarn = Yarn(factor=factor, original_context=original, **said)
    return Rope(dim=config["qk_rope_head_dim"], theta=theta, yarn=yarn)


class DecoderLayer(nn.Module):
    """Attention, then a dense or a mixture-of-experts feed-forward network, each normed before and
    added after.
    """

    # recompute(function, *args) runs a function so that little is kept for its backward pass; None:
    # all is kept.
    recompute: Callable[..., Tensor] | None = None

    def __init__(
        self, config: DeepseekV3Config, layer: int, experts: Literal["grouped_mm", "loop"]
    ) -> None:
        super().__init__()
        width = config.hidden_size
        latents = dict(
            q_rank=config.q_lora_rank, kv_rank=config.kv_lora_rank, bias=config.attention_bias
        )
        dims = dict(nope_dim=config.qk_nope_head_dim, v_dim=config.v_head_dim, rope=config.rope)
        self.self_attn = LatentAttention(
            width=width, heads=config.num_attention_heads, **latents, **dims
        )
        if config.is_moe(layer):
            choice = dict(
                top_k=config.num_experts_per_tok,
                groups=config.n_group,
                top_groups=config.topk_group,
            )
            weighing = dict(normalise=config.norm_topk_prob, scale=config.routed_scaling_factor)
            gate = Router(width, config.n_routed_experts, **choice, **weighing)
            routed = Experts(config.n_routed_experts, width, config.moe_intermediate_size, experts)
            shared = SwigluMLP(width, config.moe_intermediate_size * config.n_shared_experts)
            self.mlp = MoE(gate, routed, shared)
        else:
            self.mlp = SwigluMLP(width, config.intermediate_size)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_SD: Tensor, packing: Packing) -> Tensor:
        """Residual stream [S, D] to [S, D]."""
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self.compute, x_SD, packing)
        return self.compute(x_SD, packing)

    def compute(self, x_SD: Tensor, packing: Packing) -> Tensor:
        """What `forward` returns."""
        x_SD = x_SD + self.self_attn(self.input_layernorm(x_SD), packing)
        normed_SD = self.post_attention_layernorm(x_SD)
        return x_SD + (
            self.mlp(normed_SD, packing) if isinstance(self.mlp, MoE) else self.mlp(normed_SD)
        )


class DeepseekV3(nn.Module):
    """The language model, or the part of it that a pipeline stage or a rank holds.

    Its weights are whatever memory held until they are loaded or set to `initial_value`. InputError
    for widths that grouped_mm cannot work with.
    """

    def __init__(
        self,
        config: DeepseekV3Config,  # of the whole model
        # auto picks by the device and dtype of the hidden states
        attention: Implementation | Literal["auto"] = "auto",
        experts: Literal["grouped_mm", "loop"] = "grouped_mm",  # loop is the plain twin
        loss_chunk: int = 1024,  # tokens whose logits exist at the same time when labels are given
        # of this part, by number in the whole model; None: all
        layers: Sequence[int] | None = None,
        first: bool = True,  # whether it begins with token ids and the embedding
        last: bool = True,  # whether it ends with the last norm, the head and the loss
    ) -> None:
        super().__init__()
        self.config, self.attention, self.loss_chunk = config, attention, loss_chunk
        self.first, self.last = first, last
        # where tokens and vocabulary lie; tensor and context parallelism replace it
        self.layout = Layout()
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.model = nn.Module()  # what the checkpoint calls so, as far as it belongs to this part
        if first:
            self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.rotary_emb = RotaryEmbedding(config.rope)
        self.model.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(config, layer, experts) for layer in layers}
        )
        if last:
            self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            if not config.tie_word_embeddings:
                self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def part(self, layers: Sequence[int], first: bool, last: bool) -> "DeepseekV3":
        """Some of the layers that are here, by number, as a model of their own, which shares
        modules and so parameters; `first` and `last` say whether it has the embedding, and the last
        norm and the head.
        """
        part = DeepseekV3(
            self.config,
            self.attention,
            loss_chunk=self.loss_chunk,
            layers=(),
            first=False,
            last=False,
        )
        part.layout, part.first, part.last = self.layout, first, last
        part.model.rotary_emb = self.model.rotary_emb
        part.model.layers.update({str(layer): self.model.layers[str(layer)] for layer in layers})
        if first:
            part.model.embed_tokens = self.model.embed_tokens
        if last:
            part.model.norm = self.model.norm
            if not self.config.tie_word_embeddings:
                part.lm_head = self.lm_head
        return part

    def forward(
        self,
        # int64 [T], all of the microbatch; for a part that is not the first, hidden states [S, D]
        tokens: Tensor,
        *,
        positions: Tensor,  # int64 [T], from 0 in each document
        # int32 [N + 1], bounds of the documents, which lie together from token 0; the rest is
        # padding
        cu_seqlens: Tensor,
        # int64 [T], the target predicted at each position; -100 for none
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,  # fp32 [T], weight of each target; None means 1
        # longest document; without it the varlen attention stops the host to ask
        max_seqlen: int | None = None,
        # int64 [n], the only tokens whose logits are wanted (generation); None means all
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits [T, V] or [n, V] in the model's dtype, or with labels the loss sum_t
        loss_weights[t] * nll[t] over this rank's C tokens, an fp32 scalar; from a part that is not
        the last, hidden states [S, D].
        """
        layout = self.layout
        x_SD = self.model.embed_tokens(layout.context(tokens)) if self.first else tokens
        implementation = choose_implementation(self.attention, x_SD.device, x_SD.dtype)
        cos_TP, sin_TP = self.model.rotary_emb(positions)
        documents = packing(implementation, cos_TP, sin_TP, cu_seqlens, max_seqlen, layout)
        for layer in self.model.layers.values():
            x_SD = layer(x_SD, documents)
        if not self.last:
            return x_SD
        hidden_SD = self.model.norm(x_SD)
        weight_VD = local(
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )
        if labels is None:
            (hidden_TD,) = layout.gather(hidden_SD)
            return layout.logits(
                F.linear(hidden_TD if logits_at is None else hidden_TD[logits_at], weight_VD)
            )
        labels, loss_weights = (
            None if x is None else layout.context(x) for x in (labels, loss_weights)
        )
        hidden_CD = layout.gather_tensor(hidden_SD)
        return vocabulary_loss(
            hidden_CD, weight_VD, labels, loss_weights, self.loss_chunk, layout.vocabulary
        )

    def init_buffers(self) -> None:
        """Recompute the buffers that no checkpoint holds (rotary frequencies, expert load), e.g.
        after `to_empty`.
        """
        for module in self.modules():
            if isinstance(module, RotaryEmbedding | MoE):
                module.init_buffers()

    def moe_layers(self) -> dict[str, MoE]:
        """The mixture-of-experts blocks that are here, by the number of their layer."""
        return {
            name: layer.mlp
            for name, layer in self.model.layers.items()
            if isinstance(layer.mlp, MoE)
        }

    def checkpoint_pieces(self) -> dict[str, list[Piece]]:
        """Which Hugging Face tensors make up each parameter and persistent buffer, by its name
        here.
        """
        expert_width, width = self.config.moe_intermediate_size, self.config.hidden_size
        parts = {  # of an expert's part in a stacked parameter: name, shape, first row
            "gate_up_proj": [
                ("gate_proj", (expert_width, width), 0),
                ("up_proj", (expert_width, width), expert_width),
            ],
            "down_proj": [("down_proj", (width, expert_width), 0)],
        }
        pieces: dict[str, list[Piece]] = {}
        for name, tensor in self.state_dict().items():
            prefix, _, last = name.rpartition(".")
            if last not in parts:
                pieces[name] = [Piece(name, tuple(tensor.shape), (0,) * tensor.dim())]
                continue
            pieces[name] = [
                Piece(f"{prefix}.{expert}.{part}.weight", shape, (expert, row, 0))
                for expert in range(tensor.shape[0])
                for part, shape, row in parts[last]
            ]
        return pieces


def initial_value(fqn: str, shape: tuple[int, ...], config: DeepseekV3Config, seed: int) -> Tensor:
    """Random initial value of the parameter or persistent buffer `fqn` of `DeepseekV3`, in its full
    (unsharded) shape.

    fp32 on CPU: 1 for norms, 0 for biases and the correction bias, otherwise normal with the
    standard deviation initializer_range; depends on name, shape and seed alone.
    """
    if "layernorm" in fqn or fqn == "model.norm.weight":
        return torch.ones(shape)
    if fqn.endswith("bias"):
        return torch.zeros(shape)
    return seeded_normal(fqn, shape, config.initializer_range, seed)
