"""Activation checkpointing: the gradients of a pass that keeps all, and what is computed again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ops.passes import Operations
from tests.parallel.passes import TOKENS, build, fill, full, microbatch, on_nodes
from torchsft.config import Config, Data, InputError, Parallel, Precision, Train
from torchsft.ops.repetition import repeating
from torchsft.parallel import activation_offload
from torchsft.parallel.apply import parallelize
from torchsft.parallel.memory import activation_bytes
from torchsft.parallel.world import World

MODES = {
    "none": Train(),
    "full": Train(activation_checkpointing="full"),
    "selective": Train(activation_checkpointing="selective"),
    "products": Train(activation_checkpointing="selective", selective_products=True),
    "offload": Train(activation_checkpointing="full", activation_offload=True),
    "offload products": Train(
        activation_checkpointing="selective", selective_products=True, activation_offload=True
    ),
    "every second": Train(activation_checkpointing="full", activation_checkpointing_every=2),
}
# Their sums over tokens have other orders.
STREAMED = {
    "stream": Train(activation_checkpointing="stream", stream_pieces=3),
    "stream offload": Train(activation_checkpointing="stream", activation_offload=True),
}
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCT = "aten::_grouped_mm"
EXCHANGE = "c10d::alltoall_base_"
REDUCE = "_c10d_functional::all_reduce"
FSDP = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
WAYS = ("forward", "backward")
COUNTED = ("forward", "backward", "read", "forward_read")
EXPERT_LAYERS = 2  # of the tiny DeepSeek-V3, behind a dense layer; numbers 1 and 2


def model_of(mode: str, world: World, **changes: Any) -> Any:
    activation_offload.LEAST = 0  # a tiny model's tensors too; ranks are forks of their own
    model = build(**changes)
    parallelize([model], world, torch.float32, activations=(MODES | STREAMED)[mode])
    fill(model)
    for moe in model.moe_layers().values():
        moe.balance_scale = moe.z_scale = 0.1
    return model


def passes(mode: str, world: World, **changes: Any) -> dict[str, Any]:
    """Loss and gradients, counters, and what a forward and a backward pass did on this rank."""
    model = model_of(mode, world, **changes)
    if "stream" in mode:
        for layer in model.model.layers.values():
            assert layer.stream is not None
    tolist = mock.Mock(wraps=torch.Tensor.tolist)
    with mock.patch.object(torch.Tensor, "tolist", lambda tensor: tolist(tensor)):
        with Operations() as forward:
            loss = model(**microbatch(world.data_rank))
        forward_read = tolist.call_count
        with Operations() as backward:
            loss.backward()
        backward_read = tolist.call_count - forward_read
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: full(p.grad) for name, p in trained.items()}
    moes = model.moe_layers().values()
    return {
        "values": gradients | {"loss": loss.detach()},
        "counters": [[m.expert_load.tolist(), m.balance_loss, m.z_loss] for m in moes],
        "forward": forward.count,
        "backward": backward.count,
        "read": backward_read,
        "forward_read": forward_read,
    }


def evaluate(mode: str, world: World, **changes: Any) -> float:
    """The loss of a model that has not been trained."""
    model = model_of(mode, world, **changes).eval()
    with torch.no_grad():
        return model(**microbatch(world.data_rank)).item()


def all_modes(
    parallel: dict[str, int], modes: Collection[str] = MODES, **changes: Any
) -> dict[str, dict[str, Any]]:
    """On the calling ranks; also that gradients equal those of `none` bit by bit: they come from
    the same operations on the same numbers.
    """
    with World(Parallel(timeout_seconds=60, **parallel), 0) as world:
        found = {mode: passes(mode, world, **changes) for mode in modes}
    expected = found["none"]
    for result in found.values():
        assert result["counters"] == expected["counters"]
        assert result["values"].keys() == expected["values"].keys()
        for name, value in expected["values"].items():
            assert torch.equal(result["values"][name], value), name
    return {mode: {key: result[key] for key in COUNTED} for mode, result in found.items()}


def streamed(parallel: dict[str, int], modes: Collection[str], **changes: Any) -> list[Any]:
    """On the calling ranks: `stream` and the like against `none`, to what sums in another order
    differ by.

    Returns:
        Of each mode, what a forward and a backward pass did.
    """
    with World(Parallel(timeout_seconds=60, **parallel), 0) as world:
        expected = passes("none", world, **changes)
        found = [passes(mode, world, **changes) for mode in modes]
        evaluated = [evaluate(mode, world, **changes) for mode in ("none", *modes)]
    assert all(abs(loss - evaluated[0]) <= 1e-6 * abs(evaluated[0]) for loss in evaluated)
    for result in found:
        assert result["values"].keys() == expected["values"].keys()
        for name, value in expected["values"].items():
            error = (result["values"][name] - value).abs().max()
            assert error <= 1e-5 * value.abs().max(), name
        for mine, whole in zip(result["counters"], expected["counters"], strict=True):
            assert mine[0] == whole[0]  # load of experts
            torch.testing.assert_close(mine[1:], whole[1:], rtol=1e-5, atol=1e-6)
    return [{key: result[key] for key in COUNTED} for result in (expected, *found)]


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
        "offload": (attention, EXPERT_LAYERS),
        "offload products": (0, 0),
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
    modes = ("none", "full", "products")
    (found,) = ranks(1, all_modes, parallel={}, modes=modes, family="gpt_oss")
    assert [again(found, mode, PRODUCT) for mode in modes] == [0, 8, 4]
    assert again(found, "products", ATTENTION) == 0 < again(found, "full", ATTENTION)


@pytest.mark.parametrize(
    ("n", "parallel", "levels"),
    [
        (2, {"dp_shard": 2, "ep": 2}, 1),
        (2, {"tp": 2, "ep": 2}, 1),
        (4, {"dp_shard": 4, "ep": 4}, 2),
    ],
    ids=str,
)
def test_ranks_exchange_rows_and_weights_again_but_no_counts_and_nothing_comes_back(
    ranks, n, parallel, levels
):
    """Nor does the host read anything, nor are the counts of the balance loss summed."""
    modes = ("none", "full", "products")
    arguments = {"ranks_per_node": 2, "call": all_modes, "parallel": parallel, "modes": modes}
    for found in ranks(n, on_nodes, **arguments):
        # rows, weights, one exchange of counts or experts; rows back
        assert found["none"]["forward"][EXCHANGE] == (1 + 3 * levels) * EXPERT_LAYERS
        assert found["none"]["backward"][EXCHANGE] == 3 * levels * EXPERT_LAYERS
        for mode in modes:
            layers = 0 if mode == "none" else EXPERT_LAYERS
            assert found[mode]["read"] == 0 < found[mode]["forward_read"]
            assert again(found, mode, EXCHANGE) == 2 * levels * layers
            assert again(found, mode, PRODUCT) == (layers if mode == "full" else 0)


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


def each_held(modes: list[str]) -> list[tuple[list[bool], list[bool], int, int]]:
    with World(Parallel(timeout_seconds=60), 0) as world:
        return [held(mode, world) for mode in modes]


def held(mode: str, world: World) -> tuple[list[bool], list[bool], int, int]:
    """Whether the inputs of layers still exist behind the forward pass, and whether all that went
    to the host is gone behind the backward pass; the bytes of fp32 there, and what is foreseen.
    """
    model = model_of(mode, world)
    inputs: list[weakref.ref] = []
    for layer in list(model.model.layers.values())[1:]:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    moved: list[weakref.ref] = []
    init = activation_offload.OnHost.__init__
    with mock.patch.object(
        activation_offload.OnHost,
        "__init__",
        lambda self, *args: (moved.append(weakref.ref(self)), init(self, *args))[1],
    ):
        loss = model(**microbatch(0))
    alive = [each() is not None for each in inputs]
    there = [each() is not None for each in moved]
    hosts = [each().host for each in moved]
    there_bytes = sum(host.nbytes for host in hosts if host.dtype == torch.float32)
    del hosts
    config = Config(train=MODES[mode], data=Data(seq_len=TOKENS))
    foreseen = activation_bytes(model, config, torch.float32, 1, is_pinned=False)
    loss.backward()
    del loss
    gone = [each() is None for each in moved]
    return alive, [*there, *gone], there_bytes, foreseen


def test_what_is_on_the_host_is_not_on_the_device_and_is_gone_behind_the_backward_pass(ranks):
    """Of 3 layers: their inputs, and with products 5 documents' outputs and lse, and gate|up."""
    (found,) = ranks(1, each_held, modes=["full", "offload", "offload products"])
    assert [alive for alive, *_ in found] == [[True] * 2, [False] * 2, [False] * 2]
    for (_, moved, _, _), least in zip(found, (0, 3, 3 + 3 * 10 + 2), strict=True):
        assert len(moved) >= 2 * least and all(moved)
    for *_, there, foreseen in found[1:]:  # not foreseen: routing weights and padding of values
        assert foreseen <= there <= 1.05 * foreseen


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"activation_checkpointing_every": 2},
            "every 2 is for .* full or selective or stream, not none; leave .* full",
        ),
        ({"activation_checkpointing_every": 0}, "every"),
        (
            {"selective_products": True},
            "products is for .*-checkpointing selective, not none; leave it out, or set selective",
        ),
        ({"activation_offload": True}, "offload is for .* stream, not none; .* set full"),
        ({"stream_pieces": 3}, "pieces 3 is for .* stream, not none; leave it out, or set stream"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Train(**options)


@pytest.mark.parametrize("compute", ["float8", "blockwise", "bf16"])
def test_streaming_in_fp8_is_refused(compute):
    precision = Precision(compute=compute, experts="mxfp8" if compute == "bf16" else "same")
    with pytest.raises(InputError, match=f"{compute} and --precision.experts {precision.experts}"):
        Config(train=STREAMED["stream"], precision=precision)


@pytest.mark.parametrize(
    ("parallel", "family"),
    [
        ({}, ""),
        ({"dp_shard": 4, "ep": 4}, ""),  # at two levels
        ({"dp_replicate": 2}, ""),
        ({"tp": 2, "ep": 2}, ""),
        ({"tp": 2}, "minimax_m2"),
        ({"cp": 2}, ""),
        ({"cp": 2}, "deepseek_v32"),
        ({"dp_shard": 2}, "gpt_oss"),
        ({"dp_shard": 2}, "llama"),
    ],
    ids=str,
)
def test_streamed_layers_have_the_same_gradients_and_gather_and_reduce_no_more_often(
    ranks, parallel, family
):
    """Nor do they route or ask the host again. (An indexer chooses again, as with `full`.)"""
    n = math.prod(size for axis, size in parallel.items() if axis != "ep")
    arguments = {"ranks_per_node": 2, "call": streamed, "parallel": parallel, "family": family}
    for none, *found in ranks(n, on_nodes, modes=list(STREAMED), **arguments):
        for each in found:
            assert each["read"] == 0 < none["forward_read"]
            for operation in FSDP:
                assert sum(each[way][operation] for way in WAYS) == sum(
                    none[way][operation] for way in WAYS
                )
            for operation in ("aten::topk", "aten::sort", "aten::scatter_add_"):
                assert each["backward"][operation] == 0 or family == "deepseek_v32"


def rounding(pieces: int) -> dict[str, float]:
    """How far bf16 gradients of the last layer are from those of `full`, relative to these (norms).
    What flows into this layer is the same.
    """
    stream = Train(activation_checkpointing="stream", stream_pieces=pieces)
    with World(Parallel(timeout_seconds=60), 0) as world:
        gradients = []
        for mode in (MODES["full"], stream):
            model = build(num_attention_heads=16, num_key_value_heads=16)
            parallelize([model], world, torch.bfloat16, activations=mode)
            fill(model)
            model(**microbatch(0)).backward()
            gradients.append({name: full(p.grad) for name, p in model.named_parameters()})
    expected, found = gradients
    return {
        name: float((found[name] - value).norm() / value.norm())
        for name, value in expected.items()
        if name.startswith(f"model.layers.{EXPERT_LAYERS}.")
    }


def test_gradients_of_pieces_are_added_up_in_fp32(ranks):
    """The gradient of the whole is rounded once, by 2^-9 of an element at most; of pieces, each is,
    and their sum; in attention, products with what was rounded so are rounded again. The norm
    between attention and experts is in one piece. One piece is the whole.
    """
    (errors,) = ranks(1, rounding, pieces=48)
    for name, error in errors.items():
        assert error < (3 if "self_attn" in name or "input" in name else 2) * 2**-9, name
    assert errors[f"model.layers.{EXPERT_LAYERS}.post_attention_layernorm.weight"] == 0
    assert len(errors) > 10 and max(errors.values()) > 0
    (errors,) = ranks(1, rounding, pieces=1)
    assert set(errors.values()) == {0.0}


def test_checkpointing_no_layer_is_refused():
    """As --train.activation-checkpointing-every would be followed in nothing."""
    beyond = Train(activation_checkpointing="full", activation_checkpointing_every=4)
    refused = pytest.raises(InputError, match=r"every is 4, but the model has 3 layers, .* most 3")
    with World(Parallel(), 0) as world, refused:
        parallelize([build()], world, torch.float32, activations=beyond)
