"""Compares the kernels of SwiGLU, of the rotation and of rows in fp8 with their plain twins: run by
Triton's interpreter on a CPU by tests/ops/interpreted.py, and on a GPU by tests/gpu.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoint.sources import same_bits
from torchsft import ops
from torchsft.models import rope
from torchsft.models.rope import Rope, RotaryEmbedding
from torchsft.ops import blockwise_mm as mm
from torchsft.ops import rotation_kernels, swiglu, swiglu_kernels
from torchsft.ops.tiles import padding_of
from torchsft.precision.blockwise import encode, scale_of

ULP = 2**-7  # of bf16, at most, of a number's size; a number rounded once is off by half of it


def near(found: Tensor, exact: Tensor, ulps: float) -> bool:
    """Whether bf16 numbers are within so many units in the last place of float64 ones."""
    return bool(((found.double() - exact).abs() <= ulps * ULP * exact.abs()).all())


def tables_of_3_tokens(device: str) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 6 pairs, a number that is no power of two."""
    positions = torch.tensor([0, 3, 700], device=device)
    return RotaryEmbedding(Rope(dim=12, theta=100.0)).to(device)(positions)


def swiglu_rows(device: str) -> None:
    """1,030 columns, which are two programs, the second not full; rows without weight too."""
    draw = torch.Generator(device).manual_seed(0)
    both, grad = (
        torch.randn(5, columns, generator=draw, device=device).bfloat16() * 3
        for columns in (2060, 1030)
    )
    weights = torch.rand(5, 1, generator=draw, device=device)
    weights[2] = 0
    exact = [x.double() for x in (both, weights, grad)]
    hidden = swiglu.weighted_swiglu_reference(*exact[:2])
    assert near(swiglu_kernels.weighted_swiglu(both, weights), hidden, 0.51)
    for keep in (True, False):
        copies, doubles = [x.clone() for x in (both, weights, grad)], [x.clone() for x in exact]
        version = copies[0]._version
        found = swiglu_kernels.weighted_swiglu_backward(*copies, keep)
        expected = swiglu.weighted_swiglu_backward_reference(*doubles, keep)
        assert copies[0]._version > version  # a second backward pass is refused by this
        assert near(copies[0], doubles[0], 0.51)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        if keep:
            assert near(copies[2], hidden, 0.51)
        else:
            assert copies[2].equal(grad)


def rotation(device: str) -> None:
    """Of 3 heads, a number that is no power of two, and of more than a program has at a time."""
    draw = torch.Generator(device).manual_seed(0)
    cos, sin = tables_of_3_tokens(device)
    for pairing in ("neighbours", "halves"):
        for others, heads in ((5, 3), (0, 3), (8, 19)):
            wide = torch.randn(3, heads, 40, generator=draw, device=device).bfloat16()
            x = wide[..., : others + 12]  # strided
            for place in ("start", "end"):
                how = {"neighbours": pairing == "neighbours", "at_end": place == "end"}
                found = rotation_kernels.rotate(x, cos, sin, **how, back=False)
                assert same_bits(found, rope.rotate_reference(x, cos, sin, pairing, place))
                found = rotation_kernels.rotate(x, cos, sin, **how, back=True)
                assert same_bits(found, rope.rotate_reference(x, cos, -sin, pairing, place))


def latent_keys(device: str) -> None:
    """Forward to the bit; gradients of keys and values too, and the sum over heads, which is in
    fp32, near float64's.
    """
    draw = torch.Generator(device).manual_seed(0)
    cos, sin = tables_of_3_tokens(device)
    rope.kernels = lambda x: x.dtype == torch.bfloat16 and not ops.plain()
    for pairing in ("neighbours", "halves"):
        for nope, v, heads in ((5, 7, 3), (8, 4, 35)):
            kv = (
                torch.randn(3, heads, nope + v, generator=draw, device=device)
                .bfloat16()
                .requires_grad_()
            )
            k_rope = torch.randn(3, 12, generator=draw, device=device).bfloat16().requires_grad_()
            tables = cos, sin, pairing, nope
            found = rope.latent_keys(kv, k_rope, *tables)
            ops.use_plain(True)
            expected = rope.latent_keys_reference(kv, k_rope, *tables)
            ops.use_plain(False)
            upstream = [
                torch.randn(x.shape, generator=draw, device=device).bfloat16() for x in expected
            ]
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a.contiguous(), b.contiguous())
            got = torch.autograd.grad(found, (kv, k_rope), upstream)
            exact = [x.detach().double().requires_grad_() for x in (kv, k_rope)]
            outputs = rope.latent_keys_reference(*exact, *tables)
            wanted = torch.autograd.grad(outputs, exact, [x.double() for x in upstream])
            assert got[0].double().equal(wanted[0])
            largest = wanted[1].abs().max()
            assert ((got[1] - wanted[1]).abs() <= ULP / 2 * wanted[1].abs() + 1e-6 * largest).all()


def rows_in_fp8(device: str) -> None:
    """Rows in the order of their experts, each expert's followed by zeros up to a multiple; to the
    bits of the plain functions, in tiles of 1 x 128 and with a scale for each row.
    """
    draw = torch.Generator(device).manual_seed(0)
    counts, multiple, columns = [5, 0, 16, 3], 16, 1200  # more than a program has at a time
    offs = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    arrived = torch.randn(24, columns, generator=draw, device=device).bfloat16()
    arrived[3] = 0
    order = torch.randperm(24, generator=draw, device=device)
    padding = padding_of(offs, 24, multiple)
    padded = padding.pad(arrived[order])
    index = padding.index_M()
    assert index.tolist()[:17] == [*range(5), *[-1] * 11, 5]
    index = torch.where(index < 0, -1, order[index.clamp(min=0)])
    for power_of_two in (False, True):
        values, scales = mm.quantise_rows(arrived, power_of_two, index)
        tiles = F.pad(padded.float(), (0, -columns % 128)).unflatten(1, (-1, 128))
        expected = scale_of(tiles.abs().amax(2), power_of_two)
        assert same_bits(scales, expected.T.contiguous())
        in_units = encode(tiles, expected[:, :, None]).flatten(1)[:, :columns]
        assert same_bits(values, in_units.contiguous())
        values, scales = mm.quantise_whole_rows(arrived, power_of_two, index)
        expected = scale_of(padded.float().abs().amax(1), power_of_two)
        assert same_bits(scales, expected)
        assert same_bits(values, encode(padded.float(), expected[:, None]))
