"""What is special to dense models of Llama's kind."""

import pytest
import torch

from tests.families import PUBLISHED, tiny
from torchsft.config import InputError
from torchsft.models.families import build_model, read_model_config
from torchsft.models.rope import Llama3Scaling, Rope, inverse_frequencies

LLAMA3 = Llama3Scaling(factor=8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)


def test_llama3_divides_slow_frequencies_keeps_fast_ones_and_blends_between():
    """By the rotations within 8192 positions: fewer than 1, more than 4, and 2.5, half way between,
    which gives the mean of the frequency and an eighth of it.
    """
    plain = Rope(dim=128, theta=500000.0)
    before = inverse_frequencies(plain)
    after = inverse_frequencies(Rope(dim=128, theta=500000.0, llama3=LLAMA3))
    rotations = 8192 * before / (2 * torch.pi)
    fast, slow = rotations > 4, rotations < 1
    assert 0 < fast.sum() < 64 and 0 < slow.sum() < 64 and (~fast & ~slow).sum() > 2
    assert torch.equal(after[fast], before[fast])
    torch.testing.assert_close(after[slow], before[slow] / 8)
    theta = (8192 / (2 * torch.pi * 2.5)) ** 2  # whose second pair of two turns 2.5 times
    halfway = inverse_frequencies(Rope(dim=4, theta=theta, llama3=LLAMA3))[1]
    assert halfway.item() == pytest.approx(theta**-0.5 * (1 + 1 / 8) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["llama_8b", "llama_70b"])
def test_published_models_are_read(name):
    config = read_model_config(PUBLISHED[name].config)
    assert config.head_dim == 128
    assert config.rope.llama3 == LLAMA3 and config.rope.theta == 500000


def test_layers_without_rope_are_those_of_the_list_or_of_every_interval():
    model = build_model(tiny("smollm3").to_dict())
    assert [layer.self_attn.rope is None for layer in model.model.layers.values()] == [
        *(False, False, False, True)
    ]
    absent = {key: v for key, v in tiny("smollm3").to_dict().items() if key != "no_rope_layers"}
    config = read_model_config(absent | {"no_rope_layer_interval": 2})
    assert [config.has_rope(layer) for layer in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window = 0, but it must be at least 1"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\], but .* 4 layers"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4}, "with sliding_attention; only"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "without factor, low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(family, change, message):
    with pytest.raises(InputError, match=message):
        read_model_config(tiny(family).to_dict() | change)
