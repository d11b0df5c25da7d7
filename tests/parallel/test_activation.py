"""Activation checkpointing: the gradients of a pass that keeps all, and what is computed again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from tests.ops.passes import Operations
from tests.parallel.passes import build, fill, full, microbatch
from torchsft.config import InputError, Parallel, Train
from torchsft.ops.repetition import repeating
from torchsft.parallel.apply import parallelize
from torchsft.parallel.world import World

MODES = {
    "none": Train(),
    "full": Train(activation_checkpointing="full"),
    "selective": Train(activation_checkpointing="selective"),
    "products": Train(activation_checkpointing="selective", selective_products=True),
    "every second": Train(activation_checkpointing="full", activation_checkpointing_every=2),
}
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCT = "aten::_grouped_mm"
EXCHANGE = "_c10d_functional::all_to_all_single"
REDUCE = "_c10d_functional::all_reduce"
COUNTED = ("forward", "backward", "read", "forward_read")
EXPERT_LAYERS = 2  # of the tiny DeepSeek-V3, behind a dense layer; numbers 1 and 2


def model_of(mode: str, world: World, **changes: Any) -> Any:
    model = build(**changes)
    parallelize([model], world, torch.float32, activations=MODES[mode])
    fill(model)
    for moe in model.moe_layers().values():
        moe.balance_scale = moe.z_scale = 0.1
    return model


def passes(mode: str, world: World, **changes: Any) -> dict[str, Any]:
    """Loss and gradients, counters, and what a forward and a backward pass did on this rank."""
    model = model_of(mode, world, **changes)
    tolist = mock.Mock(wraps=torch.Tensor.tolist)
    with mock.patch.object(torch.Tensor, "tolist", lambda tensor: tolist(tensor)):
        with Operations() as forward:
            loss = model(**microbatch(world.data_rank))
        forward_read = tolist.call_count
        with Operations() as backward:
            loss.backward()
        backward_read = tolist.call_count - forward_read
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    moes = model.moe_layers().values()
    return {
        "values": gradients | {"loss": loss.detach()},
        "counters": [[m.expert_load.tolist(), m.balance_loss, m.z_loss] for m in moes],
        "forward": forward.count,
        "backward": backward.count,
        "read": backward_read,
        "forward_read": forward_read,
    }


def all_modes(parallel: dict[str, int], **changes: Any) -> dict[str, dict[str, Any]]:
    """On the calling ranks; also that gradients equal those of `none` bit by bit: they come from
    the same operations on the same numbers.
    """
    with World(Parallel(timeout_seconds=60, **parallel), 0) as world:
        found = {mode: passes(mode, world, **changes) for mode in MODES}
    expected = found["none"]
    for result in found.values():
        assert result["counters"] == expected["counters"]
        assert result["values"].keys() == expected["values"].keys()
        for name, value in expected["values"].items():
            assert torch.equal(result["values"][name], value), name
    return {mode: {key: result[key] for key in COUNTED} for mode, result in found.items()}


def again(found: dict[str, dict[str, Any]], mode: str, operation: str) -> int:
    """How often the repetitions of a mode ran an operation."""
    return found[mode]["backward"][operation] - found["none"]["backward"][operation]


def test_one_rank_computes_again_what_the_mode_says_and_the_same_gradients(ranks):
    """Attention once a document and layer; gate|up, but no down projection, of every layer with
    experts; no choice and no sorting.
    """
    (found,) = ranks(1, all_modes, parallel={})
    attention = found["none"]["forward"][ATTENTION]
    expected = {
        "full": (attention, EXPERT_LAYERS),
        "selective": (0, EXPERT_LAYERS),
        "products": (0, 0),
        "every second": (attention // 3, 1),
    }
    for mode, counts in expected.items():
        assert (again(found, mode, ATTENTION), again(found, mode, PRODUCT)) == counts
        for operation in ("aten::topk", "aten::sort", "aten::scatter_add_"):
            assert found[mode]["backward"][operation] == 0 < found[mode]["forward"][operation]


def test_experts_with_biases_and_sinks_too(ranks):
    """Their down projection, whose output is not weighted, is computed again: 4 layers, all with
    experts.
    """
    (found,) = ranks(1, all_modes, parallel={}, family="gpt_oss")
    assert [again(found, mode, PRODUCT) for mode in MODES] == [0, 8, 8, 4, 4]
    assert again(found, "selective", ATTENTION) == 0 < again(found, "full", ATTENTION)


@pytest.mark.parametrize("parallel", [{"dp_shard": 2, "ep": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_ranks_exchange_rows_and_weights_again_but_no_counts_and_nothing_comes_back(
    ranks, parallel
):
    """Nor does the host read anything, nor are the counts of the balance loss summed."""
    for found in ranks(2, all_modes, parallel=parallel):
        assert found["none"]["forward"][EXCHANGE] >= 4 * EXPERT_LAYERS
        for mode in MODES:
            layers = {"none": 0, "every second": 1}.get(mode, EXPERT_LAYERS)
            assert found[mode]["read"] == 0 < found[mode]["forward_read"]
            assert again(found, mode, EXCHANGE) == 2 * layers


def perturbed(mode: str) -> bool:
    """Whether routers choose as before when their weights have changed before the repetition."""
    with World(Parallel(timeout_seconds=60, dp_shard=2, ep=2), 0) as world:
        model = model_of(mode, world)
        chosen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for moe in model.moe_layers().values():
            moe.gate.register_forward_hook(
                lambda _, __, routing: chosen[repeating()].append(routing.experts_SK)
            )
        loss = model(**microbatch(world.data_rank))
        with torch.no_grad():
            for moe in model.moe_layers().values():
                moe.gate.weight.copy_(-moe.gate.weight)
        loss.backward()
        first, second = chosen[False], chosen[True][::-1]
        return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_repetition_routes_as_the_first_pass_whatever_the_router_says_then(ranks):
    assert ranks(2, perturbed, mode="full") == [True, True]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"activation_checkpointing_every": 2}, "every is 2, but .* is none; set full"),
        ({"activation_checkpointing_every": 0}, "every"),
        (
            {"selective_products": True},
            "needs --train.activation-checkpointing selective, not none",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Train(**options)
