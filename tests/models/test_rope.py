"""Rotation and frequencies. YaRN against transformers is in test_deepseek_v3.py."""

import math

import pytest
import torch

from torchsft.models.rope import (
    Rope,
    RotaryEmbedding,
    Yarn,
    inverse_frequencies,
    rotate,
    rotate_reference,
    softmax_scale,
)


def test_rotate_equals_its_reference_and_keeps_the_entries_before():
    cos, sin = RotaryEmbedding(Rope(dim=4, theta=100.0))(torch.tensor([0, 3, 7]))
    cos, sin = cos.double(), sin.double()
    x = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rotate(x, cos, sin), rotate_reference(x, cos, sin))
    assert torch.equal(rotate(x, cos, sin)[..., :6], x[..., :6])
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


@pytest.mark.parametrize("pairing", ["neighbours", "halves"])
@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("others", [0, 6])
def test_every_pairing_and_place_rotates_its_pairs_and_keeps_the_others(pairing, place, others):
    """A partial rotation by hand: entry i of pair p is multiplied as a complex number; the fast
    way, its plain twin and (finite differences) its gradient.
    """
    torch.manual_seed(0)
    cos, sin = RotaryEmbedding(Rope(dim=8, theta=100.0))(torch.tensor([0, 3, 7]))
    cos, sin = cos.double(), sin.double()
    x = torch.randn(3, 2, 8 + others, dtype=torch.float64, requires_grad=True)
    got = rotate(x, cos, sin, pairing, place)
    torch.testing.assert_close(got, rotate_reference(x, cos, sin, pairing, place))
    start = others if place == "end" else 0
    expected = x.detach().clone()
    for pair in range(4):
        both = (2 * pair, 2 * pair + 1) if pairing == "neighbours" else (pair, pair + 4)
        first, second = (start + entry for entry in both)
        turned = torch.complex(x[..., first], x[..., second]) * torch.complex(
            cos[:, None, pair], sin[:, None, pair]
        )
        expected[..., first], expected[..., second] = turned.real, turned.imag
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin, pairing, place), (x,))


def test_halves_are_what_transformers_rotates():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

    cos, sin = RotaryEmbedding(Rope(dim=8, theta=100.0))(torch.tensor([0, 3, 7]))
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    tables = [torch.cat([table, table], dim=-1) for table in (cos, sin)]
    expected = apply_rotary_pos_emb(q, k, *tables)
    got = [rotate(x, cos, sin, "halves") for x in (q, k)]
    torch.testing.assert_close(got, list(expected))


def test_rotated_products_depend_on_the_distance_alone():
    """RoPE's own definition: <rotate(q, m), rotate(k, n)> is a function of m - n. Complex numbers
    are the oracle.
    """
    rope = Rope(dim=8, theta=10000.0)
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = RotaryEmbedding(rope)(torch.tensor([9, 4, 105, 100]))
    turned = rotate(torch.stack([q, k, q, k]), cos, sin)
    as_complex = [torch.view_as_complex(x.view(4, 2)) for x in (q, k)]
    angles = 5 * 10000.0 ** (-torch.arange(4) / 4)
    expected = (
        as_complex[0] * torch.polar(torch.ones(4), angles) * as_complex[1].conj()
    ).real.sum()
    torch.testing.assert_close(turned[0] @ turned[1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned[2] @ turned[3], expected, rtol=1e-4, atol=1e-4)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    """V3's numbers: 64 rope entries, factor 40 from 4096, bounds at pairs floor(10.4) and
    ceil(22.5).
    """
    yarn = Yarn(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0)
    plain = inverse_frequencies(Rope(dim=64, theta=10000.0))
    scaled = inverse_frequencies(Rope(dim=64, theta=10000.0, yarn=yarn))
    torch.testing.assert_close(scaled[:11], plain[:11])
    torch.testing.assert_close(scaled[23:], plain[23:] / 40)
    assert ((scaled[11:23] < plain[11:23]) & (scaled[11:23] > plain[11:23] / 40)).all()
    expected = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert math.isclose(softmax_scale(Rope(dim=64, theta=10000.0, yarn=yarn), 192), expected)


def test_frequencies_stay_fp32_when_the_module_is_cast():
    rotary = RotaryEmbedding(Rope(dim=8, theta=10000.0))
    before = rotary.inv_freq.clone()
    assert torch.equal(rotary.to(torch.bfloat16).inv_freq, before)


def test_frequencies_are_restored_after_the_meta_device():
    with torch.device("meta"):
        rotary = RotaryEmbedding(Rope(dim=8, theta=10000.0))
    rotary.to_empty(device="cpu").init_buffers()
    assert torch.equal(rotary.inv_freq, inverse_frequencies(Rope(dim=8, theta=10000.0)))
