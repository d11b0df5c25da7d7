"""Longest rows at a fixed memory: layers whose backward pass runs piece by piece.

Of a layer are kept its input and where its tokens are routed. Forward and backward, attention is
computed for some heads at a time, and what follows it (norm, router, experts or the dense network;
the norm forward alone) for some tokens at a time; gradients of parameters are added up. So what a
whole row has at the same time is hidden states and latents, and what the heads return; everything
wide exists for one piece.

StreamBP (arXiv:2506.03077), after which this is made, cuts attention by tokens too: each piece sees
keys and values of all tokens before it. With latent attention these are wide (40,960 entries a
token in DeepSeek-V3) and latents narrow (576), so heads are what to cut: no document is, and
layouts that split heads over ranks stay as they are.

FSDP2 gathers a layer's parameters once for all pieces and reduces their gradients once: router and
experts, which it shards by themselves, are called once around the pieces.

Shape suffixes: S tokens on this rank, D width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchsft.models.attention import Documents, LatentAttention
from torchsft.models.decoder import local
from torchsft.models.language_model import DecoderLayer
from torchsft.models.moe import MoE
from torchsft.ops.repetition import ROUTING, Pass


def stream_layer(layer: DecoderLayer, pieces: int, *moves: Callable[[Any], Any]) -> None:
    """Let a layer compute piece by piece, in place.

    Args:
        layer: of a model, split over ranks or not.
        pieces: how many, of tokens and of heads; as many as there are, if these are fewer. Heads
            are cut in latent attention alone.
        moves: gives what stands for a kept tensor, and gives the tensor back; nothing: itself.
    """
    if isinstance(layer.self_attn, LatentAttention):
        layer.self_attn.by_heads = partial(_by_heads, pieces)
    around: list[nn.Module] = []
    if isinstance(layer.mlp, MoE):
        around = [layer.mlp.gate, layer.mlp.experts]
        layer.mlp.parts = tuple(unit.forward for unit in around)
        for unit in around:
            unit.forward = call
    layer.stream = partial(_stream, layer, around, pieces, moves)


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return what a function returns."""
    return function(*args)


def _by_heads(
    pieces: int, compute: Callable[..., Tensor], heads: int, *inputs_TR: Tensor
) -> Tensor:
    """Compute some heads at a time, and each of them again in the backward pass."""
    dtype = inputs_TR[0].dtype
    # their gradients, which the pieces add up
    in_fp32 = [x_TR.float() for x_TR in inputs_TR]

    def run(some: slice, *inputs_TR: Tensor) -> Tensor:
        rounded = [x_TR.to(dtype) for x_TR in inputs_TR]
        return compute(some, *rounded)

    outputs = []
    for some in _slices(heads, pieces):
        out_THd = checkpoint(run, some, *in_fp32, use_reentrant=False, preserve_rng_state=False)
        outputs.append(out_THd)
    return torch.cat(outputs, dim=1)


def _slices(count: int, pieces: int) -> list[slice]:
    """Cut 0 to `count` into at most that many pieces, all but the last equally long."""
    size = math.ceil(count / pieces)
    firsts = range(0, count, size)
    return [slice(first, min(first + size, count)) for first in firsts]


def _stream(
    layer: DecoderLayer,
    around: list[nn.Module],
    pieces: int,
    moves: tuple[Callable[[Any], Any], ...],
    x_SD: Tensor,
    documents: Documents,
) -> Tensor:
    """Return what the layer returns."""
    if not x_SD.requires_grad and any(p.requires_grad for p in layer.parameters()):
        x_SD = x_SD.detach().requires_grad_()  # or autograd would not ask for theirs
    if not torch.is_grad_enabled():
        moves = ()  # nothing is kept
    run: Callable[..., Tensor] = _Streamed.apply
    for unit in around:
        run = partial(unit, run)
    return run(x_SD, layer, documents, _slices(len(x_SD), pieces), moves)


def _attend(layer: DecoderLayer, x_SD: Tensor, documents: Documents) -> Tensor:
    """Add what attention returns."""
    return x_SD + layer.self_attn(layer.input_layernorm(x_SD), documents)


def _feed(layer: DecoderLayer, x_SD: Tensor, documents: Documents) -> Tensor:
    """Add what the feed-forward network returns."""
    return layer.feed(x_SD, layer.post_attention_layernorm(x_SD), documents)


class _Streamed(torch.autograd.Function):
    """A layer, of whose first pass the input [S, D] is kept, and the routing of each piece."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        layer: DecoderLayer,
        documents: Documents,
        parts: list[slice],
        moves: tuple[Callable[[Any], Any], ...],
    ) -> Tensor:
        attended_SD = _attend(layer, x_SD, documents)
        kept: list[dict[str, Any]] = [{} for _ in parts]
        if isinstance(layer.mlp, MoE) and layer.mlp.is_balanced():
            frequency_NE = _frequency(layer, attended_SD, documents, parts)
            kept = [{"frequency": frequency_NE} for _ in parts]
        y_SD = torch.empty_like(attended_SD)
        for part, routing in zip(parts, kept, strict=True):
            with Pass(ROUTING, routing, False, *moves[:1]):
                y_SD[part] = _feed(layer, attended_SD[part], documents.part(part))
        ctx.save_for_backward(x_SD)
        ctx.layer, ctx.documents, ctx.moves = layer, documents, moves
        ctx.pieces = list(zip(parts, kept, strict=True))
        return y_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None, None]:
        layer, documents = ctx.layer, ctx.documents
        x_SD = ctx.saved_tensors[0].detach().requires_grad_()
        # Attention and the norm of what it returns come first; their backward passes last. The norm
        # is not cut, so that the gradient of its weight is rounded once.
        with torch.enable_grad():
            attended_SD = _attend(layer, x_SD, documents)
            between_SD = attended_SD.detach().requires_grad_()
            normed_SD = layer.post_attention_layernorm(between_SD)
        grad_normed_SD = normed_SD.detach()  # a piece makes way for its gradient
        sums = _Sums(layer.mlp)
        for part, routing in ctx.pieces:
            piece_SD = grad_normed_SD[part].requires_grad_()
            with torch.enable_grad(), Pass(ROUTING, routing, True, *ctx.moves[1:]):
                y_SD = layer.feed(attended_SD.detach()[part], piece_SD, documents.part(part))
            torch.autograd.backward(y_SD, grad_SD[part])
            grad_normed_SD[part] = piece_SD.grad
            sums.take()
        sums.give()
        torch.autograd.backward(normed_SD, grad_normed_SD)
        del normed_SD, grad_normed_SD, piece_SD, y_SD
        torch.autograd.backward(attended_SD, between_SD.grad.add_(grad_SD))
        return x_SD.grad, None, None, None, None


def _frequency(
    layer: DecoderLayer, attended_SD: Tensor, documents: Documents, parts: list[slice]
) -> Tensor:
    """Return how often documents choose each expert, for the balance loss: that of a piece needs
    the choices of all.
    """
    choose, _ = layer.mlp.parts
    chosen = []
    for part in parts:
        normed_SD = layer.post_attention_layernorm(attended_SD[part])
        chosen.append(choose(normed_SD).experts_SK)
    return layer.mlp.frequency(torch.cat(chosen), documents)


class _Sums:
    """Gradients of several backward passes, added up in fp32 where they are of a lower precision:
    rounded once, as that of one pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.dtype != torch.float32]
        self.sums: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}  # a gradient, and the sum

    def take(self) -> None:
        """Add what a backward pass has left."""
        for parameter in self.parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                _, before = self.sums.get(parameter, (None, 0))
                self.sums[parameter] = gradient, local(gradient).float() + before

    def give(self) -> None:
        """Let parameters have the sums."""
        for parameter, (gradient, total) in self.sums.items():
            local(gradient).copy_(total)
            parameter.grad = gradient
