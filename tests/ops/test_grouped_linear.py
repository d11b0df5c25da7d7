"""Linear maps of many experts against their plain twin."""

import pytest
import torch
import torch.nn.functional as F

from torchsft.ops import grouped
from torchsft.ops.grouped import leaves_gradients_without_rows
from torchsft.ops.grouped_linear import grouped_linear, grouped_linear_reference

INPUTS, OUTPUTS = 16, 8


def arguments(counts):
    torch.manual_seed(0)
    shapes = [(sum(counts), INPUTS), (len(counts), INPUTS, OUTPUTS), (len(counts), OUTPUTS)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return tensors, torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", [[3, 0, 9, 4], [0, 0, 0, 5]])
def test_outputs_and_gradients_equal_the_float64_reference(counts):
    """Also with experts without rows, whose gradients are zero; fp32 sums over at most 16 terms:
    1e-5 of the largest entry.
    """
    inputs, offs = arguments(counts)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = grouped_linear(*inputs, offs), grouped_linear_reference(*exact, offs)
    upstream = torch.randn(got.shape)
    values = [got, *torch.autograd.grad(got, inputs, upstream)]
    references = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for value, reference in zip(values, references, strict=True):
        assert ((value - reference).abs() <= 1e-5 * reference.abs().max()).all()


def test_a_bias_gets_the_sum_over_many_rows_in_bf16():
    """4096 times 1: a running sum in bf16 would stop at 256."""
    weight = torch.zeros(2, INPUTS, OUTPUTS, dtype=torch.bfloat16)
    bias = torch.zeros(2, OUTPUTS, dtype=torch.bfloat16, requires_grad=True)
    x = torch.ones(4096, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    offs = torch.tensor([1024, 4096], dtype=torch.int32)
    grouped_linear(x, weight, bias, offs).sum().backward()
    assert bias.grad.tolist() == [[1024.0] * OUTPUTS, [3072.0] * OUTPUTS]


@pytest.mark.parametrize(("capability", "zeroed"), [((9, 0), False), ((10, 0), True)])
def test_gradients_of_experts_without_rows_are_zeroed_where_kernels_do_not_write_them(
    monkeypatch, capability, zeroed
):
    """GPUs from SM100 on (pytorch issue 172439); played by a CPU that leaves what memory held."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda")
    monkeypatch.setattr(grouped, "leaves_gradients_without_rows", lambda _: played)
    played = leaves_gradients_without_rows(device)
    assert played == zeroed and not leaves_gradients_without_rows(torch.device("cpu"))
    monkeypatch.setattr(F, "grouped_mm", lambda *_, **__: torch.full((3, 4, 4), 7.0))
    offs = torch.tensor([2, 2, 3], dtype=torch.int32)
    gradient = grouped.Products().grad_weight(torch.ones(3, 4), torch.ones(3, 4), offs)
    assert gradient[:, 0, 0].tolist() == [7, 0 if zeroed else 7, 7]


@pytest.mark.parametrize("passes", [[[0], [1, 2]], [[1, 2], [0]]])
def test_gradients_can_be_taken_in_several_passes(passes):
    """As zero-bubble pipelines do: of the rows, and later of the weights."""
    inputs, offs = arguments([3, 0, 9, 4])
    expected = torch.autograd.grad(grouped_linear(*inputs, offs).square().sum(), inputs)
    loss = grouped_linear(*inputs, offs).square().sum()
    for wanted in passes:
        chosen = [inputs[i] for i in wanted]
        found = torch.autograd.grad(loss, chosen, retain_graph=True)
        assert all(torch.equal(g, expected[i]) for g, i in zip(found, wanted, strict=True))
