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
    """The key of a weight's scales."""
    return key + SCALE_SUFFIX


def described_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an fp8 block by a config.json; None where it does not describe
    block-scaled e4m3 weights.
    """
    fp8 = config.get("quantization_config")
    block = fp8.get("weight_block_size") if isinstance(fp8, Mapping) else None
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        return None
    is_e4m3 = fp8.get("quant_method") == "fp8" and fp8.get("fmt", "e4m3") == "e4m3"
    return tuple(block) if is_e4m3 else None


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a weight [m, n]."""
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
    values = torch.empty_like(q, dtype=torch.float32)
    column_blocks = (torch.arange(q.shape[1], device=q.device) + origin[1] % block[1]) // block[1]
    row = 0
    for scale_of_row in scale:  # as many rows as a block: little memory
        end = min(q.shape[0], block[0] - (origin[0] + row) % block[0] + row)
        values[row:end] = _decode(q[row:end])
        values[row:end] *= (256 * scale_of_row)[column_blocks]
        row = end
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
    w: Tensor,  # fp32 [m, n], a weight or some of its rows, beginning with a block
    block: tuple[int, int] = BLOCK,  # rows and columns of a block
    power_of_two: bool = False,  # round scales up to powers of two ("scale_fmt": "ue8m0")
    # fp32, the scales with which the weight was stored before training
    known_scale: Tensor | None = None,
    name: str = "a weight",  # for the InputError that nan or inf is
) -> tuple[Tensor, Tensor]:
    """Weight to e4m3 [m, n] and fp32 scales, the largest value of each block to 448; 1 is the scale
    of zeros.

    A block whose every value `known_scale` gives in every bit keeps its scale, and hence its very
    bytes: what training did not change comes back as it was.
    """
    q, scale = (
        torch.empty_like(w, dtype=torch.float8_e4m3fn),
        w.new_empty(scale_shape(tuple(w.shape), block)),
    )
    width = w.shape[1]
    for i, rows in enumerate(w.split(block[0])):
        padded = F.pad(rows, (0, -width % block[1])) if width % block[1] else rows
        blocks = padded.unflatten(1, (-1, block[1]))
        largest = blocks.abs().amax((0, 2))
        if not largest.isfinite().all():
            raise InputError(
                f"{name} holds nan or inf, which cannot be quantised; use an earlier checkpoint"
            )
        scale[i] = torch.where(largest > 0, largest / LARGEST, 1).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        if power_of_two:
            mantissa, exponent = torch.frexp(scale[i])  # in [0.5, 1)
            scale[i] = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
        if known_scale is not None:
            encoded = _encode(blocks, known_scale[i])
            given = _decode(encoded) * (256 * known_scale[i][:, None])
            same = (given.view(torch.int32) == blocks.view(torch.int32)).all(2).all(0)
            scale[i] = torch.where(same, known_scale[i], scale[i])
        if known_scale is None or not same.all():
            encoded = _encode(blocks, scale[i])
        q[i * block[0] : i * block[0] + len(rows)] = encoded.flatten(1)[:, :width]
    return q, scale


def _encode(blocks: Tensor, scale: Tensor) -> Tensor:
    """Values [rows, blocks, columns] in units of their block's scale, to the nearest e4m3."""
    unit = torch.where(scale == 0, 1, scale)  # all values of such a block are zeros
    return (blocks / unit[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
