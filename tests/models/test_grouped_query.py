"""Grouped-query attention against that of `transformers` families: partial rotation of either
pairing, biases, norms of each query and key, and of all heads together.
"""

import pytest
import torch
from transformers import Glm4MoeConfig, GlmConfig, MiniMaxM2Config
from transformers.models.glm import modeling_glm
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.minimax_m2 import modeling_minimax_m2

from torchsft.models.attention import GroupedQueryAttention, locate_documents
from torchsft.models.rope import Rope, RotaryEmbedding

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
DOCUMENTS = [9, 1, 20]
# Name -> their attention and rotary embedding, their configuration, and options of ours.
CASES = {
    "halves, biases": (
        (modeling_glm4_moe.Glm4MoeAttention, modeling_glm4_moe.Glm4MoeRotaryEmbedding),
        Glm4MoeConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
        {},
    ),
    "halves, norms": (
        (modeling_glm4_moe.Glm4MoeAttention, modeling_glm4_moe.Glm4MoeRotaryEmbedding),
        Glm4MoeConfig(**SIZES, num_key_value_heads=1, use_qk_norm=True),
        {"qk_norm_eps": 1e-5},
    ),
    "halves, all heads normed together": (
        (modeling_minimax_m2.MiniMaxM2Attention, modeling_minimax_m2.MiniMaxM2RotaryEmbedding),
        MiniMaxM2Config(**SIZES, num_key_value_heads=2, rotary_dim=8),
        {"qk_norm_eps": 1e-5, "norm_heads_together": True},
    ),
    "neighbours": (
        (modeling_glm.GlmAttention, modeling_glm.GlmRotaryEmbedding),
        GlmConfig(**SIZES, num_key_value_heads=2, attention_bias=False, pad_token_id=0),
        {},
    ),
    "neighbours, whole heads, as many key/value heads": (
        (modeling_glm.GlmAttention, modeling_glm.GlmRotaryEmbedding),
        GlmConfig(
            **SIZES,
            num_key_value_heads=4,
            pad_token_id=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_transformers(name):
    """Documents packed, with padding; transformers sees each alone. fp32 sums in another order."""
    torch.manual_seed(0)
    (attention_class, rotary_class), config, options = CASES[name]
    theirs, their_rotary = attention_class(config, 0), rotary_class(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.3)
    factor = config.rope_parameters["partial_rotary_factor"]
    rope = Rope(
        dim=int(16 * factor),
        theta=config.rope_parameters["rope_theta"],
        pairing=name.partition(",")[0],
        place="start",
    )
    ours = GroupedQueryAttention(
        width=32,
        heads=4,
        kv_heads=config.num_key_value_heads,
        head_dim=16,
        rope=rope,
        bias=getattr(config, "attention_bias", False),
        **options,
    )
    ours.load_state_dict(theirs.state_dict())

    x_TD = torch.randn(sum(DOCUMENTS) + 5, 32)
    expected = []
    start = 0
    for length in DOCUMENTS:
        x = x_TD[None, start : start + length]
        tables = their_rotary(x, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        expected.append(theirs(x, tables, mask)[0][0])
        start += length
    expected = torch.cat(expected)
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in (*DOCUMENTS, 5)])
    tables = RotaryEmbedding(rope)(positions)
    got = ours(x_TD, locate_documents("sdpa", *tables, bounds, None))
    torch.testing.assert_close(got[: len(expected)], expected, rtol=0, atol=1e-5)
    assert (got[len(expected) :] == 0).all()

    upstream = torch.randn(expected.shape)
    got[: len(expected)].backward(upstream)
    expected.backward(upstream)
    for key, parameter in theirs.named_parameters():
        error = (ours.get_parameter(key).grad - parameter.grad).abs().max()
        assert error <= 1e-5 * parameter.grad.abs().max().clamp(min=1), key
