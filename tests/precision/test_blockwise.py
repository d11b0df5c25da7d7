"""Block-scaled fp8 against plain loops over blocks and torch's own conversions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.deepseek_format import dequantised, quantised
from tests.checkpoint.sources import same_bits
from torchsft.config import InputError
from torchsft.models.deepseek_v3 import DeepseekV3
from torchsft.precision.blockwise import dequantise, quantise, scale_key, scale_shape

BLOCK = 128


def weight(rows, cols, seed=0):
    """Values whose size differs from block to block."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, cols, generator=generator)
        * torch.rand(rows, 1, generator=generator)
        * 0.05
    )


def test_every_code_has_torch_s_value():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes[~codes.float().isnan()]
    assert len(numbers) == 254
    for scale in (1.0, 0.0003, 2.0**-20, 3e30):
        found = dequantise(numbers[None], torch.tensor([[scale]]), (1, 254))[0]
        assert same_bits(found, numbers.float() * scale)
    for code in codes[codes.float().isnan()]:
        row = torch.stack([code, numbers[3]])
        assert dequantise(row[None], torch.ones(1, 1))[0].isnan().tolist() == [True, False]


@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=60, deadline=None)
def test_a_part_is_the_part_of_the_whole(shape, cuts):
    """Parts that begin and end anywhere, empty ones too."""
    q, scale = quantised(weight(*shape))
    (top, bottom), (left, right) = (
        sorted(round(cut * n) for cut in cuts[i::2]) for i, n in enumerate(shape)
    )
    blocks = scale[top // BLOCK : -(-bottom // BLOCK), left // BLOCK : -(-right // BLOCK)]
    found = dequantise(q[top:bottom, left:right], blocks, origin=(top, left))
    assert same_bits(found, dequantised(q, scale)[top:bottom, left:right].contiguous())


@pytest.mark.parametrize("shape", [(128, 128), (576, 300), (1, 1), (129, 127), (4, 513)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_as_a_plain_loop_does(shape, power_of_two):
    w = weight(*shape)
    q, scale = quantise(w, power_of_two=power_of_two)
    expected_q, expected_scale = quantised(w, power_of_two)
    assert same_bits(scale, expected_scale) and same_bits(q, expected_q)
    assert scale.shape == scale_shape(shape)
    if power_of_two:
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))


def test_the_largest_error_is_half_a_step():
    """e4m3 has 3 bits behind the leading one, so values err by at most 1/16 of themselves, small
    ones by 2^-10 scales.
    """
    w = weight(256, 256)
    q, scale = quantise(w)
    error = (dequantised(q, scale) - w).abs()
    scales = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert (error <= torch.maximum(w.abs() / 16, scales * 2.0**-10) * (1 + 1e-6)).all()
    largest = (
        dequantised(q, scale).unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).abs().amax((2, 3))
    )
    torch.testing.assert_close(largest, 448 * scale)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_what_was_not_changed_keeps_its_bytes(power_of_two, seed):
    """Also where the stored scale is not the one that the largest value asks for: a published scale
    may come from anywhere.
    """
    q, scale = quantised(weight(300, 270, seed), power_of_two)
    scale *= torch.rand(scale.shape) * 1e-3 if seed % 2 else 1
    again, scale_again = quantise(
        dequantised(q, scale), power_of_two=power_of_two, known_scale=scale
    )
    assert same_bits(again, q) and same_bits(scale_again, scale)


def test_only_the_changed_block_changes():
    q, scale = quantised(weight(300, 270))
    scale *= 1.5  # not the scales that the values ask for
    w = dequantised(q, scale)
    w[140, 200] = torch.nextafter(w[140, 200], torch.tensor(1.0))  # the last bit of one value
    found, scale_found = quantise(w, known_scale=scale)
    fresh, scale_fresh = quantised(w)
    changed = torch.zeros(3, 3, dtype=torch.bool)
    changed[1, 1] = True
    assert same_bits(scale_found, torch.where(changed, scale_fresh, scale))
    inside = changed.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:300, :270]
    expected = torch.where(inside, fresh.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(found.view(torch.uint8), expected)


def test_zeros():
    w = weight(256, 128)
    w[:128] = 0
    w[3, 3] = -0.0
    q, scale = quantise(w)
    assert scale[0].item() == 1 and scale[1].item() > 0
    assert same_bits(dequantised(q, scale)[:128], w[:128])  # the sign of zero too
    for known in (0.0, 0.25):  # kept where it gives the zeros, as any does
        _, kept = quantise(w, known_scale=torch.tensor([[known], [known]]))
        assert kept[0].item() == known and kept[1].item() == scale[1].item()


def test_tiny_and_huge_values_stay_finite():
    w = torch.tensor([[1e-44, 3e-39, 0.0, 0.0], [1e36, -1e35, 1.0, 0.0]])
    for power_of_two in (False, True):
        q, scale = quantise(w, block=(1, 2), power_of_two=power_of_two)
        assert scale.isfinite().all() and (scale > 0).all() and q.float().isfinite().all()
        assert dequantise(q, scale, block=(1, 2))[1, 0] == pytest.approx(1e36, rel=1 / 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    w = weight(200, 200)
    w[150, 10] = value
    with pytest.raises(InputError, match=r"^o_proj holds nan or inf"):
        quantise(w, name="o_proj")


def test_the_keys_are_those_of_the_published_index():
    layer = "model.layers.61."
    attention = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    networks = ("mlp.", "mlp.experts.255.", "mlp.shared_experts.")
    quantised_keys = [f"{layer}self_attn.{name}.weight" for name in attention]
    quantised_keys += [
        f"{layer}{network}{name}_proj.weight"
        for network in networks
        for name in ("gate", "up", "down")
    ]
    others = [
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
        *(
            f"{layer}{name}.weight"
            for name in ("input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
        ),
        *(
            f"{layer}{name}.weight"
            for name in ("mlp.gate", "eh_proj", "enorm", "shared_head.head", "embed_tokens")
        ),
        *(f"{layer}mlp.gate.e_score_correction_bias", f"{layer}self_attn.o_proj.bias"),
        scale_key(quantised_keys[0]),
    ]
    assert all(map(DeepseekV3.is_quantised, quantised_keys)) and not any(
        map(DeepseekV3.is_quantised, others)
    )
