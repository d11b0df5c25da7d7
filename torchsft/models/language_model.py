"""The language model that every family shares, and what a family adds to it.

A family is a file of two classes: a configuration (`ModelConfig`: what it must offer) and a
`LanguageModel` with that configuration, which says what is special:

    config_class       reads config.json
    build_layer        the parts of layer i: which attention, which feed-forward network and router
    tensor_parallel    what tensor parallelism does to which modules
    quantised          which matrices an fp8 release holds in fp8
    parts              what --train.freeze and --optim.groups call parts of the model
    initial_value      how parameters begin, where that is otherwise

`models/families.py` knows which architecture belongs to which family.

Parameter names are the keys of the Hugging Face checkpoint, experts stacked.

Shape suffixes: T tokens (all rows of the microbatch folded), S of them on this rank between blocks
and C on its tensor group (models/decoder.py), D width, V vocabulary, N documents, P rope pairs.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchsft.config import InputError
from torchsft.models.attention import (
    Attention,
    Documents,
    Implementation,
    choose_implementation,
    locate_documents,
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
from torchsft.models.loss import IGNORE, PLAIN, best_tokens, vocabulary_loss
from torchsft.models.moe import AddLoss, Experts, MoE, expert_pieces
from torchsft.models.rope import Rope, RotaryEmbedding

# How experts are computed; loop is the plain twin.
ExpertImplementation = Literal["grouped_mm", "loop"]
# Whether MTP layers are carried from the source to exports, parts of the model, or left out.
Mtp = Literal["keep", "train", "drop"]


class ModelConfig(Protocol):
    """What a family's configuration offers to the rest of torchsft, of a whole model.

    Names are those of config.json where it has one. A family's dataclass derives from this class
    and inherits the methods that have a body here.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    # Heads that tensor and context parallelism split; of keys and values as many as of queries
    # where these are expanded from a latent.
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int  # a warning says so if samples are longer
    rms_norm_eps: float  # of the norms of layers, and of the last one
    initializer_range: float  # standard deviation of weights that begin at random
    tie_word_embeddings: bool  # whether the output embedding is the input embedding
    rope: Rope
    # Layers for multi-token prediction (MTP) that a checkpoint may hold behind the model's last
    # one; None: config.json does not say.
    mtp_layers: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json's object.

        Raises:
            InputError: it describes what the family does not compute, or lacks a size.
        """
        ...

    def routed_experts(self, layer: int) -> int:
        """Experts of a layer (from 0) among which its router chooses; 0: it is dense."""
        ...

    def layer_costs(self) -> list[int]:
        """Multiply-adds per token in the matrices of each layer; of routed experts, those that a
        token meets.
        """
        ...

    @property
    def pair_cost(self) -> int:
        """Multiply-adds of all layers' attention for a token and one that it sees, which are as
        many in each.
        """
        ...

    @property
    def split_widths(self) -> dict[str, int]:
        """Widths that tensor parallelism must divide besides heads and vocabulary, by their names
        in config.json.
        """
        ...

    def attention_window(self, layer: int) -> int | None:
        """How many tokens a token of a layer (from 0) sees, itself the last; None: all."""
        return None

    def is_moe(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts."""
        return self.routed_experts(layer) > 0

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
        pairs for a document of L tokens. Where a window w is shorter than that, w^2 / 2 pairs until
        it is full and w for each token behind.
        """
        per_token = self.head_cost + sum(self.layer_costs())
        windows = list(map(self.attention_window, range(self.num_hidden_layers)))
        pairs = 0.0
        for window, length in itertools.product(windows, document_lengths):
            seen = length if window is None else min(window, length)
            pairs += seen * (length - seen / 2)
        attention = self.pair_cost * pairs / len(windows)
        return 3 * 2 * float(per_token * sum(document_lengths) + attention)


class DecoderLayer(nn.Module):
    """Attention, then a dense or a mixture-of-experts feed-forward network, each normed before and
    added after.
    """

    regions = ("add_and_norm",)  # see models/decoder.py
    # recompute(function, *args) runs a function so that little is kept for its backward pass; None:
    # all is kept.
    recompute: Callable[..., Tensor] | None = None
    # stream(x_SD, documents) does what `compute` does, piece by piece; None: nothing does.
    stream: Callable[[Tensor, Documents], Tensor] | None = None

    def __init__(
        self, width: int, norm_eps: float, attention: Attention, network: SwigluMLP | MoE
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, network
        self.input_layernorm = RMSNorm(width, norm_eps)
        self.post_attention_layernorm = RMSNorm(width, norm_eps)

    def forward(self, x_SD: Tensor, documents: Documents, *more_SD: Tensor) -> Tensor:
        """Residual stream [S, D] to [S, D]; `more_SD` for `MTPLayer`."""
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self.compute, x_SD, documents, *more_SD)
        return self.compute(x_SD, documents, *more_SD)

    def compute(self, x_SD: Tensor, documents: Documents) -> Tensor:
        """Return what `forward` returns."""
        if self.stream is not None:
            return self.stream(x_SD, documents)
        attention_SD = self.self_attn(self.input_layernorm(x_SD), documents)
        return self.feed(*self.add_and_norm(x_SD, attention_SD), documents)

    def add_and_norm(self, x_SD: Tensor, attention_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Add what attention returns; the sum, and it normed."""
        attended_SD = x_SD + attention_SD
        return attended_SD, self.post_attention_layernorm(attended_SD)

    def feed(self, x_SD: Tensor, normed_SD: Tensor, documents: Documents) -> Tensor:
        """Add to x_SD what the feed-forward network returns for it, normed."""
        if isinstance(self.mlp, MoE):
            return self.mlp(normed_SD, documents, x_SD)
        return x_SD + self.mlp(normed_SD)


class MTPLayer(DecoderLayer):
    """A layer for multi-token prediction (arXiv:2412.19437, section 2.2).

    It has the parts of a `layer` of the model, and what joins two of its inputs. Files have the
    embedding's half of `eh_proj` first; the report writes the two halves the other way round.
    """

    def __init__(self, layer: DecoderLayer, width: int, norm_eps: float) -> None:
        super().__init__(width, norm_eps, layer.self_attn, layer.mlp)
        self.enorm, self.hnorm = RMSNorm(width, norm_eps), RMSNorm(width, norm_eps)
        self.eh_proj = Linear(2 * width, width, bias=False)
        self.shared_head = nn.Module()
        self.shared_head.norm = RMSNorm(width, norm_eps)

    def forward(self, x_SD: Tensor, documents: Documents, *more_SD: Tensor) -> Tensor:
        """Return the hidden states that the head reads, behind the layer's last norm; see
        `compute`.
        """
        # Not a part of what is computed again, which must not need what experts return.
        return self.shared_head.norm(super().forward(x_SD, documents, *more_SD))

    def compute(self, x_SD: Tensor, documents: Documents, next_SD: Tensor) -> Tensor:
        """Return what the last norm is applied to.

        Args:
            x_SD: the hidden states before this layer, behind the model's last norm or that of the
                MTP layer before. (The report leaves open which side of it. Behind it is where
                transformers, vLLM and SGLang take them.)
            documents: without the tokens whose next one is not in their document.
            next_SD: the embedding of a token further on.
        """
        both = torch.cat([self.enorm(next_SD), self.hnorm(x_SD)], dim=-1)
        return super().compute(self.eh_proj(both), documents)


class LanguageModel(nn.Module):
    """The language model, or the part of it that a pipeline stage or a rank holds; derived from by
    each family.

    Its weights are whatever memory held until they are loaded or set to `initial_value`.

    Raises:
        InputError: grouped_mm cannot work with the experts' widths.
    """

    config_class: ClassVar[type[ModelConfig]]
    build_layer: Callable[[int, ExpertImplementation], DecoderLayer]  # by number in the whole model
    # Module name -> style; parallel/tensor.py says what the styles mean. Modules that are not named
    # are replicated. A family adds its attention.
    tensor_parallel: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens": "vocabulary",
        "model.layers.*.mlp": "gather",  # of dense layers
        "model.layers.*.mlp.gate_proj": "column",
        "model.layers.*.mlp.up_proj": "column",
        "model.layers.*.mlp.down_proj": "row",
        "lm_head": "vocabulary",
    }
    # What the loss of MTP layers is multiplied with in the gradient: its factor over their number
    # and the loss weight of the global batch, set before each step.
    mtp_scale = 0.0
    # What is minimised besides the negative log-likelihood, likewise.
    objective = PLAIN
    # Sums since they were last zeroed; not saved.
    mtp_loss: Tensor  # fp32 scalar: weighted token losses of MTP layers, in training mode
    # int64 [2], in evaluation mode: supervised tokens that the first MTP layer drafts as the model
    # itself would choose them, and all of them
    mtp_drafts: Tensor
    # Where Hugging Face keys differ from names here: pattern -> replacement, applied in order to a
    # name (experts one by one).
    renamed: ClassVar[Mapping[str, str]] = {}
    # Found in the Hugging Face keys of the matrices that are fp8 in an fp8 release; None: there is
    # no such release that anyone could read.
    quantised: ClassVar[re.Pattern[str] | None]
    # Modules that an fp8 config.json must name as not quantised, where that is not the head alone.
    never_quantised: ClassVar[tuple[str, ...]] = ()
    # Patterns of parameters that are never trained: they have no gradient, and exports keep them as
    # they are.
    untrained: ClassVar[tuple[str, ...]] = ()
    # Word -> pattern of parameter names (optim/selection.py).
    parts: ClassVar[Mapping[str, str]] = {
        "router": "model.layers.*.mlp.gate",
        "embeddings": "model.embed_tokens",
        "experts": "model.layers.*.mlp.experts",
        "layers": "model.layers",
    }

    def __init__(
        self,
        config: ModelConfig,  # of the whole model
        # auto picks by the device and dtype of the hidden states
        attention: Implementation | Literal["auto"] = "auto",
        experts: ExpertImplementation = "grouped_mm",
        # tokens whose logits exist at the same time when labels are given; None: by their memory
        loss_chunk: int | None = None,
        # of this part, by number in the whole model; None: all
        layers: Sequence[int] | None = None,
        first: bool = True,  # whether it begins with token ids and the embedding
        last: bool = True,  # whether it ends with the last norm, the head and the loss
        mtp: Mtp = "keep",  # with train, the last part has the MTP layers
    ) -> None:
        super().__init__()
        # This class; FSDP2 gives a sharded model another one.
        self.family = type(self)
        self.config, self.attention, self.loss_chunk = config, attention, loss_chunk
        self.first, self.last, self.mtp = first, last, mtp
        # layers of the whole model, trained MTP layers too
        self.depth = config.num_hidden_layers + trained_mtp_layers(mtp, config)
        # where tokens and vocabulary lie; tensor and context parallelism replace it
        self.layout = Layout()
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.model = nn.Module()  # what the checkpoint calls so, as far as it belongs to this part
        if first or self.needs_embedding:
            self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.rotary_emb = RotaryEmbedding(config.rope)
        self.model.layers = nn.ModuleDict(
            {str(layer): self.build_layer(layer, experts) for layer in layers}
        )
        self.register_buffer("mtp_loss", torch.zeros(()), persistent=False)
        # of loss weight times the smoothed loss, and times the z-loss (`vocabulary_loss`)
        self.register_buffer("objective_sums", torch.zeros(2), persistent=False)
        drafts = torch.zeros(2, dtype=torch.int64)
        self.register_buffer("mtp_drafts", drafts, persistent=False)
        if last:
            width, eps = config.hidden_size, config.rms_norm_eps
            for layer in range(config.num_hidden_layers, self.depth):
                built = self.build_layer(layer, experts)
                self.model.layers[str(layer)] = MTPLayer(built, width, eps)
            self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            if not config.tie_word_embeddings:
                self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def needs_embedding(self) -> bool:
        """Whether this part has MTP layers, which embed tokens too."""
        return self.last and self.depth > self.config.num_hidden_layers

    def part(self, layers: Sequence[int], first: bool, last: bool) -> "LanguageModel":
        """Return some of the layers that are here, as a model of their own, which shares modules
        and so parameters.

        Args:
            layers: by number in the whole model.
            first: whether the part has the embedding.
            last: whether it has the last norm and the head.
        """
        part = self.family(
            self.config,
            self.attention,
            loss_chunk=self.loss_chunk,
            layers=(),
            first=False,
            last=False,
            mtp=self.mtp,
        )
        if last:
            layers = [*layers, *range(self.config.num_hidden_layers, self.depth)]
        part.layout, part.first, part.last = self.layout, first, last
        part.model.rotary_emb = self.model.rotary_emb
        part.model.layers.update({str(layer): self.model.layers[str(layer)] for layer in layers})
        if first or part.needs_embedding:
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
        # tokens behind the last document; without it the varlen attention also has empty documents
        padding: int | None = None,
        # int64 [T], of a part that is not the first, for its MTP layers
        token_ids: Tensor | None = None,
        # int64 [n], the only tokens whose logits are wanted (generation); None means all
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Return logits [T, V] or [n, V] in the model's dtype, or with labels the loss sum_t
        loss_weights[t] * nll[t] over this rank's C tokens, an fp32 scalar; from a part that is not
        the last, hidden states [S, D].
        """
        layout = self.layout
        x_SD = self.model.embed_tokens(layout.context(tokens)) if self.first else tokens
        implementation = choose_implementation(self.attention, x_SD.device, x_SD.dtype)
        cos_TP, sin_TP = self.model.rotary_emb(positions)
        windows = {self.config.attention_window(int(layer)) for layer in self.model.layers}
        documents = locate_documents(
            implementation, cos_TP, sin_TP, cu_seqlens, max_seqlen, layout, windows, padding
        )
        mtp_layers = self.mtp_layers()
        for layer in self.model.layers.values():
            if layer not in mtp_layers:
                x_SD = layer(x_SD, documents)
        if not self.last:
            return x_SD
        hidden_SD = self.model.norm(x_SD)
        tied = self.config.tie_word_embeddings
        weight_VD = local(self.model.embed_tokens.weight if tied else self.lm_head.weight)
        if labels is None:
            (hidden_TD,) = layout.gather(hidden_SD)
            hidden_nD = hidden_TD if logits_at is None else hidden_TD[logits_at]
            return layout.logits(F.linear(hidden_nD, weight_VD))
        if loss_weights is None:
            loss_weights = torch.ones_like(labels, dtype=torch.float32)

        def loss_of(
            state_SD: Tensor, labels: Tensor, weights: Tensor, sums: Tensor | None = None
        ) -> Tensor:
            state_CD = layout.gather_tensor(state_SD)
            parts = layout.context(labels), layout.context(weights)
            how = self.loss_chunk, layout.vocabulary, self.objective
            return vocabulary_loss(state_CD, weight_VD, *parts, *how, sums)

        sums = self.objective_sums if self.training else None
        loss, state_SD = loss_of(hidden_SD, labels, loss_weights, sums), hidden_SD
        for depth, layer in enumerate(mtp_layers, start=1):
            # At position i: the state there and token i + depth predict the token behind that, as
            # far as both are in the document.
            ahead_T = positions.roll(-depth) == positions + depth
            ids = tokens if self.first else token_ids
            next_SD = self.model.embed_tokens(layout.context(ids.roll(-depth)))
            state_SD = layer(state_SD, documents.shortened(layout.tokens(ahead_T), depth), next_SD)
            weights = torch.where(ahead_T, loss_weights.roll(-depth), 0)
            if self.training:
                further = loss_of(state_SD, labels.roll(-depth), weights)
                self.mtp_loss += further.detach()
                loss = AddLoss.apply(loss, further * self.mtp_scale)
            elif depth == 1:
                supervised_T = (weights != 0) & (labels.roll(-depth) != IGNORE)
                self._count_drafts(hidden_SD, state_SD, weight_VD, supervised_T)
        return loss

    def _count_drafts(
        self, hidden_SD: Tensor, draft_SD: Tensor, weight_VD: Tensor, supervised_T: Tensor
    ) -> None:
        """Count for how many supervised tokens i + 2 what is drafted at i, of the true tokens up to
        i + 1, is what the model itself chooses there.
        """
        layout = self.layout
        chosen_C, drafted_C = (
            best_tokens(
                layout.gather_tensor(state_SD), weight_VD, self.loss_chunk, layout.vocabulary
            )
            for state_SD in (hidden_SD, draft_SD)
        )
        # Of all tokens: the next one can be another rank's. A tensor group's ranks have the same.
        place_C = layout.context(torch.arange(len(supervised_T), device=chosen_C.device))
        sums_2T = chosen_C.new_zeros(2, len(supervised_T))
        sums_2T[:, place_C] = torch.stack([chosen_C, torch.ones_like(chosen_C)])
        chosen_T, ranks_T = layout.sum(sums_2T)
        right_C = layout.context((chosen_T // ranks_T).roll(-1)) == drafted_C
        supervised_C = layout.context(supervised_T)
        self.mtp_drafts += torch.stack([(right_C & supervised_C).sum(), supervised_C.sum()])

    def init_buffers(self) -> None:
        """Recompute the buffers that no checkpoint holds (rotary frequencies, expert load), e.g.
        after `to_empty`.
        """
        self.model.rotary_emb.init_buffers()
        # A model that is split into stages has its memory in these, and its own sums on meta.
        device = self.model.rotary_emb.inv_freq.device
        for name in ("mtp_loss", "mtp_drafts", "objective_sums"):
            setattr(self, name, torch.zeros_like(getattr(self, name), device=device))
        for moe in self.moe_layers().values():
            moe.init_buffers()

    def mtp_layers(self) -> list[MTPLayer]:
        """Return the MTP layers that are here, in order."""
        return [layer for layer in self.model.layers.values() if isinstance(layer, MTPLayer)]

    def layer_experts(self) -> dict[int, int]:
        """Return the number of experts of every layer of the whole model that has some."""
        experts = {layer: self.config.routed_experts(layer) for layer in range(self.depth)}
        return {layer: count for layer, count in experts.items() if count}

    def shared_keys(self) -> dict[str, str]:
        """Return the Hugging Face keys under which files may have tensors of the model once more,
        for MTP layers that share them, and the names of these.
        """
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        shared = {"embed_tokens": "model.embed_tokens", "shared_head.head": head}
        return {
            self.hf_key(f"model.layers.{layer}.{part}.weight"): f"{name}.weight"
            for layer in range(self.config.num_hidden_layers, self.depth)
            for part, name in shared.items()
        }

    def moe_layers(self) -> dict[str, MoE]:
        """Return the mixture-of-experts blocks that are here, by the number of their layer."""
        return {
            name: layer.mlp
            for name, layer in self.model.layers.items()
            if isinstance(layer.mlp, MoE)
        }

    def checkpoint_pieces(self, more: Container[str] = ()) -> dict[str, list[Piece]]:
        """Return which Hugging Face tensors make up each parameter and persistent buffer, by its
        name here; of `shared_keys`, those among `more` too, which fill the same part once more.
        """
        pieces: dict[str, list[Piece]] = {}
        for name, tensor in self.state_dict().items():
            shape = tuple(tensor.shape)
            owner = self._owner(name)
            if isinstance(owner, Experts) and owner.stored_singly:
                pieces[name] = expert_pieces(name, shape)
            else:
                pieces[name] = [Piece(name, shape, (0,) * len(shape))]
        pieces = {
            name: [dataclasses.replace(piece, key=self.hf_key(piece.key)) for piece in parts]
            for name, parts in pieces.items()
        }
        for key, name in self.shared_keys().items():
            if key in more:
                pieces[name].append(dataclasses.replace(pieces[name][0], key=key))
        return pieces

    def matrices(self) -> dict[str, int]:
        """Return the parameters that consist of the layers' matrices, so not embeddings, head,
        norms and biases, and how many rows each of their matrices has.

        A matrix is what the files hold as one (of experts that they hold together, each expert's):
        the stacked `experts.gate_up_proj` [E, 2F, D] has 2E of F rows.
        """
        pieces = self.checkpoint_pieces()
        return {
            name: pieces[name][0].hf_shape[-2]
            for name, parameter in self.named_parameters()
            if name.startswith("model.layers.") and parameter.ndim > 1 and not name.endswith("bias")
        }

    @classmethod
    def hf_key(cls, name: str) -> str:
        """Return the Hugging Face key of a parameter, or of one expert's part of it."""
        for pattern, replacement in cls.renamed.items():
            name = re.sub(pattern, replacement, name)
        return name

    @classmethod
    def is_quantised(cls, key: str) -> bool:
        """Whether fp8 releases of this family hold the tensor of a Hugging Face key in fp8."""
        return cls.quantised is not None and cls.quantised.search(key) is not None

    def constants(self) -> set[str]:
        """Return names of persistent buffers and parameters that training does not change."""
        untrained = (
            name
            for name, _ in self.named_parameters()
            if any(fnmatchcase(name, f"{pattern}.*") for pattern in self.untrained)
        )
        return {name for name, _ in self.named_buffers()}.union(untrained)

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Random initial value of a parameter or persistent buffer of this model.

        Args:
            name: of it here; its module decides: weights of norms begin at 1, biases and buffers
                at 0, other weights normal with the standard deviation initializer_range.
            shape: its full (unsharded) one.
            seed: with name and shape, all that random numbers depend on.

        Returns:
            The full value, fp32 on the CPU.
        """
        owner, last = self._owner(name), name.rpartition(".")[2]
        if last.endswith("bias") or last in dict(owner.named_buffers(recurse=False)):
            return torch.zeros(shape)
        if isinstance(owner, RMSNorm | nn.LayerNorm):
            return torch.ones(shape)
        return seeded_normal(name, shape, self.config.initializer_range, seed)

    def _owner(self, name: str) -> nn.Module:
        """Return the module that a parameter or buffer belongs to."""
        return self.get_submodule(name.rpartition(".")[0])


def trained_mtp_layers(mtp: Mtp, config: ModelConfig) -> int:
    """Return how many MTP layers are trained.

    Raises:
        InputError: some are to be, but the model has none.
    """
    if mtp == "train" and not config.mtp_layers:
        raise InputError(
            f"--model.mtp is train, but config.json has {config.mtp_layers or 0} layers for "
            "multi-token prediction that can be trained; set --model.mtp keep"
        )
    return config.mtp_layers or 0 if mtp == "train" else 0
