"""Parts that decoder families share: linear, embedding, norm, feed-forward network, checkpoint
pieces, initial values; and `Layout`, through which a parallel layout reaches into a model.

Models know nothing of ranks. `parallel/` installs what a layout needs from outside, in the places
of this table and nowhere else; each stands in its class with the value of one rank alone:

    place                   what is put there                                        by
    LanguageModel.layout    where tokens and vocabulary lie, and how tokens move     tensor, context
    Linear.weight, .bias    DTensors, of which `local` is this rank's part           tensor
    Linear.rows             which outputs this rank computes, of those whose         tensor, context
                            weights it holds: those of its heads
    RMSNorm.rows            likewise                                                 tensor
    RMSNorm.mean            averages mean squares over ranks, where these have       tensor
                            parts of what is normed together
    Linear.reduce           sums products over ranks, where the inner dim is split   tensor
    Linear.product,         multiplies in another number format                      precision
    Experts.products
    Embedding.first         the token id of this rank's first row                    tensor
    Embedding.reduce        sums the ranks' lookups, of which all but one are zero   tensor
    SwigluMLP.gather        the tokens of all ranks that share the matrices          tensor
    Experts' parameters     DTensors: this rank's experts                            expert
    Experts.read            gives them in the compute dtype                          fsdp
    MoE.exchange            takes rows to the ranks of their experts and back        expert
    MoE.balance_scale,      factors of the losses of routing, before each step       trainer
    MoE.z_scale
    LanguageModel.mtp_scale factor of the loss of MTP layers, before each step       trainer
    LanguageModel.objective what is minimised besides the negative log-likelihood    trainer
    DecoderLayer.recompute  runs a layer so that little of it is kept                activation
    DecoderLayer.stream,    run a layer piece by piece                               stream
    MoE.parts,
    LatentAttention.by_heads
    methods that a class    compute what lies between collectives, in fewer kernels  compile
    names as its `regions`

The MoE layers of a model are found by `LanguageModel.moe_layers()`.

Shape suffixes: T tokens of the microbatch, S of them on this rank between blocks, C on the ranks of
its tensor group together (without parallelism T = C = S), D width, H query heads, G key/value
heads, N documents, E experts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchsft.ops.rms_norm import rms_norm, rms_norm_of_parts
from torchsft.ops.swiglu import swiglu


@dataclass(frozen=True)
class Piece:
    """A Hugging Face tensor and the box of the parameter that it fills.

    The box begins at `start` and has the shape (1,) * (parameter dims - len(hf_shape)) +
    hf_shape.
    """

    key: str
    hf_shape: tuple[int, ...]
    start: tuple[int, ...]


def local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter, as a plain tensor whose gradient finds its way back.

    What a rank adds to the gradient of a parameter that is replicated over ranks is one summand,
    since each rank sees other tokens; of a sharded parameter it is this rank's part, whole. The
    gradient nevertheless has the parameter's placements: of one that is `Partial` FSDP2 would sum
    each microbatch's at once, in its dtype. It stays a summand, and its owner sums behind the last
    microbatch (parallel/gradients.py).
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


@dataclass(frozen=True)
class VocabularyPart:
    """The tokens whose logits this rank computes: ids from `first`, as many as it has rows of the
    output embedding.
    """

    first: int
    size: int  # of the whole vocabulary
    # elementwise maximum over the ranks that hold the other parts (no gradient)
    max: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]  # elementwise sum over them (no gradient)


class Layout:
    """Where the tokens of a microbatch and the vocabulary lie; here: all on this rank. Parallel
    layouts replace it.
    """

    vocabulary: VocabularyPart | None = None

    def context(self, x: Tensor) -> Tensor:
        """[T, ...], equal on all ranks, to the part [C, ...] of this rank's tensor group."""
        return x

    def tokens(self, x: Tensor) -> Tensor:
        """[T, ...], equal on all ranks, to this rank's part [S, ...]."""
        return x

    def gather_tensor(self, x_SD: Tensor) -> Tensor:
        """[S, D] of every rank of the tensor group to [C, D] on each; differentiable."""
        return x_SD

    def gather(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Gather each [S, width] of every rank to [T, width] on each; differentiable."""
        return parts

    def tokens_to_heads(
        self, q_CHd: Tensor, k_CGd: Tensor, v_CGd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its tensor group's heads of its C tokens to this rank's heads of all T tokens;
        differentiable.
        """
        return q_CHd, k_CGd, v_CGd

    def heads(self, x_H: Tensor) -> Tensor:
        """Of what the heads of its tensor group have each, that of this rank's heads."""
        return x_H

    def heads_to_tokens(self, x_THd: Tensor) -> Tensor:
        """Send this rank's heads of all T tokens for its tensor group's heads of its C tokens;
        differentiable.
        """
        return x_THd

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over all ranks that share the microbatch's tokens (no gradient)."""
        return x

    def logits(self, x_nV: Tensor) -> Tensor:
        """Columns of this rank's vocabulary part to all columns (no gradient)."""
        return x_nV


class Linear(nn.Linear):
    """A linear map whose weight may be a DTensor."""

    # the outputs that this rank computes, of those whose weights it holds; None: all
    rows: slice | None = None
    # Sums over ranks a product whose inner dim is sharded, before the bias is added; None: it is
    # whole.
    reduce: Callable[[Tensor], Tensor] | None = None
    # (x [..., in], weight [out, in], bias [out] or None) to [..., out], on plain tensors
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    def outputs(self) -> int:
        """How many outputs this rank computes."""
        count = len(local(self.weight))
        return count if self.rows is None else len(range(count)[self.rows])

    def forward(self, x: Tensor, some: slice | None = None) -> Tensor:
        """[..., in] to [..., out]; `some` of the outputs that this rank computes, None: all."""
        weight = local(self.weight)
        bias = None if self.bias is None else local(self.bias)
        for rows in (self.rows, some):
            if rows is not None:
                weight = weight[rows]
                bias = None if bias is None else bias[rows]
        if self.reduce is None:
            return self.product(x, weight, bias)
        y = self.reduce(self.product(x, weight, None))
        return y if bias is None else y + bias


class Embedding(nn.Embedding):
    """A lookup table whose rows may be spread over ranks."""

    first: int = 0  # token id of this rank's first row
    # Sums the ranks' lookups, of which all but one are zero; None: all rows are here.
    reduce: Callable[[Tensor], Tensor] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [C] to [S, D]."""
        weight = local(self.weight)
        if self.reduce is None:
            return F.embedding(tokens, weight)
        rows = tokens - self.first
        here = (rows >= 0) & (rows < weight.shape[0])
        found = F.embedding(rows.clamp(0, weight.shape[0] - 1), weight)
        return self.reduce(torch.where(here.unsqueeze(-1), found, 0))


class Float32Buffers(nn.Module):
    """A module whose floating buffers keep fp32 through `.to(bf16)` and the like (devices change as
    usual).
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in fp32; `weight` [width]."""

    # the entries that this rank has, of those whose weights it holds; None: all
    rows: slice | None = None
    # Mean over ranks of the mean squares [..., 1] of their parts, which have the same size; None:
    # this rank has all that is normed together.
    mean: Callable[[Tensor], Tensor] | None = None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same shape and dtype."""
        weight = local(self.weight)
        if self.rows is not None:
            weight = weight[self.rows]
        if self.mean is None:
            return rms_norm(x, weight, self.eps)
        return rms_norm_of_parts(x, weight, self.eps, self.mean)


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    regions = ("hidden",)
    # Of tokens, those of all ranks that share the matrices; None: they are not shared.
    gather: Callable[[Tensor], Tensor] | None = None

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner_width, bias=False)
        self.up_proj = Linear(width, inner_width, bias=False)
        self.down_proj = Linear(inner_width, width, bias=False)

    def forward(self, x_SD: Tensor) -> Tensor:
        """[S, D] to [S, D]."""
        return self.down_proj(self.hidden(x_SD))

    def hidden(self, x_SD: Tensor) -> Tensor:
        """Return what the down projection is applied to."""
        x = x_SD if self.gather is None else self.gather(x_SD)
        return swiglu(self.gate_proj(x), self.up_proj(x))


def seeded_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Return normal numbers, fp32 on CPU, that depend on name, shape and seed alone, so on no
    layout of ranks.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(std=std, generator=generator)
