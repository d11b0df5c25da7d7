"""Predicted memory, against torch's allocator during real steps on CPU ranks."""

import os
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.families import tiny
from tests.tiny import tiny_config, tiny_qwen3_config
from tools.benchmark_step import held_peak
from torchsft.config import Config, Data, Parallel, Precision, Train
from torchsft.data.batch import Batch
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.models.moe import MoE
from torchsft.models.routers import GroupedSigmoidRouter
from torchsft.ops.rms_norm import _RmsNorm
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World
from torchsft.planning import simulation
from torchsft.planning.build import plan_model
from torchsft.planning.memory import DOCUMENT, IMBALANCE, run_step, share_of_nodes
from torchsft.planning.simulation import GRADIENTS, MOMENTS, PARAMETERS, simulated_rank

SIZES = dict(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    first_k_dense_replace=1,
)


TINY = {
    "deepseek_v3": partial(tiny_config, **SIZES),
    "qwen3": partial(tiny_qwen3_config, **SIZES),
    "gpt_oss": partial(tiny, "gpt_oss", vocab_size=1024, hidden_size=64, intermediate_size=32),
    "llama": partial(tiny, "llama", vocab_size=1024, hidden_size=64, intermediate_size=96),
}
ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def model_json(family):
    config = TINY[family]()
    architectures = config.architectures or [ARCHITECTURES[family]]
    return config.to_dict() | {"architectures": architectures}


def config_of(layout, checkpointing):
    """A step has two microbatches, with a pipeline of two three times as many: more than are run to
    predict it.
    """
    parallel = Parallel(**{"dp_shard": 1} | layout)
    rows = (2 if parallel.pp == 1 else 6) * parallel.dp_replicate * parallel.dp_shard
    return Config(
        data=Data(seq_len=DOCUMENT),
        train=Train(global_batch_size=rows, activation_checkpointing=checkpointing),
        parallel=parallel,
        precision=Precision(compute="fp32"),
    )


def documents(tokens):
    """A microbatch of documents of one length."""
    bounds = torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32)
    ids = torch.randint(0, SIZES["vocab_size"], (tokens,))
    ones, places = torch.ones(tokens), torch.arange(tokens) % DOCUMENT
    return Batch(ids, ids.clone(), ones, places, bounds, max_seqlen=DOCUMENT, padding=0)


class Storages(TorchDispatchMode):
    """The most bytes at once of the storages that operations have returned and that are alive."""

    def __init__(self, known):
        super().__init__()
        self.sizes = {storage._cdata: None for storage in known}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operations on parts
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            has_memory = type(x) is torch.Tensor and not x.is_meta
            if has_memory and x.untyped_storage()._cdata not in self.sizes:
                self.begin(x.untyped_storage())
        return result

    def begin(self, storage):
        key = storage._cdata

        def end(_):
            self.now -= self.sizes.pop(key)[0]

        self.sizes[key] = 0, weakref.ref(storage, end)
        self.resized(storage)

    def resized(self, storage):
        size, reference = self.sizes[storage._cdata]
        self.sizes[storage._cdata] = storage.nbytes(), reference
        self.now += storage.nbytes() - size
        self.peak = max(self.peak, self.now)

    def watch_resizing(self):
        """FSDP frees what it has gathered by resizing it to 0."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):
            resize(storage, size)
            if self.sizes.get(storage._cdata):
                self.resized(storage)

        return patch.object(torch.UntypedStorage, "resize_", resize_and_count)


def imbalance(rank, ep):
    """Rows that a rank's experts receive over the mean: 1.5 times it on the first rank of `ep`, and
    on the others the rest.
    """
    if ep == 1:
        return 1.0
    return IMBALANCE if rank % ep == 0 else (ep - IMBALANCE) / (ep - 1)


def deal_unevenly(moe, experts_SK, _):
    """In place of what routers choose."""
    experts, mine = len(moe.expert_load), len(local(moe.experts.down_proj))
    ep, number_R = experts // mine, torch.arange(experts_SK.numel())
    to_first = round(len(number_R) * imbalance(0, ep) / ep)
    others_R = mine + (number_R - to_first) % max(1, experts - mine)
    return torch.where(number_R < to_first, number_R % mine, others_R).view_as(experts_SK)


def really(config, family):
    """Bytes of this rank's parameters, moments, gradients and receive buffers; and the most above
    the first two during a step, of storages and of what torch's allocator gave out.
    """
    with patch.object(MoE, "deal", deal_unevenly), World(config.parallel, seed=0) as world:
        found = model_json(family)
        plan = plan_model(config, family_of(found), read_model_config(found), world)
        allocate(plan.stages, world.device, offload=False)
        with torch.no_grad():
            for tensor in plan.model.parameters():
                local(tensor).normal_(std=0.02)
        optimizer = build_optimizer(plan.model.train(), config.optim, None, plan.stages)
        set_lr(optimizer, 1e-3)
        pipeline = plan.pipeline(config, world)
        batches = [documents(plan.tokens) for _ in range(plan.microbatches)]

        def step():
            pipeline.step(batches, 1.0)

        parameters, buffers = list(plan.model.parameters()), list(plan.model.buffers())
        inputs = [x for batch in batches for x in vars(batch).values() if isinstance(x, Tensor)]
        before = [local(x.detach()).untyped_storage() for x in (*parameters, *buffers, *inputs)]
        storages = Storages(before)
        peaks = []
        for _ in range(2 if world.size > 1 else 1):  # gloo's threads let go of rows late at times
            optimizer.zero_grad()
            storages.peak = storages.now
            with storages, storages.watch_resizing():
                step()
            peaks.append(storages.peak)
        gradients = sum(local(p.grad).nbytes for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        allocated = held_peak(step) if world.size == 1 else None
        states = [local(x).nbytes for s in optimizer.state.values() for x in s.values() if x.ndim]
        return {
            PARAMETERS: sum(local(p).nbytes for p in (*parameters, *buffers)),
            MOMENTS: sum(states),
            GRADIENTS: gradients,
            "storages": min(peaks),
            "allocated": allocated,
        }


def predicted(config, family):
    """The same without memory. GPUs have a kernel for norms, a CPU the formulas of ops."""
    norm = SimpleNamespace(apply=lambda x, weight: _RmsNorm.apply(x, weight, 1e-6))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = model_json(family)
    with (
        patch.object(simulation, "BLOCK", 1),
        patch.object(simulation, "_RmsNorm", norm),
        simulated_rank(config.parallel, rank, size) as world,
    ):
        plan = plan_model(config, family_of(found), read_model_config(found), world)
        memory = run_step(plan, config, world, imbalance(rank, config.parallel.ep))
    held = {purpose: memory.held[purpose] for purpose in (PARAMETERS, MOMENTS, GRADIENTS)}
    return held | {"peak": memory.at_peak.total() - held[PARAMETERS] - held[MOMENTS]}


def each(measure, cases):
    return [measure(config_of(layout, mode), family) for family, mode, layout in cases]


# Ranks: family, checkpointing and layout.
CASES = {
    1: [
        ("deepseek_v3", "none", {}),
        ("qwen3", "selective", {}),
        ("gpt_oss", "full", {}),
        ("llama", "stream", {}),
    ],
    2: [
        ("deepseek_v3", "stream", {"dp_shard": 2, "ep": 2}),
        ("qwen3", "none", {"tp": 2, "ep": 2}),
        ("llama", "selective", {"cp": 2}),
        ("gpt_oss", "none", {"pp": 2, "pp_schedule": "1F1B"}),
        ("deepseek_v3", "full", {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
    ],
    4: [
        ("deepseek_v3", "full", {"tp": 2, "cp": 2, "ep": 4}),
        ("gpt_oss", "full", {"dp_replicate": 2, "dp_shard": 2, "ep": 2}),
        ("qwen3", "full", {"pp": 2, "pp_schedule": "Interleaved1F1B", "dp_shard": 2, "ep": 2}),
        ("llama", "none", {"pp": 2, "pp_schedule": "InterleavedZeroBubble", "tp": 2}),
    ],
    8: [
        (
            "deepseek_v3",
            "full",
            {"pp": 2, "pp_schedule": "DualPipeV"} | {"dp_shard": 2, "tp": 2, "ep": 2},
        )
    ],
}


@pytest.mark.parametrize("size", CASES)
def test_a_real_step_takes_what_is_predicted(ranks, size):
    """Parameters, moments and gradients to the byte; all at the peak within a tenth."""
    measured = zip(*ranks(size, each, measure=really, cases=CASES[size]), strict=True)
    expected = zip(*ranks(size, each, measure=predicted, cases=CASES[size]), strict=True)
    for case, real, memory in zip(CASES[size], measured, expected, strict=True):
        for purpose in (PARAMETERS, MOMENTS, GRADIENTS):
            assert [m[purpose] for m in memory] == [r[purpose] for r in real], case
        for which in ("storages", "allocated") if size == 1 else ("storages",):
            peaks = [r[which] for r in real], [m["peak"] for m in memory]
            assert peaks[1] == pytest.approx(peaks[0], rel=0.1), case


@pytest.mark.parametrize("nodes", [2, 8])
def test_tokens_go_to_the_nodes_of_their_open_groups(nodes):
    """Random choices, of 64 experts in 8 groups of which 4 are open."""
    torch.manual_seed(0)
    gate = GroupedSigmoidRouter(8, 64, top_k=8, normalise=True, groups=8, top_groups=4)
    chosen_SK = gate.choose(torch.rand(4000, 64))
    hit = torch.zeros(4000, nodes).scatter_(1, chosen_SK // (64 // nodes), 1)
    assert hit.mean().item() == pytest.approx(share_of_nodes(gate, nodes), rel=0.03)
    gate.groups = gate.top_groups = 1
    hit = torch.zeros(4000, nodes).scatter_(1, torch.randint(nodes, (4000, 8)), 1)
    assert hit.mean().item() == pytest.approx(share_of_nodes(gate, nodes), rel=0.03)
