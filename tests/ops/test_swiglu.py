"""SwiGLU functions against their plain twins."""

from unittest import mock

import pytest
import torch

from tests.ops.passes import Operations
from torchsft.ops.sliced import cut, sliced
from torchsft.ops.swiglu import (
    grouped_swiglu,
    grouped_swiglu_reference,
    swiglu,
    swiglu_reference,
)

D, F = 16, 8


def arguments(rows, experts):
    """Rows, gate|up, down and the rows' weights."""
    shapes = [(rows, D), (experts, 2 * F, D), (experts, D, F), (rows, 1)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def network(x, weights, offs, gate_up, down):
    """`grouped_swiglu`, as `sliced` calls it."""
    return grouped_swiglu(x, gate_up, down, weights, offs)


def test_swiglu_equals_its_reference():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("counts", [[3, 0, 9, 4], [0, 0, 0, 5], [0, 0, 0, 0]])
def test_grouped_swiglu_equals_its_float64_reference(counts):
    """Also with experts, or a whole rank, without rows. fp32 sums over at most 16 terms: 1e-5 of
    the largest entry.
    """
    torch.manual_seed(0)
    inputs = arguments(sum(counts), len(counts))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    got, expected = grouped_swiglu(*inputs, offs), grouped_swiglu_reference(*exact, offs)
    upstream = torch.randn(got.shape)
    got_gradients = torch.autograd.grad(got, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for value, reference in zip(
        [got, *got_gradients], [expected, *expected_gradients], strict=True
    ):
        largest = reference.abs().max() if reference.numel() else 1
        assert ((value - reference).abs() <= 1e-5 * largest).all()


def test_an_expanded_gradient_is_accepted():
    """`y.sum()` sends a gradient of stride 0, which grouped_mm itself refuses."""
    inputs = arguments(4, 2)
    grouped_swiglu(*inputs, torch.tensor([1, 4], dtype=torch.int32)).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_frozen_experts_get_no_gradient_and_rows_still_do():
    """2 grouped products in the backward pass, in place of 4."""
    x, gate_up, down, weights = arguments(4, 2)
    inputs = x, gate_up.detach(), down.detach(), weights
    offs = torch.tensor([1, 4], dtype=torch.int32)
    loss = grouped_swiglu(*inputs, offs).square().sum()
    with Operations() as backward:
        got = torch.autograd.grad(loss, (x, weights))
    assert backward.count["aten::_grouped_mm"] == 2
    plain = grouped_swiglu_reference(*inputs, offs).square().sum()
    expected = torch.autograd.grad(plain, (x, weights))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_second_backward_through_one_graph_is_refused():
    """The backward pass overwrites what it saved; silently reusing it would be a wrong gradient."""
    inputs = arguments(4, 2)
    y = grouped_swiglu(*inputs, torch.tensor([1, 4], dtype=torch.int32)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "passes", [[[0, 3], [1, 2]], [[1, 2], [0, 3]], [[0], [1], [2, 3]], [[2], [3, 0, 1]]]
)
def test_gradients_can_be_taken_in_several_passes(passes):
    """As zero-bubble pipelines do: of the rows, and later of the weights; each as in one pass, bit
    by bit.
    """
    torch.manual_seed(0)
    inputs = arguments(9, 3)
    offs, upstream = torch.tensor([2, 2, 9], dtype=torch.int32), torch.randn(9, D)
    expected = torch.autograd.grad(grouped_swiglu(*inputs, offs), inputs, upstream)
    y = grouped_swiglu(*inputs, offs)
    for wanted in passes:
        gradients = torch.autograd.grad(y, [inputs[i] for i in wanted], upstream, retain_graph=True)
        for i, gradient in zip(wanted, gradients, strict=True):
            assert gradient.equal(expected[i])


def test_two_passes_cost_what_one_does():
    """4 grouped products, the two of the forward pass not counted; nothing is computed twice."""
    inputs = arguments(9, 3)
    offs = torch.tensor([2, 2, 9], dtype=torch.int32)
    y = grouped_swiglu(*inputs, offs).sum()
    with Operations() as rows:
        torch.autograd.grad(y, inputs[0], retain_graph=True)
    with Operations() as weights:
        torch.autograd.grad(y, inputs[1:3], retain_graph=True)
    assert rows.count["aten::_grouped_mm"] == weights.count["aten::_grouped_mm"] == 2
    assert weights.count["aten::silu"] == weights.count["aten::silu_backward"] == 0


def test_rows_in_two_passes_cannot_be_asked_for_twice():
    inputs = arguments(4, 2)
    y = grouped_swiglu(*inputs, torch.tensor([1, 4], dtype=torch.int32)).sum()
    for wanted in (inputs[:1], inputs[1:]):
        torch.autograd.grad(y, wanted, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, inputs[0])


def test_bf16_outputs_are_rounded_before_and_after_the_down_projection_alone():
    """Where the weight is applied to rounded outputs, the relative error is 1.2 times as large."""
    torch.manual_seed(0)
    rows, offs = 512, torch.tensor([200, 512], dtype=torch.int32)
    shapes = [(rows, 64), (2, 256, 64), (2, 64, 128)]
    x, gate_up, down = (torch.randn(shape).bfloat16() for shape in shapes)
    weights = torch.rand(rows, 1)
    exact = [tensor.double() for tensor in (x, gate_up, down, weights)]
    expected = grouped_swiglu_reference(*exact, offs)
    got = grouped_swiglu(x, gate_up, down, weights, offs)
    ones = torch.ones_like(weights)
    twice = grouped_swiglu(x, gate_up, down, ones, offs) * weights.bfloat16()
    error, error_of_twice = ((y - expected).norm() / expected.norm() for y in (got, twice))
    assert error < 0.9 * error_of_twice


@pytest.mark.parametrize(("size", "is_sorted"), [(4, True), (7, False), (20, False)])
@pytest.mark.parametrize("passes", [[[0, 1, 2, 3]], [[0, 3], [1, 2]], [[0, 3]]])
def test_slices_of_rows_compute_what_all_of_them_do(size, is_sorted, passes):
    """Experts fill several slices, share one, or have no rows. Rows that come in another order
    leave in it. In one pass, and in the two of zero-bubble pipelines. A CPU multiplies few rows in
    another order than many, and sums over slices are in another order too: 1e-5 of the largest
    entry.
    """
    torch.manual_seed(0)
    inputs = arguments(19, 4)
    ends = [3, 3, 15, 19]
    offs, upstream = torch.tensor(ends, dtype=torch.int32), torch.randn(19, D)
    y = grouped_swiglu(*inputs, offs)
    expected = torch.autograd.grad(y, inputs, upstream)
    x, gate_up, down, weights = inputs
    order = torch.arange(19) if is_sorted else torch.randperm(19)
    came = order.argsort()
    given = x.detach()[came].requires_grad_()
    inputs = given, gate_up, down, weights
    how = network, size, ends, None if is_sorted else order
    some = sliced(*how, given, weights, offs, gate_up, down)
    assert ((some - y[came]).abs() <= 1e-5 * y.abs().max()).all()
    upstream = upstream[came]
    for wanted in passes:
        gradients = torch.autograd.grad(
            some, [inputs[i] for i in wanted], upstream, retain_graph=True
        )
        for i, gradient in zip(wanted, gradients, strict=True):
            gradient = gradient[order] if i == 0 else gradient
            error = (gradient - expected[i]).abs()
            assert (error <= 1e-5 * expected[i].abs().max()).all()


def test_gradients_that_nobody_asks_for_take_no_memory():
    """Of frozen experts, or in the first of a zero-bubble pipeline's passes those of parameters."""
    x, gate_up, down, weights = arguments(19, 4)
    offs = torch.tensor([3, 3, 15, 19], dtype=torch.int32)
    y = sliced(network, 7, offs.tolist(), None, x, weights, offs, gate_up, down)
    for wanted, made in (([x, weights], {x.shape, weights.shape}), ([down], {down.shape})):
        with mock.patch.object(torch, "empty_like", wraps=torch.empty_like) as empty_like:
            torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        assert {call.args[0].shape for call in empty_like.call_args_list} == made


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([3, 3, 15, 19], "0-2: 0-3, 2-3: 3-8, 2-3: 8-13, 2-3: 13-15, 3-4: 15-19"),
        ([0, 7, 8, 8], "0-1: 0-0, 1-2: 0-5, 1-2: 5-7, 2-4: 7-8"),
        ([2, 4, 5, 9], "0-3: 0-5, 3-4: 5-9"),
    ],
)
def test_slices_are_whole_experts_or_a_part_of_one(ends, expected):
    """Of at most 5 rows."""
    found = [f"{e.start}-{e.stop}: {rows.start}-{rows.stop}" for e, rows in cut(ends, 5)]
    assert ", ".join(found) == expected


def test_slices_sum_gradients_of_weights_in_fp32():
    """41 slices in bf16: as far from float64 as all rows at once, where sums in bf16 would be
    several times as far.
    """
    torch.manual_seed(0)
    offs = torch.tensor([400, 640], dtype=torch.int32)
    shapes = [(640, D), (2, 2 * F, D), (2, D, F)]
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    inputs.append(torch.rand(640, 1))
    upstream = torch.randn(640, D)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = torch.autograd.grad(
        grouped_swiglu_reference(*exact, offs), exact[1:3], upstream.double()
    )
    errors = []
    x, gate_up, down, weights = inputs
    in_slices = sliced(network, 16, [400, 640], None, x, weights, offs, gate_up, down)
    for y in (grouped_swiglu(*inputs, offs), in_slices):
        gradients = torch.autograd.grad(y, inputs[1:3], upstream.bfloat16())
        errors.append(
            [(g - r).norm() / r.norm() for g, r in zip(gradients, reference, strict=True)]
        )
    for whole, of_slices in zip(*errors, strict=True):
        assert of_slices < 1.3 * whole
