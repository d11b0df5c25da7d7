"""Every family against `transformers` in fp32: logits, loss and gradients of tiny models with their
features on and off; what its config.json says is read or refused; FLOPs are those of its matrices.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tests.families import INERT, TINY, cases, name_in_transformers, tiny
from tests.models.oracle import (
    VOCABULARY,
    hf_logits,
    hf_loss,
    logits_of,
    our_model,
    packed,
    randomise,
)
from torchsft.config import InputError
from torchsft.models.families import FAMILIES, build_model, read_model_config


def reference(family: str, case: str = "", **changes):
    """The model of `transformers`, with random weights."""
    torch.manual_seed(0)
    config = tiny(family, case, vocab_size=VOCABULARY, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model)
    return model


@pytest.mark.parametrize(("family", "case"), cases())
def test_logits_and_gradients_equal_transformers(family, case, record_property):
    """Documents packed, with padding, one of them longer than the original context where that is
    extended; transformers sees each alone.
    """
    hf = reference(family, case)
    model = our_model(hf)
    inputs = packed([9, 32, 100], padding=11)
    expected = hf_logits(hf, inputs)
    got = logits_of(model, inputs)[: len(expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

    expected_loss = hf_loss(expected, inputs)
    expected_loss.backward()
    loss = model(**inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    theirs = partial(name_in_transformers, type(hf).__name__)
    constants = set(map(theirs, model.constants()))
    gradients = {theirs(name): p.grad for name, p in model.named_parameters()}
    expected_gradients = {name: p.grad for name, p in hf.named_parameters() if p.requires_grad}
    for name in constants & expected_gradients.keys():  # what has none in transformers either
        assert gradients.pop(name) is expected_gradients.pop(name) is None
    assert gradients.keys() == expected_gradients.keys()
    errors = {
        name: ((gradients[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected_gradients.items()
    }
    assert all(error <= 1e-4 for error in errors.values()), errors
    record_property("logits", (got - expected).abs().max().item())
    record_property("gradients", max(errors.values()))


@pytest.mark.parametrize("family", TINY)
def test_far_positions_equal_transformers(family):
    hf = reference(family)
    inputs = packed([20, 30], first_position=3000)
    with torch.no_grad():
        got = logits_of(our_model(hf), inputs)
        torch.testing.assert_close(got, hf_logits(hf, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_absent_fields_mean_what_transformers_assumes(family):
    """Sizes alone: every field of ours that transformers has too has its value."""
    stated = tiny(family)
    sizes = {name: getattr(stated, name) for name in TINY[family].sizes}
    kind = type(stated)
    ours = read_model_config(
        {key: value for key, value in sizes.items() if value is not None}
        | {"architectures": stated.architectures}
    )
    assumed = kind(**sizes)
    compared = [f.name for f in dataclasses.fields(ours) if hasattr(assumed, f.name)]
    assert len(compared) >= 10
    for name in compared:
        mine, theirs = getattr(ours, name), getattr(assumed, name)
        if mine != ():  # an empty list stands for a rule, which the family's own tests look at
            assert (list(mine) if isinstance(mine, tuple) else mine) == theirs, name
    assert ours.rope.theta == assumed.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", TINY)
def test_every_field_that_transformers_has_is_read_or_refused_or_changes_nothing(family):
    """A field that is neither a field of ours nor a setting with one supported value must be in the
    lists of those that change nothing.
    """
    stated = tiny(family).to_dict()
    model = FAMILIES[TINY[family].architecture].model
    kind = model.config_class
    known = {f.name for f in dataclasses.fields(kind)} | INERT | TINY[family].inert
    known |= {name for pair in kind.spellings for name in pair} | set(kind.supported_values)
    known |= {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
    known |= {"layer_types"} if kind.only_layer_type else set()
    assert sorted(set(stated) - known) == []
    for name, value in kind.supported_values.items():
        other = not value if isinstance(value, bool) else 7 if value is None else f"not {value}"
        with pytest.raises(InputError, match=name):
            read_model_config(stated | {name: other})


@pytest.mark.parametrize(("family", "case"), cases())
def test_flops_are_those_of_the_matrices(family, case):
    """Three times torch's own count of the forward pass; attention itself, which torch does not
    count on a CPU, by the pairs of each document.
    """
    described = tiny(family, case).to_dict()
    model = build_model(described, experts="loop", attention="sdpa")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    lengths = [12, 20]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits_of(model, packed(lengths))
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counts.items() if "scaled_dot_product" not in str(op))
    layers = [model.config.attention_window(layer) or 99 for layer in range(4)]
    pairs = sum(
        length**2 / 2 - max(0, length - window) ** 2 / 2 for length in lengths for window in layers
    )
    attention = 2 * model.config.pair_cost * pairs / 4
    assert model.config.flops(lengths) == pytest.approx(3 * (matrices + attention), rel=1e-12)
