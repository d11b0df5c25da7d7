"""AdamW with moments of fewer bits than fp32, on fp32 or bf16 parameters.

Arithmetic is fp32; what is kept in fewer bits is rounded stochastically: up or down by chance, so
that the expected value is the exact one. A second moment so decays and a parameter moves also where
the change is less than half of its spacing, for every beta2 and learning rate. (Rounded to nearest,
a bf16 moment with zero gradients cannot shrink if 1 - beta2 < 2^-9, as with 0.999.)

The random bits are a hash of the parameter's name, the step and the element's place in the whole
parameter. All copies of an element round alike, whatever the layout, and a run that continues needs
no state of a generator.

int8 is dynamic quantisation (Dettmers et al. 2022, the 256 values as in bitsandbytes and torchao)
with one fp32 scale for each 128 neighbours in a row of the last dim. torchao's own AdamW8bit cuts
blocks out of the flattened local shard, which other layouts cannot read, rounds to nearest, counts
scales below 1e-12 as 1e-12 (squares of gradients below 1e-6) and compiles for each shape.
"""

import math
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from torchsft.checkpoint.boxes import local_box
from torchsft.config import InputError, Optim

BLOCK = 128  # neighbours in a row that share a scale
CHUNK = 2**24  # elements that are in fp32 at once
MOMENTS = ("exp_avg", "exp_avg_sq")


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW whose `exp_avg` and `exp_avg_sq` are fp32, bf16, or int8 codes (uint8) with `..._scale`
    beside them; all are placed as their parameter is.

    Moments of parameters of one dim (norms, biases) are fp32 in any case. Needs no compiler, and
    beside its state `CHUNK` elements in fp32 a few times.
    """

    def __init__(
        self, groups: list[dict[str, Any]], names: Mapping[nn.Parameter, str], optim: Optim
    ) -> None:
        """Make it without state.

        Args:
            groups: as AdamW takes them.
            names: of all parameters, the same in every layout.
            optim: betas, eps, and the format of the moments.

        Raises:
            InputError: int8, and a parameter's rows are cut within a block.
        """
        super().__init__(groups, {"lr": optim.lr, "weight_decay": optim.weight_decay})
        self.names, self.optim = names, optim
        if optim.moments == "int8":
            for group in self.param_groups:
                for parameter in group["params"]:
                    _check_blocks(names[parameter], parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = self._zeros(parameter)
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _zeros(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = {"step": torch.zeros(())}
        kind = self.optim.moments if parameter.ndim >= 2 else "fp32"
        for name in MOMENTS:
            if kind == "int8":
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
                _part(state[name]).fill_(_code_of_zero(name))
                state[f"{name}_scale"] = _zero_scales(parameter)
            else:
                dtype = torch.bfloat16 if kind == "bf16" else torch.float32
                state[name] = torch.zeros_like(parameter, dtype=dtype)
        return state

    def _update(self, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        """Take one step of AdamW (as torch computes it), some rows at a time."""
        beta1, beta2, state = self.optim.beta1, self.optim.beta2, self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        scale1, scale2 = 1 - beta1**step, 1 - beta2**step
        parts = {name: _part(tensor) for name, tensor in state.items() if name != "step"}
        weights, gradients = _part(parameter), _part(parameter.grad)
        places, columns = _places(parameter)
        seed = f"{self.names[parameter]} {step}"
        size = max(1, CHUNK // max(1, weights.shape[1]))
        for first in range(0, len(weights), size):
            rows = slice(first, first + size)
            chunk = {name: part[rows] for name, part in parts.items()}
            w, g = weights[rows].float(), gradients[rows].float()
            m, v = (read_moment(chunk, name) for name in MOMENTS)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - lr * weight_decay)
            w.addcdiv_(m, (v / scale2).sqrt_().add_(self.optim.eps), value=-lr / scale1)
            if weights.dtype != torch.float32:
                bits = random_bits(places[rows], columns, zlib.crc32(f"{seed} parameter".encode()))
                weights[rows] = round_to_bf16(w, bits)
            if chunk["exp_avg"].dtype != torch.float32:
                bits = random_bits(places[rows], columns, zlib.crc32(f"{seed} moments".encode()))
                write_moment(chunk, "exp_avg", m, bits & 0xFFFF)
                write_moment(chunk, "exp_avg_sq", v, bits >> 16 & 0xFFFF)


def random_bits(places: Tensor, columns: Tensor, seed: int) -> Tensor:
    """Return 32 random bits for each element of some rows, int32 [rows, columns].

    Args:
        places: of the rows among all rows of the whole parameter, int64.
        columns: their elements' places in a row, int64.
        seed: of 32 bits.
    """
    rows = _mix(_mix(places + seed & 0xFFFFFFFF) + (places >> 32) & 0xFFFFFFFF)
    bits = (rows.int()[:, None] + columns.int() * -1640531527).contiguous()  # 2^32 / golden ratio
    # The same mixing in int32, whose products wrap and whose shifts extend the sign.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        bits.bitwise_xor_((bits >> shift) & (2 ** (32 - shift) - 1)).mul_(factor)
    return bits.bitwise_xor_(bits >> 16 & 0xFFFF)


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits in int64 (Wellons' lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return x ^ x >> 16


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16: away from zero with the probability that the dropped 16 bits say.

    Args:
        x: finite.
        bits: int32, of which the lowest 16 count.
    """
    kept = (x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    return kept.view(torch.float32).bfloat16()


def quantise(x: Tensor, values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows in blocks, each by its largest absolute value.

    Args:
        x: fp32 [rows, columns].
        values: what the codes stand for, rising (`dynamic_values`).
        bits: 16 random ones in int32, as `x`.

    Returns:
        Codes, uint8 as `x`, and scales, fp32 [rows, blocks].
    """
    blocks = nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(2)
    y = x / _spread(scales.clamp(min=torch.finfo(torch.float32).tiny), x.shape[1])
    below = torch.bucketize(y, values, right=True).sub_(1).clamp_(0, len(values) - 2)
    low, high = values[below], values[below + 1]
    codes = below + ((y - low) / (high - low) > (bits + 0.5) / 2**16)
    if values[0] == 0:  # a second moment of 0 beside a first moment would divide by eps
        codes = torch.where(y > 0, codes.clamp_(min=1), codes)
    return codes.to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Return what `quantise` has made of values, fp32."""
    return values[codes.int()] * _spread(scales, codes.shape[1])


def _spread(scales: Tensor, columns: int) -> Tensor:
    """Return the scale of each element of rows."""
    return scales.repeat_interleave(BLOCK, 1)[:, :columns]


@cache
def dynamic_values(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values that codes stand for, rising, fp32: 0, 1, and in each of 7 decades the
    means of equal parts, of which a decade has half as many as the one above.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1)
        means = 10.0 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2
        numbers += [*means.tolist(), *((-means).tolist() if signed else ())]
    return torch.tensor(sorted(numbers), device=device)


def _code_of_zero(name: str) -> int:
    values = dynamic_values(name == "exp_avg", torch.device("cpu"))
    return int((values == 0).nonzero())


def read_moment(chunk: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a moment in fp32; one that is kept in fp32 itself."""
    kept = chunk[name]
    if kept.dtype != torch.uint8:
        return kept.float()
    return dequantise(kept, chunk[f"{name}_scale"], dynamic_values(name == "exp_avg", kept.device))


def write_moment(chunk: Mapping[str, Tensor], name: str, x: Tensor, bits: Tensor) -> None:
    """Keep a moment, rounded by 16 random bits."""
    kept = chunk[name]
    if kept.dtype != torch.uint8:
        kept.copy_(round_to_bf16(x, bits))
        return
    codes, scales = quantise(x, dynamic_values(name == "exp_avg", kept.device), bits)
    kept.copy_(codes)
    chunk[f"{name}_scale"].copy_(scales)


def _part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor as rows of its last dim, a view."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.ndim else 1)


def _places(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Return where this rank's rows lie among all rows, and their elements in whole rows, int64."""
    box, device = local_box(parameter), parameter.device
    along = [
        torch.arange(start, start + size, device=device)
        for start, size in zip(box.start, box.shape, strict=True)
    ]
    places = torch.zeros(1, dtype=torch.int64, device=device)
    for dim, size in zip(along[:-1], parameter.shape[:-1], strict=True):
        places = (places[:, None] * size + dim).flatten()
    return places, along[-1]


def _zero_scales(parameter: Tensor) -> Tensor:
    """Return a scale of 0 for each block, placed as the parameter is."""
    *rows, columns = parameter.shape
    shape = (*rows, -(-columns // BLOCK))
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, device=parameter.device)
    *rows, columns = parameter.to_local().shape
    return DTensor.from_local(
        torch.zeros((*rows, -(-columns // BLOCK)), device=parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def _check_blocks(name: str, parameter: Tensor) -> None:
    """Refuse a parameter of which ranks hold parts of rows that are no whole blocks."""
    if not isinstance(parameter, DTensor) or parameter.ndim < 2:
        return
    width, last = parameter.shape[-1], parameter.ndim - 1
    ranks = math.prod(
        size
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True)
        if isinstance(placement, Shard) and placement.dim % parameter.ndim == last
    )
    if ranks > 1 and width % (BLOCK * ranks):
        raise InputError(
            f"--optim.moments int8 has blocks of {BLOCK} in a row, but {ranks} ranks share the "
            f"{width} entries of a row of {name}; choose --optim.moments bf16 or another "
            f"--parallel.tp"
        )
