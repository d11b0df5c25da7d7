"""Rotary position embedding: frequencies (plain, YaRN and Llama 3's) and the rotation.

Families differ in which entries of a head are rotated together (`Pairing`), and in whether those
without position stand before or behind them (`Place`):

    neighbours    (x0, x1), (x2, x3), ...                 DeepSeek
    halves        (x0, xP), (x1, xP+1), ...               Llama, Qwen, gpt-oss

Kernels of `rotate` and `latent_keys` are in ops/rotation_kernels.py.

Shape suffixes: T tokens, P = rope dim / 2 pairs; H heads, w entries of a head before the attention,
d of its key, v of its value.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchsft.models.decoder import Float32Buffers
from torchsft.ops import kernels, plain

Pairing = Literal["neighbours", "halves"]
# Where the rotated entries of a head lie, if these are not all of it.
Place = Literal["start", "end"]


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), with DeepSeek's mscale
    fields.
    """

    factor: float  # extended over original context length
    original_context: int  # positions of the original context
    # rotations within the original context above which a frequency stays as it is
    beta_fast: float = 32.0
    beta_slow: float = 1.0  # rotations below which a frequency is divided by factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    # factor of cos and sin; absent: from factor, mscale and mscale_all_dim
    attention_factor: float | None = None
    truncate: bool = True  # round the bounds of the ramp to whole pairs


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Context extension of Llama 3.1 (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.4.2;
    the formula is that of Meta's reference code).
    """

    factor: float  # frequencies that turn less than low_freq_factor times are divided by it
    original_context: int  # positions of the original context
    low_freq_factor: float
    high_freq_factor: float  # rotations above which a frequency stays as it is


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of one model, with at most one way to extend its context."""

    dim: int  # rotated entries of a head; even
    theta: float
    yarn: Yarn | None = None
    llama3: Llama3Scaling | None = None
    pairing: Pairing = "neighbours"
    place: Place = "end"


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def cos_sin_scale(rope: Rope) -> float:
    """Factor of cos and sin: 1 without YaRN. As in transformers, mscale counts only where
    mscale_all_dim is set too.
    """
    yarn = rope.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if not (yarn.mscale and yarn.mscale_all_dim):
        return _mscale(yarn.factor, 1.0)
    of_cos_and_sin = _mscale(yarn.factor, yarn.mscale)
    of_scores = _mscale(yarn.factor, yarn.mscale_all_dim)  # in `softmax_scale` already
    return of_cos_and_sin / of_scores


def softmax_scale(rope: Rope, head_dim: int) -> float:
    """Scale of attention scores: head_dim^-0.5, times mscale_all_dim's factor squared under YaRN
    (DeepSeek-V3).
    """
    scale, yarn = head_dim**-0.5, rope.yarn
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair, fp32 [P].

    Both extensions divide the slow frequencies by `factor`, keep the fast ones and blend in
    between: Llama 3 by how often they turn within the original context, YaRN by their number, from
    the pair that turns beta_fast times to the one that turns beta_slow times (sections 3.2 and A.2
    of the paper).
    """
    entries = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device)
    exponents = entries / rope.dim
    inverse = 1 / rope.theta**exponents  # as transformers does, to the bit
    llama3 = rope.llama3
    if llama3 is not None:
        rotations = llama3.original_context * inverse / (2 * math.pi)
        low, high = llama3.low_freq_factor, llama3.high_freq_factor
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return inverse / llama3.factor * (1 - kept) + inverse * kept
    if rope.yarn is not None:
        slow = _slow_pairs(rope, rope.yarn, device)
        return inverse / rope.yarn.factor * slow + inverse * (1 - slow)
    return inverse


def _slow_pairs(rope: Rope, yarn: Yarn, device: torch.device | None) -> Tensor:
    """Return YaRN's ramp, fp32 [P]: 1 where a frequency is divided by `factor`, 0 where it stays,
    and the blend of the two in between.
    """

    def pair_with(rotations: float) -> float:
        positions_a_radian = yarn.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(positions_a_radian) / (2 * math.log(rope.theta))

    begin, end = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    begin = max(begin, 0)
    end = min(end, rope.dim - 1)
    width = end - begin if end != begin else 0.001
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32, device=device)
    return ((pairs - begin) / width).clamp(0, 1)


class RotaryEmbedding(Float32Buffers):
    """Turns positions into cos and sin, in fp32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self.register_buffer("inv_freq", torch.empty(rope.dim // 2), persistent=False)
        self.init_buffers()

    def init_buffers(self) -> None:
        """Compute the frequencies, fp32, on the device of the buffer."""
        self.inv_freq = inverse_frequencies(self.rope, self.inv_freq.device)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each fp32 [T, P], of integer positions [T]."""
        angles_TP = positions_T.unsqueeze(-1).float() * self.inv_freq
        scale = cos_sin_scale(self.rope)
        return angles_TP.cos() * scale, angles_TP.sin() * scale


def rotate(
    x: Tensor,  # [T, ..., N + 2P], any floating dtype, which the result has too
    cos: Tensor,  # fp32 [T, P], broadcast over the dims in between
    sin: Tensor,
    pairing: Pairing = "neighbours",
    place: Place = "end",
) -> Tensor:
    """Rotate 2P entries of every head, pair by pair; the N others stay as they are.

    Computed in fp32. Nothing of size x is saved for the backward pass, which rotates by the
    opposite angle.
    """
    if plain():
        return rotate_reference(x, cos, sin, pairing, place)
    return _Rotate.apply(x, cos, sin, pairing, place)


def rotate_reference(
    x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing = "neighbours", place: Place = "end"
) -> Tensor:
    """`rotate` in plain PyTorch, whose backward pass is autograd's."""
    tokens, pairs = cos.shape
    table_shape = tokens, *[1] * (x.ndim - 2), pairs  # [T, 1, ..., P]
    cos, sin = cos.view(table_shape), sin.view(table_shape)
    first, second, others = _entries(x.shape[-1], 2 * pairs, pairing, place)
    a, b = x[..., first], x[..., second]
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    turned[..., others] = x[..., others]
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned


def _entries(width: int, dim: int, pairing: Pairing, place: Place) -> tuple[slice, slice, slice]:
    """Return where the first and the second entries of the pairs, and those without position, lie
    among the `width` entries of a head.
    """
    start = width - dim if place == "end" else 0
    end = start + dim
    others = slice(0, start) if place == "end" else slice(end, width)
    if pairing == "neighbours":
        return slice(start, end, 2), slice(start + 1, end, 2), others
    middle = start + dim // 2
    return slice(start, middle), slice(middle, end), others


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing, place: Place
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = pairing, place
        return _turned(x, cos, sin, pairing, place, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_x = _turned(grad, *ctx.saved_tensors, *ctx.how, back=True)
        return grad_x, None, None, None, None


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing, place: Place, *, back: bool
) -> Tensor:
    """Rotate without a gradient, by the angles or, back, by the opposite ones."""
    if not kernels(x):
        return rotate_reference(x, cos, -sin if back else sin, pairing, place)
    from torchsft.ops import rotation_kernels

    how = {"neighbours": pairing == "neighbours", "at_end": place == "end", "back": back}
    return rotation_kernels.rotate(x, cos.contiguous(), sin.contiguous(), **how)


def latent_keys(
    kv_THw: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing, nope_dim: int
) -> tuple[Tensor, Tensor]:
    """Make the keys and values of latent attention (arXiv:2405.04434, section 2.1.3).

    Args:
        kv_THw: of each head `nope_dim` entries of its key, and then its value.
        k_rope: [T, 2P], the last entries of all keys, not rotated yet.
        cos: fp32 [T, P].
        sin: likewise.
        pairing: which of the 2P entries are rotated together.
        nope_dim: as above.

    Returns:
        k_THd, d = nope_dim + 2P, and v_THv, a part of kv_THw.
    """
    if kernels(kv_THw):
        return _LatentKeys.apply(kv_THw, k_rope, cos, sin, pairing, nope_dim)
    return latent_keys_reference(kv_THw, k_rope, cos, sin, pairing, nope_dim)


def latent_keys_reference(
    kv_THw: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing, nope_dim: int
) -> tuple[Tensor, Tensor]:
    """`latent_keys` in plain PyTorch."""
    k_nope, v_THv = kv_THw.tensor_split([nope_dim], dim=-1)
    turned = rotate(k_rope, cos, sin, pairing).unsqueeze(1).expand(-1, kv_THw.shape[1], -1)
    return torch.cat([k_nope, turned], dim=-1), v_THv


class _LatentKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kv_THw: Tensor,
        k_rope: Tensor,
        cos: Tensor,
        sin: Tensor,
        pairing: Pairing,
        nope_dim: int,
    ) -> tuple[Tensor, Tensor]:
        from torchsft.ops import rotation_kernels

        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.neighbours = pairing == "neighbours"
        inputs = kv_THw.contiguous(), k_rope.contiguous(), cos, sin
        k_THd = rotation_kernels.keys(*inputs, nope_dim, ctx.neighbours)
        return k_THd, kv_THw[..., nope_dim:]

    @staticmethod
    def backward(
        ctx: Any, grad_k_THd: Tensor, grad_v_THv: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        from torchsft.ops import rotation_kernels

        grads = grad_k_THd.contiguous(), grad_v_THv.contiguous()
        found = rotation_kernels.keys_backward(*grads, *ctx.saved_tensors, ctx.neighbours)
        return *found, None, None, None, None
