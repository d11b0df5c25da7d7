"""Products of torchao's float8 training (torchao.float8), on plain tensors.

Recipes, dynamic scales in all: `rowwise` (e4m3, a power-of-two scale for each row of a factor,
along its inner dim), `tensorwise` (one scale for a tensor; gradients in e5m2), and
`rowwise_with_gw_hp` (rowwise, but gradients of weights are not in fp8, and the weight has one scale
in the gradient of the rows).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

# torch._scaled_mm multiplies matrices whose dims are multiples of this.
MULTIPLE = 16
CAPABILITY = 8, 9
E4M3 = torch.float8_e4m3fn


def float8_product(recipe: str, emulate: bool) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the product of `Linear.product` by a recipe of torchao.

    Both gradients are computed whenever one is asked for, as torchao does.

    Args:
        recipe: a name of torchao's.
        emulate: round to fp8 and multiply in fp32; for devices that have no fp8 product.
    """
    # torchao takes seconds to import
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    # Tokens, the inner dim of a weight's gradient, are of any number: padded.
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=not emulate
    )
    gemms = config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight
    products = LinearMMConfig(
        *(ScaledMMConfig(emulate, gemm.use_fast_accum, False, not emulate) for gemm in gemms)
    )

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), products, config)
        return y if bias is None else y + bias

    if recipe == "tensorwise":
        # what a weight is before it is gathered (parallel/float8.py::gather_in_float8)
        cast = WeightWithDynamicFloat8CastTensor
        product.cast = partial(cast, linear_mm_config=products, dtype=E4M3)
    return product
