"""The router against a plain loop over tokens, and padding in the MoE layer."""

import traceback
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.parallel.passes import build
from torchsft.config import InputError, Router
from torchsft.models.attention import locate_documents
from torchsft.models.decoder import SwigluMLP
from torchsft.models.moe import Experts, MoE, frozen_by_router
from torchsft.models.routers import GroupedSigmoidRouter
from torchsft.ops.grouped import Products
from torchsft.ops.repetition import Pass
from torchsft.parallel.compute_copies import ComputeCopies

T, D, E = 50, 12, 8


def router(mean: float, **changes) -> GroupedSigmoidRouter:
    torch.manual_seed(0)
    options = {"top_k": 3, "groups": 4, "top_groups": 2, "normalise": True, "scale": 2.5} | changes
    gate = GroupedSigmoidRouter(D, E, **options)
    torch.nn.init.normal_(gate.weight)
    gate.e_score_correction_bias.normal_(mean, 0.3)
    return gate


@pytest.mark.parametrize("mean", [0.0, 3.0, -0.5, -10.0])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 2)])
def test_choice_and_weights_equal_a_loop_over_tokens(mean, groups):
    """The definition (DeepSeek-V3 report, 2.1.2), one token at a time: groups by their two best,
    then experts.
    """
    gate = router(mean, groups=groups[0], top_groups=groups[1])
    x = torch.randn(T, D)
    weights_TK, experts_TK, *_ = gate(x)
    scores = (x @ gate.weight.T).sigmoid().tolist()
    bias, size = gate.e_score_correction_bias.tolist(), E // groups[0]
    for token in range(T):
        biased = [score + b for score, b in zip(scores[token], bias, strict=True)]
        by_group = [sorted(biased[g * size : (g + 1) * size])[-2:] for g in range(groups[0])]
        best_groups = sorted(range(groups[0]), key=lambda g: -sum(by_group[g]))[: groups[1]]
        allowed = [e for e in range(E) if e // size in best_groups]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:3]
        total = sum(scores[token][e] for e in chosen)
        expected = {e: 2.5 * scores[token][e] / total for e in chosen}
        got = dict(zip(experts_TK[token].tolist(), weights_TK[token].tolist(), strict=True))
        assert got == pytest.approx(expected, rel=1e-5)


def test_scores_are_fp32_for_bf16_tokens():
    """bf16 has 8 bits: two experts whose scores differ by 2^-12 would tie and the choice would be
    the index.
    """
    gate = router(0.0)
    x = torch.randn(T, D).bfloat16()
    weights, experts, *_ = gate(x)
    expected_weights, expected_experts, *_ = gate(x.float())
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected_weights) and torch.equal(experts, expected_experts)
    small = router(0.0).to(torch.bfloat16)
    assert small.e_score_correction_bias.dtype == torch.float32


def test_the_correction_bias_chooses_but_does_not_weigh():
    """Adding one constant to every bias changes nothing, and the bias gets no gradient."""
    gate, x = router(0.0), torch.randn(T, D)
    before = gate(x)
    gate.e_score_correction_bias += 5.0
    after = gate(x)
    assert torch.equal(before[0].sort().values, after[0].sort().values)
    assert torch.equal(before[1].sort().values, after[1].sort().values)
    assert "e_score_correction_bias" in gate.state_dict()


def test_padding_gets_the_shared_experts_alone_and_goes_round_the_experts():
    gate = GroupedSigmoidRouter(16, E, top_k=3, groups=4, top_groups=2, normalise=True, scale=2.5)
    layer = MoE(gate, Experts(E, 16, 8, "grouped_mm"), SwigluMLP(16, 8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    seen = []

    def exchange(x_SD, weights_SK, chosen_SK, experts, meanwhile):
        seen.append(chosen_SK.flatten().bincount(minlength=E))
        _, shared_SD = meanwhile
        return weights_SK.sum(1, keepdim=True).expand_as(x_SD), shared_SD

    layer.exchange = exchange
    x, factors = torch.randn(T, 16), torch.ones(T, 4)
    routed = layer(
        x, locate_documents("sdpa", factors, factors, torch.tensor([0, 10]), None)
    ) - layer.shared_experts(x)
    # weights sum to the scale
    torch.testing.assert_close(routed[:10], torch.full((10, 16), 2.5), rtol=1e-4, atol=1e-3)
    assert routed[10:].abs().max() < 1e-4
    padding_rows = seen[0] - layer.expert_load
    assert padding_rows.sum() == 40 * 3 and padding_rows.max() - padding_rows.min() <= 1


def documents_loss(
    scores: list[list[float]], chosen: list[set[int]], lengths: list[int], top_k: int
) -> float:
    """The balance loss by its definition, document by document: sum over documents of L * sum_e f_e
    P_e.
    """
    total, begin = 0.0, 0
    for length in lengths:
        mine = range(begin, begin + length)
        for expert in range(E):
            frequency = E / (top_k * length) * sum(expert in chosen[t] for t in mine)
            probability = sum(scores[t][expert] / sum(scores[t]) for t in mine) / length
            total += length * frequency * probability
        begin += length
    return total


def test_the_balance_loss_is_that_of_each_document_and_reaches_the_router_whatever_the_loss_is():
    """Against the definition in plain Python, and its gradient against finite differences of it
    (float64).
    """
    torch.manual_seed(0)
    gate = GroupedSigmoidRouter(16, E, top_k=3, groups=4, top_groups=2, normalise=True, scale=2.5)
    layer = MoE(gate, Experts(E, 16, 8, "grouped_mm"), SwigluMLP(16, 8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, factors, lengths = torch.randn(T, 16), torch.ones(T, 4), [7, 1, 30]
    documents = locate_documents("sdpa", factors, factors, torch.tensor([0, 7, 8, 38]), None)
    _, experts_TK, *_ = gate(x)
    chosen = [set(row) for row in experts_TK.tolist()]

    def definition(weight: torch.Tensor) -> float:
        return documents_loss((x.double() @ weight.T).sigmoid().tolist(), chosen, lengths, 3)

    def router_gradient(scale: float) -> torch.Tensor:
        layer.balance_scale = scale
        layer.init_buffers()
        (gradient,) = torch.autograd.grad(7 * layer(x, documents).sum(), gate.weight)
        return gradient

    added = router_gradient(2.0) - router_gradient(0.0)
    assert layer.balance_loss == 0
    router_gradient(2.0)
    assert layer.balance_loss.item() == pytest.approx(definition(gate.weight.double()), rel=1e-5)
    with torch.no_grad():
        for row, column in [(0, 0), (3, 5), (7, 15)]:
            step = torch.zeros(E, 16, dtype=torch.float64)
            step[row, column] = 1e-4
            slope = (
                definition(gate.weight.double() + step) - definition(gate.weight.double() - step)
            ) / 2e-4
            assert added[row, column].item() == pytest.approx(2 * slope, rel=1e-3, abs=1e-3)
    layer.eval()
    assert torch.equal(router_gradient(2.0), router_gradient(0.0))  # evaluation has no balance loss


def test_the_z_loss_is_that_of_real_tokens_and_reaches_the_router_whatever_the_loss_is():
    """Against eq. 5 of ST-MoE in float64, value and gradient; a repeated pass is not counted."""
    torch.manual_seed(0)
    gate = GroupedSigmoidRouter(16, E, top_k=3, groups=4, top_groups=2, normalise=True, scale=2.5)
    layer = MoE(gate, Experts(E, 16, 8, "grouped_mm"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, factors = torch.randn(T, 16), torch.ones(T, 4)
    documents = locate_documents("sdpa", factors, factors, torch.tensor([0, 7, 38]), None)
    weight = gate.weight.detach().double().requires_grad_()
    expected = (x[:38].double() @ weight.T).exp().sum(-1).log().square().sum()
    (slope,) = torch.autograd.grad(expected, weight)

    def router_gradient(scale: float) -> torch.Tensor:
        layer.z_scale = scale
        (gradient,) = torch.autograd.grad(7 * layer(x, documents).sum(), gate.weight)
        return gradient

    without = router_gradient(0.0)
    assert layer.z_loss == 0
    added = router_gradient(2.0) - without
    torch.testing.assert_close(added.double(), 2 * slope, rtol=1e-4, atol=1e-3)
    assert layer.z_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    with Pass((), {}, repeating=True):
        assert torch.equal(router_gradient(2.0) - without, added)
    assert layer.z_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    layer.eval()
    assert torch.equal(router_gradient(2.0), without)


def test_the_correction_bias_falls_where_more_tokens_than_the_mean_were_routed():
    """Section 2.1.2 of DeepSeek-V3's report, by hand; padding is no load."""
    gate = GroupedSigmoidRouter(16, 4, top_k=2, groups=1, top_groups=1, normalise=True, scale=1.0)
    layer = MoE(gate, Experts(4, 16, 8, "grouped_mm"))
    gate.e_score_correction_bias += torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer.move_bias(torch.tensor([5, 0, 2, 1], dtype=torch.float64), 0.25)
    assert gate.e_score_correction_bias.tolist() == [0.75, 2.25, 3.0, 4.25]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    documents = locate_documents(
        "sdpa", torch.ones(12, 4), torch.ones(12, 4), torch.tensor([0, 8]), None
    )
    layer(torch.randn(12, 16), documents)
    assert layer.expert_load.sum() == 2 * 8


def test_experts_used_alike_have_a_balance_loss_of_one_per_token():
    gate = GroupedSigmoidRouter(16, E, top_k=2, groups=1, top_groups=1, normalise=True, scale=1.0)
    layer = MoE(gate, Experts(E, 16, 8, "grouped_mm"), SwigluMLP(16, 8))
    torch.nn.init.zeros_(gate.weight)  # all scores are equal
    documents = locate_documents(
        "sdpa", torch.ones(12, 4), torch.ones(12, 4), torch.tensor([0, 8]), None
    )
    chosen = torch.arange(24).view(12, 2) % E  # 16 choices of 8 experts: each twice
    layer.balance_scale = 1.0
    layer.add_balance_loss(torch.ones(12, 2), chosen, torch.full((12, E), 0.5), documents)
    assert layer.balance_loss.item() == pytest.approx(8)


def test_router_options_are_refused_where_nothing_could_follow_them():
    """A model without experts, and a router without a correction bias."""

    def moes(**changes):
        return build(**changes).moe_layers().values()

    assert frozen_by_router(Router(bias_update_rate=0.1), moes()) == []
    assert frozen_by_router(Router(train=False, z_loss=1.0), moes(qwen3=True)) == ["router"]
    assert frozen_by_router(Router(), moes(qwen3=True, dense=True)) == []
    with pytest.raises(InputError, match=r"no experts, but --router\.train False is set"):
        frozen_by_router(Router(train=False), moes(qwen3=True, dense=True))
    with pytest.raises(InputError, match=r"rate is 0\.1, but this model's routers have no correct"):
        frozen_by_router(Router(bias_update_rate=0.1), moes(qwen3=True))


@pytest.mark.parametrize("where", ["forward", "grad_rows"])
@pytest.mark.parametrize("again", [False, True])
def test_a_full_device_is_reported_with_the_layer_and_its_rows(monkeypatch, where, again):
    """In the forward pass, in its repetition and in the backward pass."""
    gate = GroupedSigmoidRouter(16, E, top_k=3, groups=4, top_groups=2, normalise=True, scale=2.5)
    moe = MoE(gate, Experts(E, 16, 8, "grouped_mm"))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    moe.layer = "5"
    moe.init_buffers()
    factors = torch.ones(T, 1)
    documents = locate_documents("sdpa", factors, factors, torch.tensor([0, T]), None)
    x_SD = torch.randn(T, 16, requires_grad=True)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def passes():
        run = partial(checkpoint, moe, use_reentrant=False) if again else moe
        y_SD = run(x_SD, documents)
        monkeypatch.setattr(Products, where, full)
        (y_SD if again or where == "grad_rows" else moe(x_SD, documents)).sum().backward()

    with pytest.raises(torch.OutOfMemoryError) as raised:
        passes()
    (note,) = raised.value.__notes__
    assert note in "".join(traceback.format_exception(raised.value))
    assert note == (
        "this was in the experts of layer 5: 150 rows have come to this rank, 150 would under an "
        "even load; lower --train.micro-batch-size or --data.seq-len, or raise --parallel.ep"
    )


def test_many_more_rows_than_an_even_load_are_computed_in_few_slices(monkeypatch):
    """As where a rank with one token in a pass for answers gets the rows of all the others."""
    experts, rows = Experts(E, 16, 8, "grouped_mm"), 100 * E
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    ends = list(range(100, rows + 1, 100))
    inputs = torch.randn(rows, 16), torch.rand(rows, 1), torch.tensor(ends, dtype=torch.int32), ends
    whole = experts(*inputs)
    products, sizes = Products.forward, []

    def forward(self: Products, x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return products(self, x, *args)

    monkeypatch.setattr(Products, "forward", forward)
    experts.even_rows = 3
    torch.testing.assert_close(experts(*inputs), whole)
    assert len(sizes) <= 2 * 8 and sum(sizes) == 2 * rows  # gate|up and down


def test_a_graph_without_copies_is_freed_when_it_is_dropped(monkeypatch):
    """Without Python's garbage collector, which runs at chosen steps."""
    experts = Experts(2, 16, 8, "grouped_mm")
    experts.read = ComputeCopies(torch.bfloat16, keep=False)
    experts.read.save_none(experts)
    products, outputs = Products.forward, []

    def forward(*args: torch.Tensor) -> torch.Tensor:
        y = products(*args)
        outputs.append(weakref.ref(y))
        return y

    monkeypatch.setattr(Products, "forward", forward)
    x = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    experts(x, torch.rand(6, 1), torch.tensor([2, 6], dtype=torch.int32))
    assert [output() for output in outputs] == [None, None]
