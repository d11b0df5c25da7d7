"""Tensor and sequence parallelism, alone and with the other axes: the training pass of one
process.
"""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.parallel.passes import build, compare, training_pass
from tools.benchmark_layouts import SentBytes
from torchsft.config import InputError, Parallel
from torchsft.models.decoder import Linear
from torchsft.parallel.apply import parallelize
from torchsft.parallel.gradients import ExactSummands, sum_summands
from torchsft.parallel.sequence import gather_tokens, scatter_sum
from torchsft.parallel.tensor import apply_tensor_parallel
from torchsft.parallel.world import World

OTHER = {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True}
OTHER |= {"objective": (0.2, 0.05)}


@pytest.fixture(scope="module")
def one_process(ranks):
    return ranks(1, training_pass, parallel={}, balance=3.0)[0]


@pytest.fixture(scope="module")
def one_process_other(ranks):
    return ranks(1, training_pass, parallel={}, **OTHER)[0]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, {"tp": 2}),
        (4, {"tp": 4}),
        (4, {"tp": 2, "cp": 2, "ep": 2}),
        (4, {"tp": 2, "dp_shard": 2, "ep": 4}),
    ],
)
def test_loss_and_gradients_do_not_depend_on_tensor_parallelism(ranks, one_process, size, parallel):
    compare(ranks(size, training_pass, parallel=parallel, balance=3.0), one_process)


@pytest.mark.parametrize("parallel", [{"tp": 4, "ep": 4}, {"tp": 2, "cp": 2}])
def test_neither_do_those_of_a_tied_model_with_biases_and_without_a_query_latent(
    ranks, one_process_other, parallel
):
    """With label smoothing and the z-loss of logits too."""
    assert min(one_process_other["sums"]) > 1
    compare(ranks(4, training_pass, parallel=parallel, **OTHER), one_process_other)


def test_the_balance_loss_was_large_enough_to_be_seen(ranks, one_process):
    """Ten times the tolerance of `compare` in every router: a balance loss that is lost or doubled
    would fail there.
    """
    without = ranks(1, training_pass, parallel={})[0]["gradients"]
    for name, gradient in one_process["gradients"].items():
        if name.endswith("gate.weight"):
            assert (gradient - without[name]).abs().max() > 1e-4 * gradient.abs().max()


def test_bf16_gradients_have_the_right_size(ranks, one_process):
    """bf16 keeps 8 bits and flips some routings: 2 % of the loss, 15 % of a gradient's size; a lost
    factor would be 100 %.
    """
    result = ranks(
        4, training_pass, parallel={"tp": 2, "cp": 2, "ep": 2}, balance=3.0, compute=torch.bfloat16
    )[0]
    assert result["loss"] == pytest.approx(one_process["loss"], rel=0.02)
    for name, expected in one_process["gradients"].items():
        got = result["gradients"][name]
        assert got.dtype == torch.float32
        assert (got * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.15), name


class TwoMaps(nn.Module):
    """a(x) + 2 b(x)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Linear(4, 3), Linear(4, 3)

    def forward(self, x):
        return self.a(x) + 2 * self.b(x)


def gradients_of_two_microbatches(masters: torch.dtype, dp_shard: int):
    """Computed in bf16, on replicated weights; what was sent in the passes and for the sum. The
    gradients of a are 1 and then 3 * 2^-10 on one rank of a tensor group, 0 and then 3 * 2^-10 on
    the other.
    """
    with World(Parallel(tp=2, dp_shard=dp_shard, timeout_seconds=60), 0) as world:
        mesh, model = world.parameter, TwoMaps().to(masters)
        for part in model.children():
            part.bias = None
            part.weight = nn.Parameter(distribute_tensor(part.weight, mesh["tp"], [Replicate()]))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        fully_shard(model, mesh=mesh["fsdp"], mp_policy=policy)
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
        exact, is_first = ExactSummands([model]), mesh["tp"].get_local_rank() == 0
        with SentBytes() as passes:
            for x in (float(is_first), 3 * 2**-10):
                mine = x if world.data_rank == 0 else 0
                model(torch.full((1, 4), mine).bfloat16()).sum().backward()
        with SentBytes() as summing:
            sum_summands(model.parameters(), mesh["tp"], world.device, exact.take())
        gradients = [p.grad.full_tensor() for p in model.parameters()]
        return gradients, passes.calls, (summing.calls, summing.sent)


@pytest.mark.parametrize(
    ("masters", "dp_shard", "expected"),
    [
        (torch.float32, 1, 1 + 3 * 2**-9),  # bf16 has 1 or 1 + 2^-7
        (torch.bfloat16, 1, 1 + 2**-7),  # each rank's sum rounded: 1 and 3 * 2^-10, together 1
        (torch.bfloat16, 2, 1 + 2**-7),  # shards of 2 rows and 1
    ],
)
def test_gradients_of_replicated_weights_are_summed_once_a_step_together_in_fp32(
    ranks, masters, dp_shard, expected
):
    arguments = {"masters": masters, "dp_shard": dp_shard}
    results = ranks(2 * dp_shard, gradients_of_two_microbatches, **arguments)
    for (of_a, of_b), in_passes, _ in results:
        assert of_a.dtype == of_b.dtype == masters
        assert torch.equal(of_a, torch.full((3, 4), expected, dtype=masters))
        assert torch.equal(of_b, 2 * of_a)
        assert "all-reduce" not in in_passes
    # 2 (n - 1) / n of the numbers of a rank's rows, of both weights
    sent = [for_sum for *_, for_sum in results]
    rows = [3, 3] if dp_shard == 1 else [2, 2, 1, 1]
    assert sent == [({"all-reduce": 1}, {"all-reduce": 2 * count * 4 * 4}) for count in rows]


def test_what_fsdp_has_summed_is_not_overwritten_while_it_is_read(monkeypatch):
    """FSDP2 makes it on one stream of a GPU and calls the hook, which keeps it, on another."""
    made = mock.Mock(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream of the hook")
    ExactSummands([])._reduced(made)
    made.record_stream.assert_called_once_with("stream of the hook")


def placements():
    """Of each parameter's tp axis before FSDP, by name."""
    with World(Parallel(tp=2, timeout_seconds=60), 0) as world:
        model = build()
        apply_tensor_parallel(model, world)
        return {
            name: p.placements[0] if isinstance(p, DTensor) else None
            for name, p in model.named_parameters()
        }


def test_heads_and_inner_widths_are_split_and_the_rest_is_replicated(ranks):
    (found, _) = ranks(2, placements)
    names = (
        "embed_tokens",
        "lm_head",
        "q_b_proj",
        "kv_b_proj",
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj",
    )
    for name, placement in found.items():
        if ".experts." in name:
            expected = None
        elif name.removesuffix(".weight").endswith(names):
            expected = Shard(0)
        elif name.endswith(("o_proj.weight", "layers.0.mlp.down_proj.weight")):
            expected = Shard(1)
        else:
            expected = Replicate()
        assert placement == expected, name


def moved_tokens(x_nTD):
    """`gather_tokens` and `scatter_sum` of this rank's slice and summand, and gradients; each rank
    weighs otherwise.
    """
    with World(Parallel(tp=2, timeout_seconds=60), 0) as world:
        mesh, rank = world.dense["tp"], world.rank
        own = x_nTD[0].chunk(2)[rank].clone().requires_grad_()
        gathered = gather_tokens(own, mesh)
        (gathered * x_nTD[rank]).sum().backward()
        summand = x_nTD[rank].clone().requires_grad_()
        slices = scatter_sum(summand, mesh)
        (slices * x_nTD[1].chunk(2)[rank]).sum().backward()
        dist.barrier()
        return gathered.detach(), own.grad, slices.detach(), summand.grad


def test_gathering_sums_gradients_and_summing_gathers_them(ranks):
    x = torch.randn(2, 6, 3)
    for rank, (gathered, gradient, slices, summand_gradient) in enumerate(
        ranks(2, moved_tokens, x_nTD=x)
    ):
        assert torch.equal(gathered, x[0])
        assert torch.equal(gradient, (x[0] + x[1]).chunk(2)[rank])
        assert torch.equal(slices, (x[0] + x[1]).chunk(2)[rank])
        assert torch.equal(summand_gradient, x[1])


@pytest.mark.parametrize(
    ("axes", "changes", "sentence"),
    [
        (
            {"tp": 3},
            {},
            "num_attention_heads = 4, which --parallel.tp 3 x --parallel.cp 1 = 3 ranks do not "
            "divide; "
            "set --parallel.tp 1 --parallel.cp 1 --parallel.dp-shard -1",
        ),
        (
            {"tp": 4, "cp": 2, "dp_shard": 2},
            {},
            "num_attention_heads = 4, which --parallel.tp 4 x --parallel.cp 2 = 8 ranks do not "
            "divide; "
            "set --parallel.tp 4 --parallel.cp 1 --parallel.dp-shard -1",
        ),
        (
            {"tp": 4},
            {"vocab_size": 270},
            "vocab_size = 270, which --parallel.tp 4 does not divide; "
            "set --parallel.tp 2 --parallel.cp 1 --parallel.dp-shard -1",
        ),
        (
            {"tp": 4},
            {"intermediate_size": 50},
            "intermediate_size = 50, which --parallel.tp 4 does not divide; "
            "set --parallel.tp 2 --parallel.cp 1 --parallel.dp-shard -1",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_sizes_that_do(axes, changes, sentence):
    sizes = {"dp_shard": 1, "cp": 1, "tp": 1} | axes
    dense = {axis: SimpleNamespace(size=partial(int, size)) for axis, size in sizes.items()}
    with pytest.raises(InputError, match=sentence):
        apply_tensor_parallel(build(**changes), SimpleNamespace(dense=dense))


def test_an_inner_width_of_dense_layers_is_no_obstacle_where_there_are_none(ranks):
    ranks(2, build_without_dense_layers)


def build_without_dense_layers():
    with World(Parallel(tp=2, timeout_seconds=60), 0) as world:
        parallelize([build(first_k_dense_replace=0, intermediate_size=49)], world, torch.float32)
