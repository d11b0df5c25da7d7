"""Compares the kernels of block-wise fp8, run by Triton's interpreter on a CPU, with the plain
products; a program, since triton must be imported with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.checkpoint.sources import same_bits
from tests.ops import interpreted_rows
from tests.precision.test_blockwise_compute import (
    assert_equal_sums,
    assert_no_sorted_copy_is_needed,
    experts,
    numbers,
)
from torchsft.ops import blockwise_mm as mm
from torchsft.precision.blockwise import quantise
from torchsft.precision.blockwise_kernels import BlockwiseKernels

converted = interpreter._convert_float


NARROW = {
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.bfloat16: (torch.bfloat16, torch.int16),
}


def converted_as_devices_do(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter's own conversion loses the carry, so that 31.9 becomes 16 in e4m3, not 32,
    and cuts bf16 off.
    """
    if source != tl.float32 or target not in NARROW:
        return converted(values, source, target, rounding)
    exact = torch.from_numpy(numpy.ascontiguousarray(values).view(numpy.float32))
    dtype, bits = NARROW[target]
    return exact.to(dtype).view(bits).numpy()


def main() -> None:
    interpreter._convert_float = converted_as_devices_do
    interpreted_rows.swiglu_rows("cpu")
    interpreted_rows.grouped_swiglu("cpu")
    interpreted_rows.rotation("cpu")
    interpreted_rows.latent_keys("cpu")
    interpreted_rows.rows_in_fp8("cpu")
    for power_of_two in (False, True):
        (x, w, dy, offs), (y, dx, dw) = experts(power_of_two)
        products = BlockwiseKernels(power_of_two, keep=True)
        assert_equal_sums(products.forward(x, w, offs), y)
        assert_equal_sums(products.grad_rows(dy, w, offs), dx)
        assert_equal_sums(products.grad_weight(dy, x, offs), dw)
        for transposed, (_, found) in products.kept.items():
            for expert, matrix in enumerate(w):  # the bytes of a file
                q, scale = quantise(matrix, power_of_two=power_of_two)
                values = found.values[expert]
                assert same_bits((values.mT if transposed else values).contiguous(), q)
                assert same_bits(found.scales[expert], scale)

    assert_no_sorted_copy_is_needed(BlockwiseKernels(True), "cpu")

    # What is kept is kept until the optimizer's step, or a change of the weight itself.
    weight, x = torch.nn.Parameter(numbers(96, 40)), numbers(7, 40).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    made, plain = [], mm.quantise_weight
    mm.quantise_weight = lambda *a: made.append(a[0].clone()) or plain(*a)
    for keep in (True, False):
        made.clear()
        products = BlockwiseKernels(keep=keep)
        for _ in range(2):
            for _ in range(2):
                products.linear(x, weight, None).sum().backward()
            optimizer.step()
        assert len(made) == (4 if keep else 8)
        assert not made[0].equal(made[-1]) and made[-2].equal(made[-1])
    with torch.no_grad():
        products = dataclasses.replace(products, keep=True)
        first = products.linear(x, weight, None)
        weight.mul_(2)
        torch.testing.assert_close(products.linear(x, weight, None), 2 * first)

    # nan and inf stay visible, in what they meet alone
    for wrong in (float("nan"), float("inf")):
        for power_of_two in (False, True):
            spoilt = x.detach().clone()
            spoilt[3, 5] = wrong
            values, scales = mm.quantise_rows(spoilt, power_of_two)
            finite = (values.float() * scales.T).isfinite()
            assert not finite[3, 5] and finite[:3].all() and finite[4:].all()


if __name__ == "__main__":
    main()
