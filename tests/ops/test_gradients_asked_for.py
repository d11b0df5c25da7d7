"""What `torchsft.ops.gradients_asked_for` says inside a backward pass: it rests on a private
function of torch.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchsft.ops import gradients_asked_for
from torchsft.parallel.torch_pipelining import weight_pass_possible


class Product(torch.autograd.Function):
    """x * w, noting what each pass wants."""

    asked: list[list[bool]]

    @staticmethod
    def forward(ctx, x, w, number):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        Product.asked.append(gradients_asked_for(ctx))
        return grad * w, grad * x, None


@pytest.fixture(autouse=True)
def forget():
    Product.asked = []


@pytest.mark.parametrize("leaves", [True, False])
def test_each_pass_of_two_wants_its_own(leaves):
    """Leaves are what torch's function refuses to tell of; behind other operations it tells."""
    x, w = (torch.randn(3, requires_grad=True) for _ in range(2))
    y = Product.apply(x, w, 2) if leaves else Product.apply(x.exp(), w.exp(), 2)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), w, retain_graph=True)
    torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    y.sum().backward(retain_graph=True)
    y.sum().backward(inputs=[w])
    assert Product.asked == [
        [True, False],
        [False, True],
        [True, True],
        [True, True],
        [False, True],
    ]


@pytest.mark.skipif(
    not weight_pass_possible(), reason="torch 2.11 cannot start a pass at an autograd Function"
)
def test_from_the_edges_of_a_pipeline_too():
    """torch's weight pass starts at a node inside the graph and ends at the weight's
    accumulator.
    """
    x, w = (torch.randn(3, requires_grad=True) for _ in range(2))
    y = Product.apply(x.exp(), w, 2)
    node = y.grad_fn
    end = torch.autograd.graph.get_gradient_edge(w)
    torch.autograd.grad(
        [torch.autograd.graph.GradientEdge(node, 0)], [end], grad_outputs=[torch.ones(3)]
    )
    assert Product.asked == [[False, True]]


def test_what_needs_no_gradient_is_not_wanted():
    Product.apply(torch.randn(3), torch.randn(3, requires_grad=True), 2).sum().backward()
    Product.apply(torch.randn(3, requires_grad=True), torch.randn(3), 2).sum().backward()
    assert Product.asked == [[False, True], [True, False]]


def test_recomputation_asks_once_in_the_backward_pass():
    x, w = (torch.randn(3, requires_grad=True) for _ in range(2))
    y = checkpoint(lambda x: Product.apply(x.exp(), w, 2).sum(), x, use_reentrant=False)
    torch.autograd.grad(y, x)
    assert Product.asked == [[True, False]]


def test_a_weight_pass_is_possible_since_torch_2_13():
    """If a later torch takes it away, zero-bubble schedules would lose their point; 2.12 was not
    tried.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        assert weight_pass_possible()
