"""INT4 in groups of 32 with one bf16 scale each, as compressed-tensors packs it (Kimi-K2-Thinking).

Eight values of a row, -8 to 7, stand in an int32, the first in its lowest bits, 8 added to each.
A value is that number * scale, exactly in fp32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchsft.config import InputError
from torchsft.precision.blockwise import refuse_nonfinite

GROUP = 32
_PER_WORD = 8


def is_described(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config describes this format."""
    schemes = quantization.get("config_groups")
    if quantization.get("quant_method") != "compressed-tensors" or not isinstance(schemes, dict):
        return False
    if quantization.get("format") != "pack-quantized" or len(schemes) != 1:
        return False
    (scheme,) = schemes.values()
    weights = scheme.get("weights") or {}
    needed = {"num_bits": 4, "type": "int", "symmetric": True}
    needed |= {"strategy": "group", "group_size": GROUP}
    if any(weights.get(key) != value for key, value in needed.items()):
        return False
    reorders_columns = weights.get("actorder")
    rounds_activations = scheme.get("input_activations") is not None
    return not reorders_columns and not rounds_activations


def groups(shape: tuple[int, ...], key: str) -> int:
    """Return groups of a row of a weight.

    Raises:
        InputError: it is no matrix, or its rows are no whole groups.
    """
    if len(shape) != 2 or shape[1] % GROUP:
        raise InputError(
            f"{key} {shape} cannot be INT4: it must be a matrix whose rows are multiples of "
            f"{GROUP}; choose bf16"
        )
    return shape[1] // GROUP


def dequantise(packed: Tensor, scale: Tensor) -> Tensor:
    """Return values of whole groups.

    Args:
        packed: int32 [m, n / 8].
        scale: bf16 [m, n / 32].

    Returns:
        fp32 [m, n].
    """
    steps = (packed.unsqueeze(-1) >> _shifts(packed)) & 15  # [m, n / 8, 8]
    steps = steps.flatten(1).float() - 8
    values = steps.unflatten(1, (-1, GROUP)) * scale.float().unsqueeze(-1)
    return values.flatten(1)


def _shifts(like: Tensor) -> Tensor:
    """Return by how many bits each of the values of an int32 is shifted, int32 [8]."""
    return 4 * torch.arange(_PER_WORD, dtype=torch.int32, device=like.device)


def quantise(w: Tensor, known_scale: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Quantise rows of a weight so that the largest value of each group becomes 7.5 steps
    (compressed-tensors' rule for symmetric numbers). Groups keep `known_scale` where that is at
    least as near: what did not change is exact, and what changed little gains no new error.

    Args:
        w: fp32 [m, n].
        known_scale: bf16 [m, n / 32].
        name: of the weight, for the error.

    Returns:
        int32 [m, n / 8], and bf16 scales [m, n / 32]; 1 is the scale of zeros.

    Raises:
        InputError: the weight holds nan or inf.
    """
    grouped = w.unflatten(1, (-1, GROUP))
    largest = grouped.abs().amax(-1)
    refuse_nonfinite(largest, name)
    scale = (largest / 7.5).bfloat16()
    scale = torch.where(scale > 0, scale, 1)
    if known_scale is not None:
        nearer = _error(grouped, known_scale) <= _error(grouped, scale)
        scale = torch.where(nearer, known_scale, scale)
    codes = _round(grouped, scale).to(torch.int32) + 8
    of_each_word = codes.flatten(1).unflatten(1, (-1, _PER_WORD))  # [m, n / 8, 8]
    packed = (of_each_word << _shifts(w)).sum(-1, dtype=torch.int32)
    return packed, scale


def _error(grouped: Tensor, scale: Tensor) -> Tensor:
    """Return the squared rounding error of each group.

    Args:
        grouped: fp32 [m, groups, 32].
        scale: bf16 [m, groups].

    Returns:
        fp32 [m, groups]; 0: every value is exact.
    """
    rounded = _round(grouped, scale) * scale.float().unsqueeze(-1)
    return (rounded - grouped).square().sum(-1)


def _round(grouped: Tensor, scale: Tensor) -> Tensor:
    """Return values [m, groups, 32] in steps of their group, fp32."""
    unit = torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    steps = (grouped / unit).round().clamp(-8, 7)
    return steps + 0.0  # no negative zero
