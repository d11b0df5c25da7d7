"""DeepSeek's block-scaled fp8: weights in e4m3 with one fp32 scale per block (128 x 128, the last
ones ragged).

On disk a weight `KEY` [m, n] has beside it `KEY_scale_inv` [ceil(m / 128), ceil(n / 128)]; its
value is fp32(weight) * scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsft.config import InputError

BLOCK = (128, 128)
LARGEST = 448.0  # of e4m3
SCALE_SUFFIX = "_scale_inv"


def scale_key(key: str) -> str:
    """Return the key of a weight's scales."""
    return key + SCALE_SUFFIX


def described_block(fp8: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns of an fp8 block by a quantization_config; None where it does not
    describe block-scaled e4m3 weights.
    """
    block = fp8.get("weight_block_size")
    if not isinstance(block, list) or [type(size) for size in block] != [int, int]:
        return None
    named = fp8.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")
    is_e4m3 = fp8.get("quant_method") == "fp8" and named
    if min(block) < 1 or not is_e4m3:
        return None
    return tuple(block)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Return shape of the scales of a weight [m, n]."""
    rows, cols = shape
    return -(-rows // block[0]), -(-cols // block[1])


def dequantise(
    q: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK, origin: tuple[int, int] = (0, 0)
) -> Tensor:
    """Values, fp32 [m, n], of a part of a weight: of `q`, e4m3 [m, n], which begins at row and
    column `origin` of the weight.

    `scale`: fp32, of the blocks (of `block` rows and columns) that the part meets, and no
    others.
    """
    rows, columns = q.shape
    height, width = block
    values = torch.empty_like(q, dtype=torch.float32)
    block_of_column = (torch.arange(columns, device=q.device) + origin[1] % width) // width
    begin = 0
    for scale_of_row in scale:  # as many rows as a block: little memory
        left_of_block = height - (origin[0] + begin) % height
        end = min(rows, begin + left_of_block)
        values[begin:end] = _decode(q[begin:end])
        values[begin:end] *= (256 * scale_of_row)[block_of_column]
        begin = end
    return values


def _decode(q: Tensor) -> Tensor:
    """e4m3 values / 256, exact, in fp16: three times as fast on a CPU as torch's own conversion to
    fp32. Behind the sign, e4m3's bits are the last of fp16's exponent and the first of its
    mantissa; the biases of the exponents differ by 8.
    """
    signed = q.view(torch.int8)
    # nan, which fp16 writes otherwise
    if signed.numel() and (signed.max() == 127 or q.view(torch.uint8).max() == 255):
        return q.float() / 256
    bits = signed.to(torch.int16)
    bits <<= 7
    bits &= ~(1 << 14)  # the copy of the sign that int16 made
    return bits.view(torch.float16)


def quantise(
    w: Tensor,
    block: tuple[int, int] = BLOCK,
    power_of_two: bool = False,
    known_scale: Tensor | None = None,
    name: str = "a weight",
    through: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Quantise a weight so that the largest value of each block becomes 448.

    A block whose every value `known_scale` gives in every bit keeps its scale, and hence its very
    bytes: what training did not change comes back as it was.

    Args:
        w: fp32 [m, n], a weight or some of its rows, beginning with a block.
        block: rows and columns of a block.
        power_of_two: round scales up to powers of two ("scale_fmt": "ue8m0").
        known_scale: fp32, the scales with which the weight was stored before training.
        name: of the weight, for the error.
        through: a dtype to which values that `known_scale` does not give are rounded first.

    Returns:
        The weight in e4m3 [m, n], and its fp32 scales; 1 is the scale of zeros.

    Raises:
        InputError: the weight holds nan or inf.
    """
    height, width = block
    quantised = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    scales = w.new_empty(scale_shape(tuple(w.shape), block))
    columns = w.shape[1]
    for index, rows in enumerate(w.split(height)):
        missing = -columns % width
        padded = F.pad(rows, (0, missing)) if missing else rows
        blocks = padded.unflatten(1, (-1, width))
        fresh = blocks.to(through).float()
        largest = fresh.abs().amax((0, 2))
        refuse_nonfinite(largest, name)
        scale = scale_of(largest, power_of_two)
        if known_scale is None:
            encoded = encode(fresh, scale[:, None])
        else:
            encoded, scale = _encode_with_known(blocks, fresh, scale, known_scale[index])
        scales[index] = scale
        begin = index * height
        quantised[begin : begin + len(rows)] = encoded.flatten(1)[:, :columns]
    return quantised, scales


def refuse_nonfinite(largest: Tensor, name: str) -> None:
    """Refuse a weight whose largest magnitudes say that it holds nan or inf.

    Raises:
        InputError: it does.
    """
    if not largest.isfinite().all():
        raise InputError(
            f"{name} holds nan or inf, which cannot be quantised; use an earlier checkpoint"
        )


def scale_of(largest: Tensor, power_of_two: bool) -> Tensor:
    """Return the scales of blocks whose largest magnitudes are given, both fp32; of nan or inf, so
    that it stays visible, nan or inf.
    """
    scale = torch.where(largest == 0, 1, largest / LARGEST)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    if power_of_two:  # carried into the exponent, unless the mantissa is 0
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def _encode_with_known(
    blocks: Tensor, fresh: Tensor, scale: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode blocks with the scales that are known where these give every bit, else those of
    `fresh` with `scale`.

    Returns:
        The values in e4m3, and the scale of each block.
    """
    encoded = encode(blocks, known[:, None])
    decoded = _decode(encoded) * (256 * known[:, None])
    same_bits = decoded.view(torch.int32) == blocks.view(torch.int32)
    unchanged = same_bits.all(2).all(0)
    if unchanged.all():
        return encoded, known
    scale = torch.where(unchanged, known, scale)
    return encode(torch.where(unchanged[:, None], blocks, fresh), scale[:, None]), scale


def encode(values: Tensor, scale: Tensor) -> Tensor:
    """Return fp32 values in units of their scales (of a shape that broadcasts), to the nearest
    e4m3.
    """
    unit = torch.where(scale == 0, 1, scale)  # all values of such a block are zeros
    in_units = values / unit
    return in_units.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
