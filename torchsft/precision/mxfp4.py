"""MXFP4: e2m1 values in blocks of 32 with one power of two each (OCP Microscaling Formats v1.0).

Two values stand in a byte, the first in its lower half: a sign bit above three bits that number
0, 0.5, 1, 1.5, 2, 3, 4 and 6. A block's scale is 2^(byte - 127).
"""

import torch
from torch import Tensor

from torchsft.config import InputError
from torchsft.precision.blockwise import refuse_nonfinite

BLOCK = 32
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST_EXPONENT = 2  # of e2m1
_BIAS = 127


def blocks(shape: tuple[int, ...], key: str) -> int:
    """Return blocks of a column of a stacked weight [E, in, out].

    Raises:
        InputError: it is none, or its columns are no whole blocks.
    """
    if len(shape) != 3 or shape[1] % BLOCK:
        raise InputError(
            f"{key} {shape} cannot be MXFP4: it must be stacked matrices whose columns are "
            f"multiples of {BLOCK}; choose bf16"
        )
    return shape[1] // BLOCK


def dequantise(packed: Tensor, scales: Tensor) -> Tensor:
    """Return values, fp32 [..., 32 n], exact: of uint8 [..., n, 16] and uint8 [..., n]."""
    lower_half, upper_half = packed & 15, packed >> 4
    codes = torch.stack([lower_half, upper_half], dim=-1).flatten(-2)
    return _decode(codes, scales).flatten(-2)


def quantise(w: Tensor, known_scales: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Quantise a weight by the rule of the OCP specification, section 6.3: the scale is the largest
    power of two in a block's largest value, over 4; values are rounded to the nearest, ties to
    even, and at most 6. Blocks keep `known_scales` where these are at least as near: what did not
    change is exact, and what changed little gains no new error.

    Args:
        w: fp32 [..., 32 n].
        known_scales: uint8 [..., n].
        name: of the weight, for the error.

    Returns:
        uint8 [..., n, 16], and scales, uint8 [..., n]; 127 (1) is the scale of zeros.

    Raises:
        InputError: the weight holds nan or inf.
    """
    blocked = w.unflatten(-1, (-1, BLOCK)).contiguous()
    largest = blocked.abs().amax(-1)
    refuse_nonfinite(largest, name)
    # frexp's mantissas are below 1: 2^(exponent - 1) is the power of two in a number
    power = torch.frexp(largest).exponent - 1
    exponent = torch.where(largest > 0, power - _LARGEST_EXPONENT, 0)
    scales = (exponent + _BIAS).clamp(0, 254).to(torch.uint8)
    if known_scales is not None:
        nearer = _error(blocked, known_scales) <= _error(blocked, scales)
        scales = torch.where(nearer, known_scales, scales)
    codes = _encode(blocked, scales)
    lower_half, upper_half = codes[..., ::2], codes[..., 1::2]
    return lower_half | (upper_half << 4), scales


def _error(blocked: Tensor, scales: Tensor) -> Tensor:
    """Return the squared rounding error of each block [..., n]; 0: every value is exact."""
    rounded = _decode(_encode(blocked, scales), scales)
    return (rounded - blocked).square().sum(-1)


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return values, fp32, of 4-bit codes.

    Args:
        codes: uint8 [..., n, 32].
        scales: of 32 of them each, uint8 [..., n].
    """
    magnitudes = torch.tensor(_NUMBERS, device=codes.device)
    numbers = torch.cat([magnitudes, -magnitudes])  # by code: the sign is its first bit
    exponents = scales.to(torch.int32).unsqueeze(-1) - _BIAS
    return torch.ldexp(numbers[codes.long()], exponents)


def _encode(blocked: Tensor, scales: Tensor) -> Tensor:
    """Return the 4-bit codes of values, rounded to the nearest.

    Args:
        blocked: fp32 [..., n, 32].
        scales: of 32 of them each, uint8 [..., n].

    Returns:
        uint8 [..., n, 32].
    """
    exponents = scales.to(torch.int32).unsqueeze(-1) - _BIAS
    in_units = torch.ldexp(blocked, -exponents)
    numbers = torch.tensor(_NUMBERS, device=blocked.device)
    middles = (numbers[1:] + numbers[:-1]) / 2
    # a tie belongs to the even code: above odd ones the upper
    above_odd = middles[1::2]
    above_odd.copy_(above_odd.nextafter(torch.zeros_like(above_odd)))
    codes = torch.bucketize(in_units.abs(), middles).to(torch.uint8)
    sign = blocked.signbit().to(torch.uint8)
    return codes | (sign << 3)
