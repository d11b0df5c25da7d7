"""Products in float8 against the modules that torchao converts to float8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from torchsft.precision.float8 import float8_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "rowwise_with_gw_hp"])
def test_products_are_those_of_torchao_bit_by_bit(recipe, dtype):
    """Output, gradients of rows, weight and bias; tokens are no multiple of 16."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, dtype=dtype)
    x = (torch.randn(2, 19, 48) * torch.rand(48)).to(dtype)
    grad = torch.randn(2, 19, 32).to(dtype)
    mine = [t.detach().clone().requires_grad_() for t in (x, linear.weight, linear.bias)]
    y = float8_product(recipe, emulate=True)(*mine)
    y.backward(grad)
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    theirs = convert_to_float8_training(nn.Sequential(linear), config=config)
    x.requires_grad_()
    expected = theirs(x)
    expected.backward(grad)
    assert torch.equal(y, expected)
    for found, tensor in zip(mine, (x, theirs[0].weight, theirs[0].bias), strict=True):
        assert torch.equal(found.grad, tensor.grad)
    # and it is fp8: e4m3 keeps 4 bits, so rows of 48 products err by 1 to 10 %
    exact = nn.functional.linear(*(t.double() for t in (x, linear.weight, linear.bias)))
    assert 0.01 < (y - exact).norm() / exact.norm() < 0.1
