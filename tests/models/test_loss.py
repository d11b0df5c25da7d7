"""The chunked vocabulary loss against full logits."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torchsft.models.loss import (
    Objective,
    chunk_size,
    vocabulary_loss,
    vocabulary_loss_reference,
)

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
def test_loss_and_gradients_equal_full_logits(chunk, weighted, monkeypatch):
    monkeypatch.setattr("torchsft.models.loss.LOGITS_IN_CACHE", 3 * V)  # three tokens at a time
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


@pytest.mark.parametrize("objective", [(0.2, 0.0), (0.0, 0.03), (0.2, 0.03)])
@pytest.mark.parametrize("function", ["chunks", "reference"])
def test_label_smoothing_and_z_loss_change_the_gradients_and_are_summed_apart(
    objective, function, monkeypatch
):
    """Against F.cross_entropy(label_smoothing=) and PaLM's formula on full logits."""
    monkeypatch.setattr("torchsft.models.loss.LOGITS_IN_CACHE", 3 * V)
    hidden, weight, labels, loss_weights = inputs()
    loss_weights, (smoothing, z) = loss_weights.double(), objective
    logits = hidden @ weight.T
    keywords = {"reduction": "none", "ignore_index": -100}
    supervised = loss_weights * (labels != -100)
    smooth = F.cross_entropy(logits, labels, label_smoothing=smoothing, **keywords) @ supervised
    squares = logits.logsumexp(-1).square() @ supervised
    sums = torch.zeros(2, dtype=torch.float64)
    chunk = {"chunk": 8} if function == "chunks" else {}
    compute = vocabulary_loss if function == "chunks" else vocabulary_loss_reference
    options = {"objective": Objective(*objective), "sums": sums}
    loss = compute(hidden, weight, labels, loss_weights, **chunk, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, **keywords) @ supervised)
    torch.testing.assert_close(sums, torch.stack([smooth, squares]).detach())
    torch.testing.assert_close(
        torch.autograd.grad(loss * 0.37, (hidden, weight)),
        torch.autograd.grad((smooth + z * squares) * 0.37, (hidden, weight)),
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


class Held(TorchDispatchMode):
    """Bytes of all storages that operations returned and that are still alive, at most; `inputs`
    do not count.
    """

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage() for tensor in inputs}
        self.sizes, self.peak = weakref.WeakKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.inputs:
                self.sizes[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("width", "trained"), [(2048, True), (7168, False)])
def test_a_long_row_takes_less_than_a_gib_and_a_half_beside_its_gradients(width, trained):
    """32k tokens, DeepSeek-V3's vocabulary, bf16, by the path of GPUs; the fp32 sum of a trained
    weight's gradient counts.
    """
    tokens, vocabulary = 32768, 129280
    with torch.device("meta"):
        hidden = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=trained)
        labels = torch.zeros(tokens, dtype=torch.int64)
        with Held(hidden, weight) as held:
            loss = vocabulary_loss(hidden, weight, labels, torch.ones(tokens))
            loss.backward()
    assert hidden.grad is not None and (weight.grad is not None) == trained
    returned = 2 * tokens * width + trained * 2 * vocabulary * width
    assert 2**28 < held.peak - returned < 1.5 * 2**30


def test_one_chunk_where_several_would_take_more():
    """Several need an fp32 sum of 4 bytes for each entry of a bf16 weight, logits up to 6."""
    weight = torch.empty(129280, 7168, dtype=torch.bfloat16, device="meta")
    several = 2**26 // 129280
    most = several + 4 * weight.numel() // (6 * 129280)
    assert chunk_size(several + 1, weight) == several
    assert chunk_size(most, weight, trained=True) == most
    assert chunk_size(most + 1, weight, trained=True) == several


def test_evaluation_computes_no_gradients():
    hidden, weight, labels, loss_weights = inputs(torch.float32)
    with Largest() as training:
        vocabulary_loss(hidden, weight, labels, loss_weights, 8)
    with torch.no_grad(), Largest() as evaluation:
        loss = vocabulary_loss(hidden, weight, labels, loss_weights, 8)
    assert not loss.requires_grad
    assert evaluation.operations < 0.7 * training.operations
