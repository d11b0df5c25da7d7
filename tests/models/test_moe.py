"""The router against a plain loop over tokens, and padding in the MoE layer."""

import pytest
import torch

from torchsft.models.decoder import SwigluMLP
from torchsft.models.moe import Experts, MoE, Router

T, D, E = 50, 12, 8


def router(mean: float, **changes) -> Router:
    torch.manual_seed(0)
    options = {"top_k": 3, "groups": 4, "top_groups": 2, "normalise": True, "scale": 2.5} | changes
    gate = Router(D, E, **options)
    torch.nn.init.normal_(gate.weight)
    gate.e_score_correction_bias.normal_(mean, 0.3)
    return gate


@pytest.mark.parametrize("mean", [0.0, 3.0, -0.5, -10.0])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 2)])
def test_choice_and_weights_equal_a_loop_over_tokens(mean, groups):
    """The definition (DeepSeek-V3 report, 2.1.2), one token at a time: groups by their two best, then experts."""
    gate = router(mean, groups=groups[0], top_groups=groups[1])
    x = torch.randn(T, D)
    weights_TK, experts_TK = gate(x)
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
    """bf16 has 8 bits: two experts whose scores differ by 2^-12 would tie and the choice would be the index."""
    gate = router(0.0)
    x = torch.randn(T, D).bfloat16()
    weights, experts = gate(x)
    expected_weights, expected_experts = gate(x.float())
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
    gate = Router(16, E, top_k=3, groups=4, top_groups=2, normalise=True, scale=2.5)
    layer = MoE(gate, Experts(E, 16, 8, "grouped_mm"), SwigluMLP(16, 8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    seen = []

    def exchange(x_RD, counts_E, experts):
        seen.append(counts_E)
        return torch.ones_like(x_RD)

    layer.exchange = exchange
    x, valid = torch.randn(T, 16), torch.arange(T) < 10
    routed = layer(x, valid) - layer.shared_experts(x)
    torch.testing.assert_close(routed[:10], torch.full((10, 16), 2.5), rtol=1e-4, atol=1e-3)  # weights sum to the scale
    assert routed[10:].abs().max() < 1e-4
    padding_rows = seen[0] - layer.expert_load
    assert padding_rows.sum() == 40 * 3 and padding_rows.max() - padding_rows.min() <= 1
