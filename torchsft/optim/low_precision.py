"""AdamW whose moments, and whose parameters, may have few bits: those are rounded at random.

    bf16    up or down to a neighbour, the nearer the likelier, so that the mean is the value
    int8    moments of matrices alone, in blocks of 128 entries of a row: the largest of a block is
            an fp32 scale, and a byte chooses one of 256 levels (arXiv:1511.04561, by torchao), at
            random likewise

To the nearest, a second moment could not fall by less than half the distance to the next number
(bf16: 1/512 of it, so never with beta2 = 0.999), and a parameter would not see a small learning
rate. In the mean every change counts.

The random numbers are a hash of the parameter's name, the step and the element's place in the
whole parameter: so all copies of a parameter are rounded alike, no layout changes a number, and a
run that continues needs no state of a generator. Everything between is fp32. Parameters of the same
dtypes are updated together, as one vector, so that a step is few operations.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchsft.checkpoint.boxes import Box, local_box
from torchsft.config.optim_options import BLOCK
from torchsft.models.decoder import local

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW calls them
CHUNK_ELEMENTS = 2**24  # the most that are in fp32 at a time, but at least one entry of dim 0


def hashed(seed: int | Tensor, box: Box, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return random bits for each element of a box of a tensor.

    They depend on the element's place in the whole tensor and on `seed` alone (both modulo 2^32:
    elements that lie 2^32 apart have the same).

    Args:
        seed: any whole number; or an int32 scalar on the device.
        box: the part of the tensor.
        shape: of the whole tensor.
        device: on which they are computed.

    Returns:
        int32 of the box's shape.
    """
    place = _places(box, shape, device)
    return _mix(place ^ (seed if isinstance(seed, Tensor) else _int32(seed)))


def _places(box: Box, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the number of each element of a box, modulo 2^32, among those of the whole tensor."""
    # from the last dim to the first: [], [n], [m, n], ...
    place = torch.zeros((), dtype=torch.int32, device=device)
    stride = 1  # elements of the whole tensor between two entries of a dim
    dims = list(zip(box.start, box.shape, shape, strict=True))
    for start, count, size in reversed(dims):
        along = torch.arange(count, dtype=torch.int32, device=device)
        along = along * _int32(stride) + _int32(start * stride)
        place = along.view(-1, *[1] * place.ndim) + place
        stride *= size
    return place


def _mix(bits: Tensor) -> Tensor:
    """Hash int32 numbers, in place: the finaliser "lowbias32" of
    https://nullprogram.com/blog/2018/07/31.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        # `>>` of a negative int32 brings in ones, which are not among the bits that move
        moved = 2 ** (32 - shift) - 1
        bits ^= (bits >> shift) & moved
        bits *= _int32(factor)
    return bits


def _int32(number: int) -> int:
    """Return a whole number modulo 2^32, as int32 has it."""
    return (number + 2**31) % 2**32 - 2**31


def to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to one of the two neighbours in bf16.

    Args:
        values: finite.
        bits: random, int32 of the same shape, of which the lower 16 count.
    """
    # bf16 has the upper 16 bits of fp32: the more the lower ones are, the likelier they carry
    summed = values.view(torch.int32) + (bits & 0xFFFF)
    upper_bits = summed & -0x10000
    return upper_bits.view(torch.float32).bfloat16()


@functools.cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """Return the levels that a code chooses among.

    Args:
        signed: whether there are levels below 0, down to about -1.
        device: of the result.

    Returns:
        fp32 [256], sorted, the last 1.
    """
    from torchao.optim.quant_utils import create_dynamic_map  # seconds to import

    return torch.tensor(create_dynamic_map(signed), device=device)


def to_int8(values: Tensor, bits: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Round fp32 [..., n] to levels times scales.

    Args:
        values: finite.
        bits: random, int32 [..., n].
        signed: whether there are levels below 0. Without them (second moments) nothing above 0
            becomes 0, as an update would divide by eps alone then.

    Returns:
        Codes, uint8 [..., n], and scales, fp32 [..., ceil(n / BLOCK)].
    """
    table = levels(signed, values.device)
    columns = values.shape[-1]
    padded = nn.functional.pad(values, (0, -columns % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    unit = torch.where(scales > 0, scales, 1).unsqueeze(-1)
    in_units = (blocks / unit).flatten(-2)[..., :columns].contiguous()
    # the level below each value, and how far it is on the way to the next one
    lower = torch.bucketize(in_units, table, right=True) - 1
    lower = lower.clamp(0, len(table) - 2)
    below = table[lower]
    distance = table[lower + 1] - below
    share = (in_units - below) / distance
    if not signed:
        share = torch.where((lower == 0) & (in_units > 0), 1, share)
    uniform = ((bits >> 8) & 0xFFFFFF).float() / 2**24  # in [0, 1), of 24 bits
    codes = lower + (uniform < share)
    return codes.to(torch.uint8), scales


def from_int8(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the values of codes.

    Args:
        codes: uint8 [..., n].
        scales: fp32 [..., ceil(n / BLOCK)], of blocks of columns.
        signed: as they were made with.

    Returns:
        fp32 [..., n].
    """
    in_units = levels(signed, codes.device)[codes.int()]
    units = scales.repeat_interleave(BLOCK, -1)
    return in_units * units[..., : codes.shape[-1]]


class _Factors(NamedTuple):
    """What depends on the number of a step; scalars, or a vector of each for many parameters.

    Attributes:
        number: from 1, int32.
        of_root: of the root of the second moment, 1 / sqrt(1 - beta2^number).
        of_change: of the change of a parameter, lr / (1 - beta1^number).
    """

    number: Tensor
    of_root: Tensor
    of_change: Tensor

    @classmethod
    def of(cls, number_n: Tensor, group: dict[str, Any]) -> "_Factors":
        """Compute those of n parameters of a group, in float64 and rounded to fp32."""
        beta1, beta2 = group["betas"]
        exponent_n = number_n.double()
        of_root_n = (1 - beta2**exponent_n).rsqrt()
        of_change_n = group["lr"] / (1 - beta1**exponent_n)
        return cls(number_n.int(), of_root_n.float(), of_change_n.float())


@dataclass(frozen=True)
class _Chunk:
    """Some entries of dim 0 of a parameter's part on this rank.

    Attributes:
        parameter: which they are of.
        weight: itself, to be changed in place.
        gradient: of any dtype.
        state: moments and their scales by name, to be changed in place.
        box: where in the whole parameter these entries are.
        factors: of this step; scalars.
    """

    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    box: Box
    factors: _Factors

    @classmethod
    def all_of(
        cls, parameter: nn.Parameter, state: dict[str, Tensor], factors: _Factors
    ) -> Iterator["_Chunk"]:
        """Yield all chunks of a parameter, none larger than what is updated at a time."""
        weight, gradient = local(parameter).detach(), local(parameter.grad)
        parts = {key: local(value) for key, value in state.items() if value.ndim}
        begin, *others = local_box(parameter).start
        entries = weight.shape[0]
        at_once = max(1, CHUNK_ELEMENTS * entries // max(1, weight.numel()))
        for first in range(0, entries, at_once):
            rows = slice(first, first + at_once)
            here = weight[rows]
            yield cls(
                parameter,
                here,
                gradient[rows],
                {key: part[rows] for key, part in parts.items()},
                Box((begin + first, *others), tuple(here.shape)),
                factors,
            )

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the weight and the moments."""
        return self.weight.dtype, self.state[MOMENTS[0]].dtype


def _joined(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Join chunks of the same dtypes, so that few operations update all of them; those in int8,
    whose rows have blocks, stay alone.
    """
    open_ones: dict[tuple[torch.dtype, torch.dtype], list[_Chunk]] = {}
    elements: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for chunk in chunks:
        kind, size = chunk.dtypes, chunk.weight.numel()
        batch = open_ones.setdefault(kind, [])
        if batch and (elements[kind] + size > CHUNK_ELEMENTS or torch.uint8 in kind):
            yield batch
            batch = open_ones[kind] = []
            elements[kind] = 0
        batch.append(chunk)
        elements[kind] += size
    yield from open_ones.values()


def _flat(parts: Iterable[Tensor]) -> Tensor:
    """Return all elements as one vector."""
    first, *others = [part.flatten() for part in parts]
    return torch.cat([first, *others]) if others else first


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW as torch has it, with `moments` fp32, bf16 or int8, and parameters of fp32 or bf16.

    The number of a step lies on the device, where its bias corrections and random bits are made:
    the host does not know whether a step before counted (`found_inf`, see `FusedAdamW`).

    Args:
        groups: of parameters.
        names: of these parameters.
        moments: their format; those of vectors stay fp32 beside int8.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        moments: str,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.names, self.moments = names, moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
                    self.state[parameter] |= self._zero_moments(parameter)
            if not parameters:
                continue
            numbers = [self.state[parameter]["step"] for parameter in parameters]
            found_inf = getattr(self, "found_inf", numbers[0].new_zeros(()))
            torch._foreach_add_(numbers, 1)
            factors = _Factors.of(torch.stack(numbers), group)
            torch._foreach_sub_(numbers, [found_inf] * len(numbers))
            chunks = (
                chunk
                for parameter, *of_step in zip(parameters, *factors, strict=True)
                for chunk in _Chunk.all_of(parameter, self.state[parameter], _Factors(*of_step))
            )
            for batch in _joined(chunks):
                self._update(batch, group, found_inf > 0)

    def _zero_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return both moments of a parameter, placed as it is."""
        moments = {}
        is_int8 = self.moments == "int8" and parameter.ndim > 1
        dtype = torch.bfloat16 if self.moments == "bf16" else torch.float32
        for name in MOMENTS:
            if not is_int8:
                moments[name] = torch.zeros_like(parameter, dtype=dtype)
                continue
            table = levels(_is_signed(name), torch.device("cpu"))
            code_of_0 = int(torch.bucketize(0.0, table))
            moments[name] = torch.full_like(parameter, code_of_0, dtype=torch.uint8)
            moments[f"{name}_scale"] = _scales_like(parameter)
        return moments

    def _update(self, chunks: list[_Chunk], group: dict[str, Any], skip: Tensor) -> None:
        """Update some entries of parameters and their moments, as one vector.

        Args:
            chunks: the entries, of the same dtypes; one alone in int8.
            group: of the optimizer, with the options.
            skip: bool scalar: all shall stay as it is.
        """
        (beta1, beta2), lr = group["betas"], group["lr"]
        sizes = [chunk.weight.numel() for chunk in chunks]

        def of_each(scalars: Iterable[Tensor]) -> Tensor:
            """[elements], of each what its chunk has."""
            return _flat(scalar.expand(n) for scalar, n in zip(scalars, sizes, strict=True))

        gradient = _flat(chunk.gradient for chunk in chunks).float()
        average, square = (_read(chunks, moment) for moment in MOMENTS)
        average = average.lerp(gradient, 1 - beta1)
        square = square.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight = _flat(chunk.weight for chunk in chunks).float().mul(1 - lr * group["weight_decay"])
        divisor = square.sqrt().mul_(of_each(chunk.factors.of_root for chunk in chunks))
        divisor.add_(group["eps"])
        of_change = of_each(chunk.factors.of_change for chunk in chunks)
        weight.sub_(average.div(divisor).mul_(of_change))
        places = _flat(_places(c.box, tuple(c.parameter.shape), weight.device) for c in chunks)

        def bits(what: str) -> Tensor:
            seeds = []
            for chunk in chunks:
                text = f"{self.names[chunk.parameter]} {what}"
                digest = hashlib.sha256(text.encode()).digest()
                seeds.append(chunk.factors.number ^ _int32(int.from_bytes(digest[:4], "little")))
            return _mix(places ^ of_each(_mix(torch.stack(seeds))))

        def store(where: list[Tensor], values: Tensor) -> None:
            for target, part in zip(where, values.split(sizes), strict=True):
                torch.where(skip, target, part.view_as(target), out=target)

        for moment, values in zip(MOMENTS, (average, square), strict=True):
            stored = [chunk.state[moment] for chunk in chunks]
            if stored[0].dtype == torch.uint8:
                shape = stored[0].shape
                codes, scales = to_int8(
                    values.view(shape), bits(moment).view(shape), signed=_is_signed(moment)
                )
                scale = chunks[0].state[f"{moment}_scale"]
                torch.where(skip, scale, scales, out=scale)
                store(stored, codes.flatten())
            elif stored[0].dtype == torch.bfloat16:
                store(stored, to_bf16(values, bits(moment)))
            else:
                store(stored, values)
        if chunks[0].weight.dtype == torch.bfloat16:
            weight = to_bf16(weight, bits("weight"))
        store([chunk.weight for chunk in chunks], weight)


def _is_signed(moment: str) -> bool:
    """Whether a moment can be below 0."""
    return moment == "exp_avg"


def _read(chunks: list[_Chunk], moment: str) -> Tensor:
    """Return a moment as one fp32 vector: itself where it is, else a copy."""
    if torch.uint8 not in chunks[0].dtypes:
        return _flat(chunk.state[moment] for chunk in chunks).float()
    (chunk,) = chunks
    scales = chunk.state[f"{moment}_scale"]
    return from_int8(chunk.state[moment], scales, signed=_is_signed(moment)).flatten()


def _scales_like(parameter: nn.Parameter) -> Tensor:
    """Return zero scales for the blocks of a parameter, placed as it is."""

    def blocks(shape: torch.Size) -> list[int]:
        *leading, columns = shape
        return [*leading, -(-columns // BLOCK)]

    scales = torch.zeros(blocks(local(parameter).shape), device=parameter.device)
    if not isinstance(parameter, DTensor):
        return scales
    shape = torch.Size(blocks(parameter.shape))
    return DTensor.from_local(
        scales,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
