"""Attention over packed documents: multi-head latent attention (MLA, DeepSeek-V2/V3) and
grouped-query attention.

Three interchangeable implementations of the attention itself; each sees a document alone and
returns zero for padding:

    sdpa      one F.scaled_dot_product_attention per document: CPU path and reference
    varlen    torch.nn.attention.varlen (flash attention: FA3 where it is, else FA2), CUDA only, no
              host synchronisation
    flex      torch.nn.attention.flex_attention with a document-causal block mask, compiled on CUDA;
              the mask is made from a T x T comparison per microbatch, so this one is for comparing,
              not for long rows

Where several query heads share a key/value head, the kernels read it as often as it is needed: it
is not copied.

A layer may look through a window, in which a token sees itself and the window - 1 tokens before it,
and its heads may have sinks: learned scores that take part in a softmax and bring no value. All
implementations compute both.

Shape suffixes: T tokens, of which S are on this rank outside of the attention and C on its tensor
group (models/decoder.py), D width, H query heads and G key/value heads (of this rank), d entries of
a head, N documents, P rope pairs. MLA's head dims: `nope` entries without and `rope` with position
make a query or key; values have their own dim, smaller than that.
"""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from torchsft.config import InputError
from torchsft.models.decoder import Layout, Linear, RMSNorm, local
from torchsft.models.rope import Rope, latent_keys, rotate, softmax_scale
from torchsft.ops.repetition import keeping_attention
from torchsft.ops.sinks import varlen_with_sinks, with_sinks

Implementation = Literal["sdpa", "varlen", "flex"]
# made when it is first called, and once
_compiled_flex = functools.cache(lambda: torch.compile(flex_attention))


def choose_implementation(
    name: Implementation | Literal["auto"], device: torch.device, dtype: torch.dtype
) -> Implementation:
    """Resolve `auto`: varlen on CUDA below fp32, sdpa elsewhere.

    Raises:
        InputError: the implementation cannot compute there.
    """
    # on the meta device too, which stands for a GPU (planning/simulation.py)
    flash = device.type != "cpu" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return "varlen" if flash else "sdpa"
    if name == "varlen" and not flash:
        fault = (
            f"--model.attention varlen needs bf16 on a CUDA device, not {str(dtype)[6:]} on "
            f"{device.type}; use sdpa or auto"
        )
        raise InputError(fault)
    if name == "flex" and device.type == "cpu" and torch.is_grad_enabled():
        raise InputError("--model.attention flex has no backward pass on CPU; use sdpa or auto")
    return name


@functools.cache
def flash_kernel(device: torch.device) -> str:
    """Return which flash attention `varlen` runs on a device: FA3 on Hopper where its package
    flash_attn_interface is installed, which from then on is torch's; else FA2, which torch has.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    is_there = "FA3" in list_flash_attention_impls()
    if is_hopper and is_there and importlib.util.find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")
    return current_flash_attention_impl() or "FA2"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a microbatch lie, prepared once for all layers.

    Not a pytree on purpose: FSDP's mixed precision casts the floating tensors it finds in a layer's
    arguments, and cos and sin must stay fp32.
    """

    implementation: Implementation
    cos_TP: Tensor  # fp32
    sin_TP: Tensor  # fp32
    valid_T: Tensor  # bool, False for padding
    layout: Layout  # which of the tokens are here, outside of the attention
    valid_S: Tensor  # bool
    document_T: Tensor  # int64, number of the token's document; N for padding
    document_S: Tensor
    length_N1: Tensor  # int32, tokens of each document, then of the padding
    longest: int  # tokens of the longest document
    lengths: tuple[int, ...] | None = None  # sdpa: tokens of each document, then of the padding
    cu_seqlens: Tensor | None = None  # varlen: int32, padding cut into documents of its own
    max_seqlen: int = 0  # varlen: longest of these
    # flex: for each window of a layer (None: without), which tokens see which
    block_masks: Mapping[int | None, BlockMask] | None = None
    # sdpa: for windows shorter than the longest document, bool [blocks, 1, window, 2 * window]:
    # which tokens of a block see which of the block before and of their own
    near: Mapping[int, Tensor] | None = None

    def part(self, tokens: slice) -> "Documents":
        """Return the same for what follows the attention, of some of this rank's tokens alone."""
        return dataclasses.replace(
            self, valid_S=self.valid_S[tokens], document_S=self.document_S[tokens]
        )

    def shortened(self, valid_S: Tensor, tokens: int) -> "Documents":
        """Return the same for what follows the attention: of this rank's tokens `valid_S` alone,
        and documents that have `tokens` fewer.
        """
        return dataclasses.replace(
            self,
            valid_S=valid_S,
            document_S=torch.where(valid_S, self.document_S, len(self.length_N1) - 1),
            length_N1=self.length_N1 - tokens,
        )


def locate_documents(
    implementation: Implementation,
    cos_TP: Tensor,  # rotary factors of every token, fp32
    sin_TP: Tensor,
    cu_seqlens: Tensor,  # integers [N + 1], from 0; tokens from cu_seqlens[-1] to T are padding
    # longest document; None reads it from cu_seqlens, which stops the host
    max_seqlen: int | None,
    layout: Layout | None = None,  # of the T tokens; None: all are here
    windows: Collection[int | None] = (None,),  # those that layers look through; None: without one
    padding: int | None = None,  # tokens of padding; None: any number up to T
) -> Documents:
    """Prepare `Documents` for the implementation that will read it."""
    layout = layout or Layout()
    tokens, device = cos_TP.shape[0], cos_TP.device
    cu_seqlens = cu_seqlens.to(torch.int32)
    place_T = torch.arange(tokens, device=device, dtype=torch.int32)
    valid_T = place_T < cu_seqlens[-1]
    document_T = torch.searchsorted(cu_seqlens[1:].contiguous(), place_T, right=True)
    length_N1 = F.pad(cu_seqlens, (0, 1), value=tokens).diff()
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    located = functools.partial(
        Documents,
        implementation,
        cos_TP,
        sin_TP,
        valid_T,
        layout,
        layout.tokens(valid_T),
        document_T,
        layout.tokens(document_T),
        length_N1,
        max_seqlen,
    )
    if implementation == "sdpa":
        lengths = tuple(length_N1.tolist())
        shorter = {window for window in windows if window is not None and window < max_seqlen}
        near = {window: _near(document_T, window) for window in shorter}
        return located(lengths=lengths, near=near)
    if implementation == "varlen":
        # Kernels leave rows beyond the last document uninitialised, in gradients too. So padding
        # becomes documents, of at most max_seqlen tokens each; how many are needed is known, or
        # bounded without asking the device. (FA2's backward pass allocates 128 rows of fp32 for
        # each document, an empty one too.)
        longest = max_seqlen or tokens
        pieces = -(-(tokens if padding is None else padding) // longest)
        numbers = torch.arange(1, pieces + 1, device=device, dtype=torch.int32)
        ends = (cu_seqlens[-1] + numbers * longest).clamp(max=tokens)
        return located(cu_seqlens=torch.cat([cu_seqlens, ends]), max_seqlen=longest)

    def block_mask(window: int | None) -> BlockMask:
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (query >= key) & (document_T[query] == document_T[key])
            return seen if window is None else seen & (query - key < window)

        return create_block_mask(visible, None, None, tokens, tokens, device=str(device))

    return located(block_masks={window: block_mask(window) for window in windows})


def _near(document_T: Tensor, window: int) -> Tensor:
    """Return `Documents.near` of one window."""
    tokens, device = document_T.shape[0], document_T.device
    blocks = -(-tokens // window)
    padding = blocks * window - tokens
    own = torch.cat([document_T, document_T[-1:].expand(padding)]).unflatten(0, (blocks, window))
    before = torch.cat([torch.full_like(own[:1], -1), own[:-1]])
    same = own.unsqueeze(2) == torch.cat([before, own], dim=1).unsqueeze(1)
    # tokens between a token of a block and one of both
    place = torch.arange(window, device=device)
    distance = window + place.unsqueeze(1) - torch.arange(2 * window, device=device)
    return (same & (distance >= 0) & (distance < window)).unsqueeze(1)


def attend(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    scale: float,
    documents: Documents,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    seen_TT: Tensor | None = None,
) -> Tensor:
    """Causal attention within documents, by the implementation that these are prepared for.

    Args:
        q_THd: H query heads; a multiple of G, of which neighbours share a key/value head.
        k_TGd: G key heads, as wide as the query heads.
        v_TGd: G value heads, which may be narrower: [T, G, v].
        scale: factor of the scores.
        documents: prepared for this window.
        window: how many tokens a token sees, itself and those before it; None: all of them.
        sinks_H: of each head, the score of a key that all tokens see and whose value is 0; None:
            there is none.
        seen_TT: bool, which tokens (columns) a token sees, itself or another one among them, if
            these are not all of its document up to it; comes without window and sinks.

    Returns:
        [T, H, v], zero for padding.
    """
    arguments = q_THd, k_TGd, v_TGd, scale, documents
    with keeping_attention():
        if seen_TT is not None:
            out_THd = _selected(*arguments, seen_TT)
        elif documents.implementation == "sdpa":
            return _sdpa(*arguments, window, sinks_H)
        else:
            compute = _varlen if documents.implementation == "varlen" else _flex
            out_THd = compute(*arguments, window, sinks_H)
    return _of_documents(out_THd, v_TGd.shape[-1], documents)


def _of_documents(out_THd: Tensor, v_dim: int, documents: Documents) -> Tensor:
    """Of heads padded to the width of queries, those of values; zero for padding."""
    return torch.where(documents.valid_T[:, None, None], out_THd[..., :v_dim], 0)


def _as_wide_as(q_THd: Tensor, v_TGd: Tensor) -> Tensor:
    """Values, padded with zeros to the width of queries."""
    missing = q_THd.shape[-1] - v_TGd.shape[-1]
    return F.pad(v_TGd, (0, missing)) if missing else v_TGd


def _varlen(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    scale: float,
    where: Documents,
    window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # registers CUDA operators on import

    options = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if q_THd.shape[1] != k_TGd.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11 says nothing of fewer key/value heads than query heads
            copies = q_THd.shape[1] // k_TGd.shape[1]
            k_TGd, v_TGd = (x.repeat_interleave(copies, dim=1) for x in (k_TGd, v_TGd))
    # Values are to be as wide as queries, except that FA3 has kernels for these widths, MLA's.
    has_kernel = 128 < q_THd.shape[-1] <= 192 and 96 < v_TGd.shape[-1] <= 128
    if flash_kernel(q_THd.device) != "FA3" or not has_kernel:
        v_TGd = _as_wide_as(q_THd, v_TGd)
    bounds, longest = where.cu_seqlens, where.max_seqlen
    if sinks_H is not None:
        return varlen_with_sinks(q_THd, k_TGd, v_TGd, sinks_H, bounds, longest, options)
    return varlen_attn(q_THd, k_TGd, v_TGd, bounds, bounds, longest, longest, **options)


def _flex(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    scale: float,
    where: Documents,
    window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    attention = _compiled_flex() if q_THd.is_cuda else flex_attention
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_TGd, v_TGd))
    mask, grouped = where.block_masks[window], q.shape[1] != k.shape[1]
    attention = functools.partial(
        attention, q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped
    )
    if sinks_H is None:
        return attention().squeeze(0).transpose(0, 1)
    out, found = attention(return_aux=AuxRequest(lse=True))
    return with_sinks(out.squeeze(0).transpose(0, 1), found.lse.squeeze(0).T, sinks_H)


def _sdpa(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    scale: float,
    where: Documents,
    window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    v_dim = v_TGd.shape[-1]
    sink_1Gd = None
    if sinks_H is not None:
        # A sink becomes a key, with an entry of its own: there queries have the sink, and this key
        # alone something other than 0. The kernel need not know of it.
        own_entry = sinks_H.to(q_THd.dtype).view(1, -1, 1).expand(len(q_THd), -1, 1)
        q_THd, k_TGd = torch.cat([q_THd, own_entry], dim=-1), F.pad(k_TGd, (0, 1))
        sink_1Gd = torch.zeros_like(k_TGd[:1])
        sink_1Gd[..., -1] = 1 / scale
    # With v narrower than q and k torch falls back from flash attention to full T x T scores (2.5
    # times slower at 1024 tokens and heads of 48 / 32, and all its memory), so v is padded.
    v_TGd = _as_wide_as(q_THd, v_TGd)
    if window is not None and window < max(where.lengths[:-1], default=0):
        out_THd = _sdpa_in_blocks(q_THd, k_TGd, v_TGd, scale, where.near[window], sink_1Gd)
        return _of_documents(out_THd, v_dim, where)
    grouped = q_THd.shape[1] != k_TGd.shape[1]
    # split, not slices: the backward pass of N slices writes N full-size gradients.
    *documents, padding = zip(*(x.split(where.lengths) for x in (q_THd, k_TGd, v_TGd)), strict=True)
    outputs = []
    for q, k, v in documents:
        if sink_1Gd is not None:  # a first token, whose output is dropped
            q, v = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (q, v))
            k = torch.cat([sink_1Gd, k])
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
        out = out.squeeze(0).transpose(0, 1)[..., :v_dim]
        outputs.append(out if sink_1Gd is None else out[1:])
    # Zero, but connected to q, k and v: in a microbatch without documents too every parameter must
    # get a gradient, or FSDP's ranks would reduce different sets of them (gloo aborts, NCCL would
    # hang).
    connected = sum(x[:, :1, -v_dim:] for x in padding)
    zeros = torch.where(torch.zeros_like(connected, dtype=torch.bool), connected, 0)
    outputs.append(zeros.expand(-1, q_THd.shape[1], -1))
    return torch.cat(outputs)


def _sdpa_in_blocks(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    scale: float,
    near: Tensor,  # see `Documents`
    sink_1Gd: Tensor | None,  # a key that all tokens see, whose value is 0
) -> Tensor:
    """Attention through a window: each block of `window` tokens sees the one before and itself, so
    that time and memory grow with T, not with the square of a document's length.
    """
    tokens, (blocks, _, window, _) = len(q_THd), near.shape
    padding = blocks * window - tokens
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(0, (blocks, window))
        for x in (q_THd, k_TGd, v_TGd)
    )
    k, v = (torch.cat([F.pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], dim=1) for x in (k, v))
    if sink_1Gd is not None:
        k = torch.cat([sink_1Gd.expand(blocks, 1, -1, -1), k], dim=1)
        v = F.pad(v, (0, 0, 0, 0, 1, 0))
        near = F.pad(near, (1, 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=near, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)[:tokens]


def _selected(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, scale: float, where: Documents, seen_TT: Tensor
) -> Tensor:
    """Attention of all tokens to those that they see: by flex, or masked scores where documents are
    prepared for sdpa.
    """
    v_THd = _as_wide_as(q_THd, v_THd)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_THd, v_THd))
    if where.implementation == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TT, scale=scale)
        return out.squeeze(0).transpose(0, 1)
    tokens = len(seen_TT)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen_TT[query, key]

    mask = create_block_mask(visible, None, None, tokens, tokens, device=str(seen_TT.device))
    attention = _compiled_flex() if q.is_cuda else flex_attention
    return attention(q, k, v, block_mask=mask, scale=scale).squeeze(0).transpose(0, 1)


class Indexer(Protocol):
    """What chooses the tokens that a token sees in long documents; a module."""

    top_k: int  # tokens that a token sees at most

    def __call__(self, x_SD: Tensor, q_TR: Tensor, documents: "Documents") -> Tensor:
        """Choose by hidden states [S, D] and query latents [T, R]: bool [T, T], in which every
        token sees at least one.
        """


class LatentAttention(nn.Module):
    """MLA: queries (through a low-rank latent, or directly) and keys/values from one latent shared
    by all heads.

    With an `indexer`, tokens of documents that are longer than its top_k see a choice of tokens.

    Between ranks travel the latents, not keys and values: each rank then computes its heads for all
    tokens, so that causal and packed work is balanced whatever the documents.
    """

    regions = ("latents", "expand")  # see models/decoder.py
    # by_heads(compute, heads, *inputs) returns what compute(None, *inputs) does, that is, of all of
    # this rank's heads [T, heads, v]; compute(slice, *inputs) is of some.
    by_heads: Callable[..., Tensor] = staticmethod(
        lambda compute, heads, *inputs: compute(None, *inputs)
    )

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        q_rank: int | None,  # width of the query latent; None projects queries directly
        kv_rank: int,  # width of the key/value latent
        nope_dim: int,  # entries of a head's query and key without position
        v_dim: int,  # entries of a head's value; at most nope_dim + rope.dim
        rope: Rope,  # rotary embedding of the other entries of queries and keys
        # whether the projections from and to width D have biases (not a direct query projection)
        bias: bool,
        # of the latents' norms (DeepSeek and transformers use 1e-6, whatever rms_norm_eps)
        latent_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.indexer: Indexer | None = None
        self.q_rank, self.kv_rank = q_rank, kv_rank
        self.nope_dim, self.v_dim = nope_dim, v_dim
        self.rope = rope
        self.qk_dim = nope_dim + rope.dim
        self.scale = softmax_scale(rope, self.qk_dim)
        if q_rank is None:
            self.q_proj = Linear(width, heads * self.qk_dim, bias=False)
        else:
            self.q_a_proj = Linear(width, q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, latent_eps)
            self.q_b_proj = Linear(q_rank, heads * self.qk_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, kv_rank + rope.dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_rank, latent_eps)
        self.kv_b_proj = Linear(kv_rank, heads * (nope_dim + v_dim), bias=False)
        self.o_proj = Linear(heads * v_dim, width, bias=bias)

    def use_heads(self, first: int, count: int) -> None:
        """Compute some of the heads only, of those whose weights are here; what they return is put
        together elsewhere.
        """
        queries = self.q_proj if self.q_rank is None else self.q_b_proj
        for linear, width in ((queries, self.qk_dim), (self.kv_b_proj, self.nope_dim + self.v_dim)):
            linear.rows = slice(first * width, (first + count) * width)

    def forward(self, x_SD: Tensor, documents: Documents) -> Tensor:
        """x_SD (normed) to the attention block's output, both [S, D]; with bias, padding gets the
        bias alone.
        """
        layout = documents.layout
        q, latent, k_rope = layout.gather(*self.latents(x_SD))
        seen_TT = None
        if self.indexer is not None and documents.longest > self.indexer.top_k:
            seen_TT = self.indexer(x_SD, q, documents)
        heads = self.kv_b_proj.outputs() // (self.nope_dim + self.v_dim)
        compute = functools.partial(self.attend, documents, seen_TT)
        out_THd = self.by_heads(compute, heads, q, latent, k_rope)
        return self.o_proj(layout.heads_to_tokens(out_THd).flatten(1))

    def latents(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_SD (normed) to what queries are projected from, the latent of keys and values, normed,
        and keys with position, which are not yet rotated.
        """
        q = x_SD if self.q_rank is None else self.q_a_layernorm(self.q_a_proj(x_SD))
        latent_and_rope = self.kv_a_proj_with_mqa(x_SD)
        latent, k_rope = latent_and_rope.split([self.kv_rank, self.rope.dim], dim=-1)
        return q, self.kv_a_layernorm(latent), k_rope

    def attend(
        self,
        documents: Documents,
        seen_TT: Tensor | None,  # see `attend`
        heads: slice | None,  # of those of this rank; None: all
        q: Tensor,  # query latents, or what queries are projected from, [T, R]
        latent: Tensor,  # [T, kv_rank]
        k_rope: Tensor,  # [T, rope]
    ) -> Tensor:
        """Return what some heads see, [T, heads, v]."""
        tables = documents.cos_TP, documents.sin_TP
        q_THd, k_THd, v_THd = self.expand(heads, q, latent, k_rope, *tables)
        return attend(q_THd, k_THd, v_THd, self.scale, documents, seen_TT=seen_TT)

    def expand(
        self,
        heads: slice | None,
        q: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cos_TP: Tensor,
        sin_TP: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of some heads, by the arguments of `attend`."""
        turn = cos_TP, sin_TP, self.rope.pairing
        q_proj = self.q_proj if self.q_rank is None else self.q_b_proj
        q_THd, kv_THd = (
            linear(x, heads and slice(heads.start * width, heads.stop * width)).unflatten(
                -1, (-1, width)
            )
            for linear, x, width in (
                (q_proj, q, self.qk_dim),
                (self.kv_b_proj, latent, self.nope_dim + self.v_dim),
            )
        )
        k_THd, v_THd = latent_keys(kv_THd, k_rope, *turn, self.nope_dim)
        return rotate(q_THd, *turn), k_THd, v_THd


class GroupedQueryAttention(nn.Module):
    """Attention in which neighbouring query heads share a key/value head; with as many of both it
    is multi-head attention.

    A tensor group splits the heads. Its ranks project its C tokens; where other groups have the
    rest of the row (context parallelism), the heads are exchanged behind norm and rotation.
    """

    regions = ("project",)  # see models/decoder.py

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,  # a divisor of `heads`
        head_dim: int,
        # rotary embedding of rope.dim <= head_dim entries of queries and keys; None: without
        rope: Rope | None,
        bias: bool = False,  # of the projections of queries, keys and values
        output_bias: bool = False,
        qk_norm_eps: float | None = None,  # of the norms of queries and keys; None: without
        norm_heads_together: bool = False,  # all queries of a token at once, and all keys
        window: int | None = None,  # how many tokens a token sees, itself the last; None: all
        sinks: bool = False,  # whether heads have learned scores beside those of tokens
    ) -> None:
        super().__init__()
        self.head_dim, self.rope, self.window = head_dim, rope, window
        self.scale = head_dim**-0.5
        self.q_proj = Linear(width, heads * head_dim, bias=bias)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(heads * head_dim, width, bias=output_bias)
        self.q_norm = self.k_norm = None
        self.norm_heads_together = norm_heads_together
        if qk_norm_eps is not None:
            at_once = (heads, kv_heads) if norm_heads_together else (1, 1)
            self.q_norm, self.k_norm = (RMSNorm(n * head_dim, qk_norm_eps) for n in at_once)
        self.sinks = nn.Parameter(torch.empty(heads)) if sinks else None

    def forward(self, x_SD: Tensor, documents: Documents) -> Tensor:
        """x_SD (normed) to the attention block's output, both [S, D]; with biases, padding gets
        that of the output alone.
        """
        layout = documents.layout
        tables = layout.context(documents.cos_TP), layout.context(documents.sin_TP)
        heads = self.project(layout.gather_tensor(x_SD), *tables)
        q_THd, k_TGd, v_TGd = layout.tokens_to_heads(*heads)
        sinks_H = None if self.sinks is None else layout.heads(local(self.sinks))
        out_THd = attend(q_THd, k_TGd, v_TGd, self.scale, documents, self.window, sinks_H)
        return self.o_proj(layout.heads_to_tokens(out_THd).flatten(1))

    def project(
        self, x_CD: Tensor, cos_CP: Tensor, sin_CP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_CD (normed) to queries [C, H, d], keys and values [C, G, d], normed and rotated."""
        q, k, v = self.q_proj(x_CD), self.k_proj(x_CD), self.v_proj(x_CD)
        if self.norm_heads_together:
            q, k = self.q_norm(q), self.k_norm(k)
        q_CHd, k_CGd, v_CGd = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        if self.q_norm is not None and not self.norm_heads_together:
            q_CHd, k_CGd = self.q_norm(q_CHd), self.k_norm(k_CGd)
        if self.rope is not None:
            q_CHd = rotate(q_CHd, cos_CP, sin_CP, self.rope.pairing, self.rope.place)
            k_CGd = rotate(k_CGd, cos_CP, sin_CP, self.rope.pairing, self.rope.place)
        return q_CHd, k_CGd, v_CGd


Attention = LatentAttention | GroupedQueryAttention
