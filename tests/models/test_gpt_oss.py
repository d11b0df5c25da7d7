"""What is special to gpt-oss."""

import pytest
import torch

from tests.families import PUBLISHED, YARN, tiny
from tests.models.oracle import packed
from torchsft import ops
from torchsft.config import InputError
from torchsft.models.families import build_model, read_model_config
from torchsft.models.gpt_oss import ClampedExperts, clamped_swiglu, clamped_swiglu_reference
from torchsft.models.rope import Yarn
from torchsft.ops.permute import Order, combine, inverse, permute


def model(**changes):
    """Random weights, biases and sinks, alike whatever `changes` of how it computes."""
    made = build_model(tiny("gpt_oss", head_dim=16).to_dict(), **changes)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def test_the_activation_equals_its_plain_twin_also_where_it_clamps():
    """Gates and ups around -7, 7 and 0, and at the limits themselves; float64."""
    torch.manual_seed(0)
    both = torch.cat([torch.randn(40, 8) * 8, torch.full((1, 8), 7.0), torch.full((1, 8), -7.0)])
    both = both.double().requires_grad_()
    assert 20 < (both[:, 1::2].abs() > 7).sum() < 140
    got, expected = (f(both, 1.702, 7.0) for f in (clamped_swiglu, clamped_swiglu_reference))
    assert torch.equal(got, expected)
    upstream = torch.randn_like(got)
    (gradient,) = torch.autograd.grad(got, both, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, both, upstream)[0])


def test_the_plain_twins_compute_the_same_loss_and_gradients():
    inputs = packed([9, 1, 40], padding=6)
    fast, slow = model(), model(experts="loop")
    fast(**inputs).backward()
    ops.use_plain(True)
    try:
        slow(**inputs).backward()
    finally:
        ops.use_plain(False)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_windows_and_sinks_of_every_layer_too():
    inputs = packed([9, 1, 40], padding=6)
    with torch.no_grad():
        expected, got = model()(**inputs), model(attention="flex")(**inputs)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "loop"])
def test_experts_without_rows_get_zero_gradients(implementation):
    """Also on a rank that receives none at all, which must not lack a gradient."""
    experts = ClampedExperts(4, 16, 8, implementation, alpha=1.702, limit=7.0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    for counts in ([0, 3, 0, 2], [0, 0, 0, 0]):
        experts.zero_grad()
        x = torch.randn(sum(counts), 16, requires_grad=True)
        offs = torch.tensor(counts).cumsum(0).to(torch.int32)
        experts(x, torch.ones(sum(counts), 1), offs).sum().backward()
        for parameter in experts.parameters():
            has_gradient = parameter.grad.flatten(1).abs().amax(1) > 0
            assert has_gradient.tolist() == [count > 0 for count in counts]


def test_slices_of_rows_give_what_all_of_them_do():
    """Outputs and gradients, of rows that the slices sort; fp32 sums in another order: 1e-5."""
    torch.manual_seed(0)
    experts = ClampedExperts(4, 16, 8, "grouped_mm", alpha=1.702, limit=7.0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    ends, order_R = [130, 130, 530, 600], torch.randperm(600)
    order = Order(order_R, inverse(order_R).unsqueeze(1))
    x, weights = torch.randn(600, 16, requires_grad=True), torch.rand(600, 1, requires_grad=True)
    given, leaves = (weights, torch.tensor(ends).int(), ends), [x, weights, *experts.parameters()]
    y, upstream = combine(experts(permute(x, *order), *given), *order), torch.randn(600, 16)
    expected = [y, *torch.autograd.grad(y, leaves, upstream)]
    experts.even_rows = 200
    assert experts.sorts(order, ends)
    y = experts(x, *given, order)
    found = [y, *torch.autograd.grad(y, leaves, upstream)]
    for got, wanted in zip(found, expected, strict=True):
        assert ((got - wanted).abs() <= 1e-5 * wanted.abs().max()).all()


def test_a_microbatch_of_padding_alone_gives_zero_gradients():
    made = model()
    loss = made(**packed([], padding=8))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in made.parameters())


@pytest.mark.parametrize(("name", "layers"), [("gpt_oss_20b", 24), ("gpt_oss_120b", 36)])
def test_published_models_are_read(name, layers):
    config = read_model_config(PUBLISHED[name].config)
    windows = [config.attention_window(layer) for layer in range(layers)]
    assert windows == [128, None] * (layers // 2)
    assert config.rope.theta == 150000
    assert config.rope.yarn == Yarn(
        factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0, truncate=False
    )


def test_a_config_that_is_silent_means_what_transformers_assumes():
    stated = PUBLISHED["gpt_oss_20b"].config
    silent = {"rope_scaling", "rope_theta", "layer_types", "sliding_window", "swiglu_limit"}
    silent |= {"attention_bias", "head_dim", "rms_norm_eps", "initializer_range"}
    assert silent <= stated.keys()
    absent = {key: value for key, value in stated.items() if key not in silent}
    assert read_model_config(absent) == read_model_config(stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"]}, r"layer_types = \['full_attention'\], but each of 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "must be sliding_attention or full_attention"),
        ({"sliding_window": None}, "sliding_window = None and sliding_attention in layer_types"),
        ({"sliding_window": 0}, "sliding_window = 0 and sliding_attention in layer_types"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9, but only 8 num_local_experts"),
        ({"experts_per_token": 4}, "num_experts_per_tok = 3 and experts_per_token = 4, two names"),
        ({"num_experts": 16}, "num_local_experts = 8 and num_experts = 16, two names"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu'"),
        ({"rope_parameters": YARN | {"rope_type": "linear"}}, "rope type 'linear'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        read_model_config(tiny("gpt_oss").to_dict() | change)
