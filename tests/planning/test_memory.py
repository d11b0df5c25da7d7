"""Predicted memory, against torch's allocator during real steps on CPU ranks."""

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
from tools.benchmark_memory import H100, predict_preset
from tools.benchmark_step import held_peak
from torchsft.config import Config, Data, Parallel, Precision, Train
from torchsft.data.batch import Batch
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.ops.rms_norm import _RmsNorm
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World
from torchsft.planning import simulation
from torchsft.planning.build import plan_model
from torchsft.planning.memory import DOCUMENT, IMBALANCE, run_step
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


def config_of(seq_len, parallel, **train):
    return Config(
        data=Data(seq_len=seq_len),
        train=Train(global_batch_size=8, **train),
        parallel=Parallel(**{"dp_shard": 1} | parallel),
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


def imbalance(model, world):
    """Rows that this rank's experts have received over the mean, in the layer with most."""
    ranks, most = world.expert["ep"].size(), 1.0
    for moe in model.moe_layers().values() if ranks > 1 else ():
        rows = world.sum(moe.expert_load).view(ranks, -1).sum(1)
        most = max(most, (rows[world.rank] / rows.mean()).item())
    return most


def really(config, family):
    """Bytes of this rank's parameters, moments, gradients and receive buffers; and the most above
    the first two during a step, of storages and of what torch's allocator gave out.
    """
    with World(config.parallel, seed=0) as world:
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
        for _ in range(3 if world.size > 1 else 1):  # gloo's threads let go of rows late at times
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
            "imbalance": imbalance(plan.model, world),
            "storages": min(peaks),
            "allocated": allocated,
        }


def each(configs, families):
    return [really(*one) for one in zip(configs, families, strict=True)]


def predicted(config, family, rank, size, imbalance):
    """The same without memory. GPUs have a kernel for norms, a CPU the formulas of ops."""
    norm = SimpleNamespace(apply=lambda x, weight: _RmsNorm.apply(x, weight, 1e-6))
    found = model_json(family)
    with (
        patch.object(simulation, "BLOCK", 1),
        patch.object(simulation, "_RmsNorm", norm),
        simulated_rank(config.parallel, rank, size) as world,
    ):
        plan = plan_model(config, family_of(found), read_model_config(found), world)
        memory = run_step(plan, config, world, imbalance)
    held = {purpose: memory.held[purpose] for purpose in (PARAMETERS, MOMENTS, GRADIENTS)}
    return held | {"peak": memory.at_peak.total() - held[PARAMETERS] - held[MOMENTS]}


def each_predicted(configs, families, imbalances):
    """Of each, what every rank is predicted to have."""
    size = len(imbalances)
    return [
        [
            predicted(*one, rank, size, more)
            for *one, more in zip(configs, families, mine, strict=True)
        ]
        for rank, mine in enumerate(imbalances)
    ]


FULL = {"activation_checkpointing": "full"}
ONE_RANK = [
    ("deepseek_v3", {}, {}),
    ("deepseek_v3", {}, FULL),
    ("qwen3", {}, {"activation_checkpointing": "selective"}),
]
TWO_RANKS = [
    ("deepseek_v3", {"dp_shard": 2, "ep": 2}, FULL),
    ("deepseek_v3", {"tp": 2}, FULL),
    ("deepseek_v3", {"pp": 2, "pp_schedule": "1F1B"}, FULL),
    ("deepseek_v3", {"pp": 2, "pp_schedule": "Interleaved1F1B"}, {}),
]


@pytest.mark.parametrize(("size", "layouts"), [(1, ONE_RANK), (2, TWO_RANKS)])
def test_a_real_step_takes_what_is_predicted(ranks, size, layouts):
    """Parameters, moments and gradients to the byte; all at the peak within a tenth."""
    configs = [config_of(1024, layout, **train) for _, layout, train in layouts]
    options = {"configs": configs, "families": [family for family, _, _ in layouts]}
    of_ranks = ranks(size, each, **options)
    imbalances = [[real["imbalance"] for real in found] for found in of_ranks]
    (expected_of_ranks,) = ranks(1, each_predicted, **options, imbalances=imbalances)
    # [layout][rank]
    measured, expected = zip(*of_ranks, strict=True), zip(*expected_of_ranks, strict=True)
    for real, memory in zip(measured, expected, strict=True):
        for purpose in (PARAMETERS, MOMENTS, GRADIENTS):
            assert [m[purpose] for m in memory] == [r[purpose] for r in real]
        for which in ("storages", "allocated") if size == 1 else ("storages",):
            peaks = [r[which] for r in real], [m["peak"] for m in memory]
            assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


@pytest.mark.parametrize(
    ("preset", "imbalance"), [("v3_256", 2), ("moonlight", 2), ("gpt_oss_20b", IMBALANCE)]
)
def test_presets_fit_their_gpu(ranks, preset, imbalance):
    """The others, which take minutes: `python tools/benchmark.py memory`."""
    options = {"preset": preset, "imbalance": imbalance, "ends": False}
    (memories,) = ranks(1, predict_preset, **options)
    assert all(memory.needed <= H100 for memory in memories)
