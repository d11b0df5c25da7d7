"""RMSNorm against torch's own."""

import pytest
import torch

from tests.ops.passes import Operations
from torchsft.ops.rms_norm import rms_norm, rms_norm_of_parts, rms_norm_reference


def test_rms_norm_equals_its_reference():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_parts_of_rows_are_normed_as_whole_rows():
    """Two parts, whose mean squares are averaged: float64, with gradients; in bf16 one rounding."""
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def by_parts(x, weight):
        of_both = x.unflatten(-1, (2, 4)).square().mean(-1).mean(-1, keepdim=True)
        parts = zip(x.chunk(2, -1), weight.chunk(2), strict=True)
        return torch.cat([rms_norm_of_parts(*p, 1e-3, lambda _: of_both) for p in parts], -1)

    got, expected = by_parts(x, weight), rms_norm_reference(x, weight, 1e-3)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(y, (x, weight), upstream) for y in (got, expected)]
    torch.testing.assert_close(*gradients)
    half = torch.randn(64, 32).bfloat16()
    mean = half.double().square().mean(-1, keepdim=True)
    got = rms_norm_of_parts(half, torch.ones(32).bfloat16(), 1e-6, lambda square: square)
    exact = half.double() / (mean + 1e-6).sqrt()
    assert got.dtype == torch.bfloat16 and ((got - exact).abs() <= exact.abs() * 2**-8).all()


def test_bf16_is_computed_in_fp32():
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    exact = rms_norm_reference(x.double(), weight.double(), 1e-6)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert ((got - exact).abs() <= exact.abs() * 2**-8).all()  # one rounding to 8 bits


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_can_be_taken_in_two_passes(first):
    """As zero-bubble pipelines do; what a pass does not want, it does not compute."""
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    expected = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), (x, weight))
    loss = rms_norm(x, weight, 1e-6).square().sum()
    for one in (first, 1 - first):
        with Operations() as operations:
            (gradient,) = torch.autograd.grad(loss, (x, weight)[one], retain_graph=True)
        assert gradient.equal(expected[one])
        assert operations.count["aten::addcmul_"] == (one == 0)
