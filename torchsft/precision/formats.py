"""Formats in which files hold weights in few bits: one interface, and which one a config.json
describes.

A weight KEY of such a format lies in several tensors of a file, its parts; one of these holds
scales. Values are read as fp32, exactly, and written from fp32, each group of values that share a
scale by itself: where the scale with which it was stored gives its values exactly (of four bits: at
least as near as a new one), it keeps that scale, and hence its very bytes. So what training did not
change comes back as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from torchsft.precision import int4, mxfp4
from torchsft.precision.blockwise import (
    BLOCK,
    SCALE_SUFFIX,
    dequantise,
    described_block,
    quantise,
    scale_shape,
)

# Of a file: key -> dtype, shape.
Contents = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
# Reads a slice of a stored tensor; dims that are not named are whole.
Read = Callable[[str, tuple[slice, ...]], Tensor]


class Format(Protocol):
    """A format of weights; shapes and slices are those of the weight."""

    name: str  # what --checkpoint.export calls it
    word: str  # what stands for it where dtypes are listed
    suffixes: Sequence[str]  # of KEY, for the parts, in the order in which a file has them
    scales: str  # the suffix of the scales
    rule: str  # what its parts must be, in words
    rows: int  # writing some rows (of dim 0) begins with a multiple of so many
    description: Mapping[str, Any]  # what a config.json says at least of it

    def parts(self, key: str, shape: tuple[int, ...]) -> Contents:
        """Return the parts of a weight, by their keys.

        Args:
            key: of the weight.
            shape: of the weight.

        Raises:
            InputError: the format cannot hold such a weight.
        """

    def values(self, read: Read, key: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return a slice of a weight, fp32.

        Args:
            read: reads the parts from a file.
            key: of the weight.
            ranges: where the slice begins and ends in each dim of the weight.
        """

    def encode(self, w: Tensor, known: Tensor | None, key: str) -> dict[str, Tensor]:
        """Return the parts of a weight, or of some of its rows, by their keys.

        Args:
            w: fp32.
            known: the scales with which these rows were stored.
            key: of the weight.

        Raises:
            InputError: the weight holds nan or inf.
        """

    def constants(self, key: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the parts that follow from the weight's shape."""
        return {}


@dataclass(frozen=True)
class Fp8Blocks(Format):
    """DeepSeek's fp8 (precision/blockwise.py): KEY [m, n] and KEY_scale_inv, of each block.

    Attributes:
        block: its rows and columns.
        power_of_two: whether new scales are powers of two.
        through: see `quantise`.
    """

    block: tuple[int, int] = BLOCK
    power_of_two: bool = False
    through: torch.dtype = torch.float32

    name: ClassVar[str] = "fp8"
    word: ClassVar[str] = "F8_E4M3"
    suffixes: ClassVar[Sequence[str]] = ("", SCALE_SUFFIX)
    scales: ClassVar[str] = SCALE_SUFFIX

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.block[0]

    @property
    def rule(self) -> str:
        """What scales must be."""
        rows, columns = self.block
        return f"scales must be F32, one for each block of {rows} x {columns}"

    @property
    def description(self) -> dict[str, Any]:
        """DeepSeek-V3's."""
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(self.block),
        }

    def parts(self, key: str, shape: tuple[int, ...]) -> Contents:
        """Return the weight in e4m3 and its scales."""
        scales = torch.float32, scale_shape(shape, self.block)
        return {key: (torch.float8_e4m3fn, shape), key + SCALE_SUFFIX: scales}

    def values(self, read: Read, key: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return a slice of a weight, fp32."""
        raw = read(key, tuple(slice(*ends) for ends in ranges))
        blocks = tuple(map(_blocks_of, ranges, self.block))
        scales = read(key + SCALE_SUFFIX, blocks)
        origin = tuple(start for start, _ in ranges)
        return dequantise(raw, scales, self.block, origin)

    def encode(self, w: Tensor, known: Tensor | None, key: str) -> dict[str, Tensor]:
        """Return the weight in e4m3 and its scales."""
        q, scale = quantise(w, self.block, self.power_of_two, known, key, self.through)
        return {key: q, key + SCALE_SUFFIX: scale}


@dataclass(frozen=True)
class Int4Groups(Format):
    """INT4 of compressed-tensors, `pack-quantized` (precision/int4.py), of a weight KEY [m, n]:

        KEY_shape     the two numbers m and n
        KEY_packed    int32 [m, n / 8]
        KEY_scale     bf16 [m, n / 32]

    Attributes:
        shape_dtype: of KEY_shape, in which releases differ.
    """

    shape_dtype: torch.dtype = torch.int64

    description: ClassVar[Mapping[str, Any]] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
    }
    name: ClassVar[str] = "int4"
    word: ClassVar[str] = "INT4"
    suffixes: ClassVar[Sequence[str]] = ("_shape", "_packed", "_scale")
    scales: ClassVar[str] = "_scale"
    rule: ClassVar[str] = "INT4 weights must be I32 values with BF16 scales, one for 32 of a row"
    rows: ClassVar[int] = 1

    def parts(self, key: str, shape: tuple[int, ...]) -> Contents:
        """Return shape, packed values and scales."""
        rows, groups = shape[0], int4.groups(shape, key)
        words = shape[1] // 8
        return {
            f"{key}_shape": (self.shape_dtype, (2,)),
            f"{key}_packed": (torch.int32, (rows, words)),
            f"{key}_scale": (torch.bfloat16, (rows, groups)),
        }

    def shape_of(self, packed: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight by that of its packed values."""
        return (*packed[:-1], 8 * packed[-1])

    def values(self, read: Read, key: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return a slice of a weight, fp32."""
        rows, (start, end) = slice(*ranges[0]), ranges[1]
        groups = _blocks_of((start, end), int4.GROUP)
        words = slice(4 * groups.start, 4 * groups.stop)  # a group has 4, of 8 values each
        packed = read(f"{key}_packed", (rows, words))
        scales = read(f"{key}_scale", (rows, groups))
        values = int4.dequantise(packed, scales)
        origin = groups.start * int4.GROUP
        return values[:, start - origin : end - origin]

    def encode(self, w: Tensor, known: Tensor | None, key: str) -> dict[str, Tensor]:
        """Return packed values and scales."""
        packed, scale = int4.quantise(w, known, key)
        return {f"{key}_packed": packed, f"{key}_scale": scale}

    def constants(self, key: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the shape."""
        return {f"{key}_shape": torch.tensor(shape, dtype=self.shape_dtype)}


@dataclass(frozen=True)
class Mxfp4(Format):
    """MXFP4 as gpt-oss has it (precision/mxfp4.py), of a weight KEY [E, in, out], whose last two
    dims are stored in the other order:

        KEY_blocks    uint8 [E, out, in / 32, 16]
        KEY_scales    uint8 [E, out, in / 32]
    """

    description: ClassVar[Mapping[str, Any]] = {"quant_method": "mxfp4"}
    name: ClassVar[str] = "mxfp4"
    word: ClassVar[str] = "MXFP4"
    suffixes: ClassVar[Sequence[str]] = ("_blocks", "_scales")
    scales: ClassVar[str] = "_scales"
    rule: ClassVar[str] = "MXFP4 weights must be U8 blocks of 16 bytes with a U8 scale each"
    rows: ClassVar[int] = 1

    def parts(self, key: str, shape: tuple[int, ...]) -> Contents:
        """Return blocks and scales."""
        experts, _, out = shape
        blocks = experts, out, mxfp4.blocks(shape, key)
        half = mxfp4.BLOCK // 2
        return {
            f"{key}_blocks": (torch.uint8, (*blocks, half)),
            f"{key}_scales": (torch.uint8, blocks),
        }

    def shape_of(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight by that of its blocks."""
        *experts, out, count, half = blocks
        return (*experts, 2 * half * count, out)

    def values(self, read: Read, key: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Return a slice of a weight, fp32."""
        experts, (start, end), out = ranges
        blocks = _blocks_of((start, end), mxfp4.BLOCK)
        part = slice(*experts), slice(*out), blocks
        packed, scales = read(f"{key}_blocks", part), read(f"{key}_scales", part)
        values = mxfp4.dequantise(packed, scales)
        origin = blocks.start * mxfp4.BLOCK
        return values[..., start - origin : end - origin].transpose(1, 2)

    def encode(self, w: Tensor, known: Tensor | None, key: str) -> dict[str, Tensor]:
        """Return blocks and scales."""
        blocks, scales = mxfp4.quantise(w.transpose(1, 2), known, key)
        return {f"{key}_blocks": blocks, f"{key}_scales": scales}


def _blocks_of(ends: tuple[int, int], size: int) -> slice:
    """Return which blocks of `size` entries have some of those from `ends[0]` to `ends[1]`."""
    start, end = ends
    return slice(start // size, -(-end // size))


def quantization_of(config: Mapping[str, Any]) -> Any:
    """Return what a config.json says of quantised weights, for models with several parts also in
    `text_config`; None: nothing.
    """
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    return config.get("quantization_config") or inner or None


def described_format(config: Mapping[str, Any]) -> Format | None:
    """Return the format that a config.json describes; None: it describes none that is known."""
    said = quantization_of(config)
    if not isinstance(said, Mapping):
        return None
    if (block := described_block(said)) is not None:
        return Fp8Blocks(block, said.get("scale_fmt") == "ue8m0")
    if said.get("quant_method") == "mxfp4":
        return Mxfp4()
    return Int4Groups() if int4.is_described(said) else None
