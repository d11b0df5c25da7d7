"""The chunked vocabulary loss against full logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchsft.models.loss import vocabulary_loss, vocabulary_loss_reference

T, D, V = 37, 5, 11


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[::3] = -100
    loss_weights = torch.rand(T, generator=generator)
    loss_weights[::5] = 0
    return hidden, weight, labels, loss_weights


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_and_gradients_equal_full_logits(chunk, weighted):
    hidden, weight, labels, loss_weights = inputs()
    loss_weights = loss_weights.double() if weighted else None
    got = vocabulary_loss(hidden, weight, labels, loss_weights, chunk)
    expected = vocabulary_loss_reference(hidden, weight, labels, loss_weights)
    torch.testing.assert_close(got, expected)
    # A factor behind the loss, as the normaliser is.
    got_gradients = torch.autograd.grad(got * 0.37, (hidden, weight))
    torch.testing.assert_close(
        got_gradients, torch.autograd.grad(expected * 0.37, (hidden, weight))
    )


def test_tokens_without_weight_contribute_exactly_nothing():
    hidden, weight, labels, loss_weights = inputs(torch.float32)
    gradient = torch.autograd.grad(
        vocabulary_loss(hidden, weight, labels, loss_weights, 8), hidden
    )[0]
    silent = (labels == -100) | (loss_weights == 0)
    assert (gradient[silent] == 0).all() and (gradient[~silent] != 0).any(-1).all()


def test_nothing_supervised_is_zero_with_zero_gradients():
    hidden, weight, labels, _ = inputs(torch.float32)
    loss = vocabulary_loss(hidden, weight, torch.full_like(labels, -100), None, 8)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0 and all((g == 0).all() for g in gradients)


def test_a_frozen_output_embedding_gets_no_gradient():
    hidden, weight, labels, loss_weights = inputs()
    loss = vocabulary_loss(hidden, weight.detach(), labels, loss_weights, 8)
    expected = vocabulary_loss_reference(hidden, weight.detach(), labels, loss_weights)
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    )


def test_bf16_gradients_are_within_bf16_rounding_of_exact_ones():
    """Logits and their gradient are rounded to bf16 once each (2^-8 relative), sums stay fp32."""
    hidden, weight, labels, loss_weights = inputs()
    exact = torch.autograd.grad(
        vocabulary_loss_reference(hidden, weight, labels, loss_weights), (hidden, weight)
    )
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    got = torch.autograd.grad(vocabulary_loss(*low, labels, loss_weights, 8), low)
    for value, reference in zip(got, exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - reference).abs().max() <= 0.02 * reference.abs().max()


def test_a_second_backward_is_refused():
    hidden, weight, labels, loss_weights = inputs()
    loss = vocabulary_loss(hidden, weight, labels, loss_weights, 8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


@pytest.mark.parametrize("first", [0, 1])
def test_gradients_can_be_taken_in_two_passes(first):
    """As zero-bubble pipelines do: of the hidden states, and later of the weight."""
    hidden, weight, labels, loss_weights = inputs()
    expected = torch.autograd.grad(
        vocabulary_loss_reference(hidden, weight, labels, loss_weights.double()), (hidden, weight)
    )
    loss = vocabulary_loss(hidden, weight, labels, loss_weights.double(), 8)
    for one in (first, 1 - first):
        torch.testing.assert_close(
            torch.autograd.grad(loss, (hidden, weight)[one], retain_graph=True)[0], expected[one]
        )
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, weight)


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation returned, and the number of operations."""

    entries = operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_full_logits_never_exist():
    hidden, weight, labels, loss_weights = inputs(torch.float32)
    with Largest() as largest:
        vocabulary_loss(hidden, weight, labels, loss_weights, 8).backward()
    assert 0 < largest.entries < T * V // 2


def test_evaluation_computes_no_gradients():
    hidden, weight, labels, loss_weights = inputs(torch.float32)
    with Largest() as training:
        vocabulary_loss(hidden, weight, labels, loss_weights, 8)
    with torch.no_grad(), Largest() as evaluation:
        loss = vocabulary_loss(hidden, weight, labels, loss_weights, 8)
    assert not loss.requires_grad
    assert evaluation.operations < 0.7 * training.operations
