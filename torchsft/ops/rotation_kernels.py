"""Triton kernels of the rotation of heads, and of latent attention's keys. Their plain twins are in
models/rope.py, which calls them:

    rotate          2P entries of each head turned, N others as they are
    keys            k = N entries of each head, then 2P that all heads have in common, turned
    keys_backward   gradients of both, and of values, which lie behind the N entries of each head

All of it is computed in fp32 and rounded once; sums over heads too.

Shape suffixes: T tokens, H heads, P pairs, w = N + v entries of a head before the attention, d = N
+ 2P of a key.
"""

# ruff: noqa: ANN001 (Triton's arguments have no Python types; sizes are capitals)

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # of a program at a time


@triton.jit
def _columns(place, first, count: tl.constexpr, block: tl.constexpr):
    """Return where `count` columns of rows lie, [rows, block], and which of the block they are.

    Args:
        place: where the rows begin, pointers [rows].
        first: column.
        count: of columns.
        block: a power of two that is not smaller.
    """
    column = tl.arange(0, block)
    return place[:, None] + first + column[None, :], (column < count)[None, :]


@triton.jit
def _copy(source, target, row_inside, count: tl.constexpr, block: tl.constexpr):
    """Copy the first columns of rows.

    Args:
        source: where the rows begin, pointers [rows].
        target: likewise.
        row_inside: bool [rows].
        count: of columns, which may be 0.
        block: a power of two that is not smaller.
    """
    if count > 0:
        place, inside = _columns(source, 0, count, block)
        inside = inside & row_inside[:, None]
        values = tl.load(place, mask=inside, other=0.0)
        place, _ = _columns(target, 0, count, block)
        tl.store(place, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(place, row_inside, P: tl.constexpr, neighbours: tl.constexpr, block: tl.constexpr):
    """Return where the pairs of rows lie, [rows, block, 2], and which of these there are.

    Args:
        place: where the 2P entries of rows begin, pointers [rows].
        row_inside: bool [rows].
        P: pairs of a row.
        neighbours: whether pairs are neighbours, or in the two halves.
        block: a power of two that is not smaller than P.
    """
    pair, which = tl.arange(0, block)[:, None], tl.arange(0, 2)[None, :]
    column = 2 * pair + which if neighbours else pair + P * which
    inside = row_inside[:, None, None] & (pair < P)[None, :, :]
    return place[:, None, None] + column[None, :, :], inside


@triton.jit
def _turn(pairs, cos, sin, token, back: tl.constexpr, P: tl.constexpr, block: tl.constexpr):
    """Return pairs of a token, turned.

    Args:
        pairs: fp32 [rows, block, 2].
        cos: fp32 [T, P], in memory.
        sin: likewise.
        token: whose angles are taken.
        back: turn by the opposite angle.
        P: pairs of a row.
        block: a power of two that is not smaller.
    """
    pair = tl.arange(0, block)
    c = tl.load(cos + token * P + pair, mask=pair < P, other=0.0)[None, :]
    s = tl.load(sin + token * P + pair, mask=pair < P, other=0.0)[None, :]
    if back:
        s = -s
    a, b = tl.split(pairs)
    return tl.join(a * c - b * s, b * c + a * s)


@triton.jit
def _rotate_kernel(
    x,
    y,
    cos,
    sin,
    H,
    stride_t,
    stride_h,
    N: tl.constexpr,
    P: tl.constexpr,
    neighbours: tl.constexpr,
    at_end: tl.constexpr,
    back: tl.constexpr,
    heads: tl.constexpr,
    n_block: tl.constexpr,
    p_block: tl.constexpr,
):
    """Rotate some heads of a token; see `rotate`.

    x is [T, H, N + 2P] of the strides given, y likewise and contiguous, cos and sin fp32 [T, P].
    Program (t, n) has the n-th heads of token t.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    here = head < H
    x_head = x + token * stride_t + head * stride_h
    y_head = y + (token * H + head) * (N + 2 * P)
    others = 0 if at_end else 2 * P
    turned = N if at_end else 0
    _copy(x_head + others, y_head + others, here, N, n_block)
    place, inside = _pairs(x_head + turned, here, P, neighbours, p_block)
    pairs = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    pairs = _turn(pairs, cos, sin, token, back, P, p_block)
    place, _ = _pairs(y_head + turned, here, P, neighbours, p_block)
    tl.store(place, pairs.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _keys_kernel(
    kv,
    k_rope,
    k,
    cos,
    sin,
    H,
    width,
    N: tl.constexpr,
    P: tl.constexpr,
    neighbours: tl.constexpr,
    heads: tl.constexpr,
    n_block: tl.constexpr,
    p_block: tl.constexpr,
):
    """Make some heads of a token's key; see `keys`.

    kv is [T, H, width], k_rope [T, 2P], k [T, H, N + 2P], cos and sin fp32 [T, P].
    Program (t, n) has the n-th heads of token t.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    here = head < H
    k_head = k + (token * H + head) * (N + 2 * P)
    _copy(kv + (token * H + head) * width, k_head, here, N, n_block)
    common = k_rope + token * 2 * P + tl.zeros_like(head)  # the same for each head
    place, inside = _pairs(common, here, P, neighbours, p_block)
    pairs = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    pairs = _turn(pairs, cos, sin, token, False, P, p_block)
    place, _ = _pairs(k_head + N, here, P, neighbours, p_block)
    tl.store(place, pairs.to(k.dtype.element_ty), mask=inside)


@triton.jit
def _keys_backward_kernel(
    grad_k,
    grad_v,
    grad_kv,
    grad_rope,
    cos,
    sin,
    H,
    N: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    neighbours: tl.constexpr,
    heads: tl.constexpr,
    n_block: tl.constexpr,
    v_block: tl.constexpr,
    p_block: tl.constexpr,
):
    """Go back through all heads of a token's key and value; see `keys_backward`.

    grad_k is [T, H, N + 2P], grad_v [T, H, V], grad_kv [T, H, N + V], grad_rope [T, 2P]. Program t
    has token t.
    """
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros((p_block, 2), tl.float32)
    for first in range(0, H, heads):
        head = first + tl.arange(0, heads)
        here = head < H
        k_head = grad_k + (token * H + head) * (N + 2 * P)
        kv_head = grad_kv + (token * H + head) * (N + V)
        _copy(k_head, kv_head, here, N, n_block)
        _copy(grad_v + (token * H + head) * V, kv_head + N, here, V, v_block)
        place, inside = _pairs(k_head + N, here, P, neighbours, p_block)
        pairs = tl.load(place, mask=inside, other=0.0)
        total += tl.sum(pairs.to(tl.float32), 0)
    turned = _turn(total[None, :, :], cos, sin, token, True, P, p_block)
    one = tl.arange(0, 1)
    place, inside = _pairs(grad_rope + token * 2 * P + one, one < 1, P, neighbours, p_block)
    tl.store(place, turned.to(grad_rope.dtype.element_ty), mask=inside)


def _blocks(H: int, **sizes: int) -> dict[str, int]:
    """Return how many heads, and which powers of two of columns, a program has at a time."""
    heads = {"heads": min(HEADS, triton.next_power_of_2(H))}
    return heads | {f"{name}_block": triton.next_power_of_2(n or 1) for name, n in sizes.items()}


# With fused multiplications and additions the twins' last bits are not reached.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}


def rotate(
    x: Tensor, cos_TP: Tensor, sin_TP: Tensor, *, neighbours: bool, at_end: bool, back: bool
) -> Tensor:
    """Rotate 2P entries of every head.

    Args:
        x: [T, ..., N + 2P].
        cos_TP: fp32, contiguous.
        sin_TP: likewise.
        neighbours: whether pairs are neighbours, or in the two halves.
        at_end: whether the 2P entries are the last of a head, or the first.
        back: by the opposite angle.

    Returns:
        Contiguous, of the shape and dtype of x.
    """
    tokens, pairs = cos_TP.shape
    x_THd = x.reshape(tokens, -1, x.shape[-1])
    if x_THd.stride(2) != 1:
        x_THd = x_THd.contiguous()
    y_THd = x.new_empty(x_THd.shape)
    _, heads, width = x_THd.shape
    others = width - 2 * pairs
    blocks = _blocks(heads, n=others, p=pairs)
    grid = tokens, triton.cdiv(heads, blocks["heads"])
    strides = x_THd.stride()[:2]
    how = neighbours, at_end, back
    tensors = x_THd, y_THd, cos_TP, sin_TP
    _rotate_kernel[grid](*tensors, heads, *strides, others, pairs, *how, **blocks, **LAUNCH)
    return y_THd.view(x.shape)


def keys(
    kv_THw: Tensor, k_rope: Tensor, cos_TP: Tensor, sin_TP: Tensor, others: int, neighbours: bool
) -> Tensor:
    """Make the keys.

    Args:
        kv_THw: contiguous; the first entries of each head are those of its key.
        k_rope: [T, 2P], contiguous.
        cos_TP: fp32, contiguous.
        sin_TP: likewise.
        others: N.
        neighbours: whether pairs are neighbours, or in the two halves.

    Returns:
        k_THd.
    """
    tokens, heads, width = kv_THw.shape
    pairs = cos_TP.shape[1]
    k_THd = kv_THw.new_empty(tokens, heads, others + 2 * pairs)
    blocks = _blocks(heads, n=others, p=pairs)
    grid = tokens, triton.cdiv(heads, blocks["heads"])
    sizes = heads, width, others, pairs, neighbours
    _keys_kernel[grid](kv_THw, k_rope, k_THd, cos_TP, sin_TP, *sizes, **blocks, **LAUNCH)
    return k_THd


def keys_backward(
    grad_k_THd: Tensor, grad_v_THv: Tensor, cos_TP: Tensor, sin_TP: Tensor, neighbours: bool
) -> tuple[Tensor, Tensor]:
    """Go back from contiguous gradients of keys and values.

    Returns:
        The gradients of kv_THw and of k_rope.
    """
    tokens, heads, width = grad_k_THd.shape
    pairs, values = cos_TP.shape[1], grad_v_THv.shape[2]
    others = width - 2 * pairs
    grad_kv_THw = grad_k_THd.new_empty(tokens, heads, others + values)
    grad_rope = grad_k_THd.new_empty(tokens, 2 * pairs)
    blocks = _blocks(heads, n=others, v=values, p=pairs)
    tensors = grad_k_THd, grad_v_THv, grad_kv_THw, grad_rope, cos_TP, sin_TP
    sizes = heads, others, values, pairs, neighbours
    _keys_backward_kernel[(tokens,)](*tensors, *sizes, **blocks, **LAUNCH)
    return grad_kv_THw, grad_rope
