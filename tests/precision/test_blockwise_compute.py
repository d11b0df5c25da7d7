"""Products in block-wise fp8 against plain loops over tiles in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.checkpoint.deepseek_format import quantised
from tests.checkpoint.sources import same_bits
from torchsft.ops.permute import Order, combine, permute
from torchsft.ops.swiglu import grouped_swiglu, grouped_swiglu_reference
from torchsft.precision.blockwise import dequantise, quantise
from torchsft.precision.blockwise_compute import BlockwiseProducts, rounded

# Inner dims of 4.5 and 1.5 tiles, experts with rows of less than a tile, several, and none.
INPUTS, OUTPUTS, COUNTS = 576, 192, [150, 0, 3, 128]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values of different sizes in different rows and columns."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw)
    return values * torch.rand(shape[-2], 1, generator=draw) * torch.rand(shape[-1], generator=draw)


def held(matrix: torch.Tensor, height: int, width: int, power_of_two: bool) -> torch.Tensor:
    """What fp8 holds of a matrix with a scale for each tile; a loop, float64."""
    result = torch.zeros_like(matrix, dtype=torch.float64)
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            tile = matrix[top : top + height, left : left + width]
            scale = tile.abs().max() / 448
            scale = torch.ones(()) if scale == 0 else scale
            if power_of_two:
                scale = torch.exp2(scale.log2().ceil())
            codes = (tile / scale).to(torch.float8_e4m3fn)
            result[top : top + height, left : left + width] = codes.double() * scale.double()
    return result


def experts(power_of_two: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rows, weights, gradients and bounds; and y, dx, dw by the definition, an expert at a time."""
    rows = sum(COUNTS)
    x, w, dy = (
        numbers(rows, INPUTS),
        numbers(len(COUNTS), OUTPUTS, INPUTS),
        numbers(rows, OUTPUTS, seed=1),
    )
    y, dx, dw = [], [], []
    for x_e, dy_e, w_e in zip(x.split(COUNTS), dy.split(COUNTS), w, strict=True):
        w_held = held(w_e, 128, 128, power_of_two)
        y.append(held(x_e, 1, 128, power_of_two) @ w_held.T)
        dx.append(held(dy_e, 1, 128, power_of_two) @ w_held)
        dw.append(held(dy_e, 128, 1, power_of_two).T @ held(x_e, 128, 1, power_of_two))
    offs = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    return [x, w, dy, offs], [torch.cat(y), torch.cat(dx), torch.stack(dw)]


def assert_equal_sums(found: torch.Tensor, exact: torch.Tensor) -> None:
    """The same terms, summed in fp32: at most 1e-6 of the largest entry apart."""
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_products_of_experts_are_those_of_the_definition(power_of_two):
    (x, w, dy, offs), (y, dx, dw) = experts(power_of_two)
    products = BlockwiseProducts(power_of_two)
    assert_equal_sums(products.forward(x, w, offs), y)
    assert_equal_sums(products.grad_rows(dy, w, offs), dx)
    assert_equal_sums(products.grad_weight(dy, x, offs), dw)


def assert_no_sorted_copy_is_needed(products: BlockwiseProducts, device: str) -> None:
    """Experts' networks that sort tokens while they quantise them, with one row each and with two,
    give the bits of those behind `permute`.
    """
    offs = torch.tensor([5, 5, 150, 156], dtype=torch.int32, device=device)
    for tokens in (156, 78):
        order_R = torch.randperm(156, generator=torch.Generator().manual_seed(0)).to(device)
        order = Order(order_R, order_R.argsort().view(tokens, -1))
        inputs = numbers(tokens, 160), numbers(4, 256, 160), numbers(4, 160, 128)
        leaves = [x.to(device, torch.bfloat16).requires_grad_() for x in inputs]
        leaves.append(torch.rand(156, 1, device=device, requires_grad=True))
        upstream = numbers(tokens, 160, seed=1).to(device, torch.bfloat16)
        x, *rest = leaves
        y = combine(grouped_swiglu(permute(x, *order), *rest, offs, (products,) * 2), *order)
        both = replace(products, input_order=order), replace(products, output_order=order)
        fused = grouped_swiglu(x, *rest, offs, both)
        assert same_bits(fused, y)
        expected = torch.autograd.grad(y, leaves, upstream)
        for got, wanted in zip(torch.autograd.grad(fused, leaves, upstream), expected, strict=True):
            assert same_bits(got, wanted)


def test_rows_are_quantised_in_any_order():
    assert_no_sorted_copy_is_needed(BlockwiseProducts(power_of_two=True), "cpu")


def test_a_linear_map_has_the_products_of_one_expert():
    """Also where rows have two dims; its bias is added to the product."""
    x, w, dy = numbers(150, INPUTS), numbers(OUTPUTS, INPUTS), numbers(150, OUTPUTS, seed=1)
    bias = torch.randn(OUTPUTS, requires_grad=True)
    x_leaf, w_leaf = x.view(3, 50, INPUTS).requires_grad_(), w.clone().requires_grad_()
    y = BlockwiseProducts().linear(x_leaf, w_leaf, bias)
    y.backward(dy.view_as(y))
    w_held = held(w, 128, 128, False)
    exact = held(x.detach(), 1, 128, False) @ w_held.T + bias.detach()
    assert_equal_sums(y.detach().flatten(0, 1), exact)
    assert_equal_sums(x_leaf.grad.flatten(0, 1), held(dy, 1, 128, False) @ w_held)
    exact = held(dy, 128, 1, False).T @ held(x.detach(), 128, 1, False)
    assert_equal_sums(w_leaf.grad, exact)
    torch.testing.assert_close(bias.grad, dy.sum(0))


@pytest.mark.parametrize("passes", [[[0], [1]], [[1], [0]]])
def test_gradients_can_be_taken_in_two_passes(passes):
    """As zero-bubble pipelines do; each as in one pass, bit by bit, and nothing besides it."""
    inputs = [numbers(60, 200).requires_grad_(), numbers(96, 200).requires_grad_()]
    dy, asked = numbers(60, 96, seed=1), []

    class Counting(BlockwiseProducts):
        def grad_rows(self, *arguments):
            asked.append(0)
            return super().grad_rows(*arguments)

        def grad_weight(self, *arguments):
            asked.append(1)
            return super().grad_weight(*arguments)

    expected = torch.autograd.grad(BlockwiseProducts().linear(*inputs, None), inputs, dy)
    y = Counting().linear(*inputs, None)
    for wanted in passes:
        leaves = [inputs[i] for i in wanted]
        found = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        assert found[0].equal(expected[wanted[0]])
    assert asked == [i for wanted in passes for i in wanted]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_weights_are_rounded_to_what_files_hold(power_of_two):
    """Bit by bit: what is trained is what an fp8 export holds. A fused gate|up is two matrices."""
    w = numbers(400, 300)
    q, scale = quantise(w, power_of_two=power_of_two)
    assert same_bits(rounded(w, (128, 128), power_of_two), dequantise(q, scale))
    q, scale = quantised(w[:200], power_of_two)
    upper = BlockwiseProducts(power_of_two, parts=2).held(w.unsqueeze(0))[0, :200]
    assert same_bits(upper.contiguous(), dequantise(q, scale))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(wrong, power_of_two):
    """So that a step with such a gradient is skipped; a weight raises no error here."""
    (x, w, dy, offs), _ = experts(False)
    products = BlockwiseProducts(power_of_two)
    for spoilt in (x, w, dy):
        before = spoilt[..., 5, 7].clone()
        spoilt[..., 5, 7] = wrong
        results = [
            products.forward(x, w, offs),
            products.grad_rows(dy, w, offs),
            products.grad_weight(dy, x, offs),
        ]
        finite = [result.isfinite().all().item() for result in results]
        assert finite == [spoilt is dy, spoilt is x, spoilt is w]
        spoilt[..., 5, 7] = before


def test_the_error_of_a_product_is_that_of_three_bits():
    """e4m3 rounds a mantissa m in [1, 2) by up to 1/16, uniformly: by 2.6 % of a value (root mean
    square over m), so a term by 3.6 %; terms err independently, so their sum by the same share of
    itself. DeepGEMM's difference, 1 - 2 <a, b> / (|a|^2 + |b|^2), is half the square: 7e-4.
    """
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(512, n, generator=draw) for n in (1536, 576))
    w = torch.randn(576, 1536, generator=draw) * 0.02
    products, offs = BlockwiseProducts(), torch.tensor([512], dtype=torch.int32)
    for found, exact in (
        (products.forward(x, w[None], offs), x @ w.T),
        (products.grad_rows(dy, w[None], offs), dy @ w),
        (products.grad_weight(dy, x, offs)[0], dy.T @ x),
    ):
        assert (found - exact).norm() < 0.038 * exact.norm()
        squares = found.square().sum() + exact.square().sum()
        assert 1 - 2 * (found * exact).sum() / squares < 7.5e-4


# gradients that are asked for together: all, or as zero-bubble pipelines go
PASSES = [[[0, 1, 2, 3]], [[0, 3], [1, 2]]]


def check_experts(pair, width: int, inner: int, passes: list[list[int]]) -> None:
    """Compare grouped products, of gate|up and of down, with one product an expert: the same terms,
    summed in fp32.
    """
    offs = torch.tensor([3, 3, 135, 140], dtype=torch.int32)
    shapes = [(140, width), (4, 2 * inner, width), (4, width, inner), (140, 1)]
    inputs = [numbers(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    dy = numbers(140, width, seed=4)
    expected_y = grouped_swiglu_reference(*inputs, offs, pair)
    expected = torch.autograd.grad(expected_y, inputs, dy)
    y = grouped_swiglu(*inputs, offs, pair)
    assert_equal_sums(y, expected_y)
    for wanted in passes:
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, retain_graph=True)
        for i, gradient in zip(wanted, found, strict=True):
            assert_equal_sums(gradient, expected[i])


@pytest.mark.parametrize("passes", PASSES)
def test_experts_multiply_in_blocks(passes):
    pair = BlockwiseProducts(parts=2), BlockwiseProducts()
    check_experts(pair, width=144, inner=80, passes=passes)
