"""Predicted memory, against torch's allocator during real steps on CPU ranks."""

import weakref

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import tiny_config, tiny_qwen3_config
from tools.benchmark_step import held_peak
from torchsft.config import Config, Data, Parallel, Precision, Train
from torchsft.data.batch import Batch
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World
from torchsft.planning import simulation
from torchsft.planning.memory import DOCUMENT, run_step
from torchsft.planning.model import plan_model
from torchsft.planning.simulation import GRADIENTS, MOMENTS, PARAMETERS, simulated_rank

SIZES = dict(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    first_k_dense_replace=1,
)


FAMILIES = {
    "deepseek_v3": (tiny_config, "DeepseekV3ForCausalLM"),
    "qwen3": (tiny_qwen3_config, "Qwen3MoeForCausalLM"),
}


def model_json(family):
    config, architecture = FAMILIES[family]
    return config(**SIZES).to_dict() | {"architectures": [architecture]}


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

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

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

        self.sizes[key] = storage.nbytes(), weakref.ref(storage, end)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)


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
        storages = Storages()

        def step():
            pipeline.step([documents(plan.tokens) for _ in range(plan.microbatches)], 1.0)

        with storages:
            step()
        parameters, buffers = list(plan.model.parameters()), plan.model.buffers()
        gradients = sum(local(p.grad).nbytes for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        allocated = held_peak(step) if world.size == 1 else None
        states = [local(x).nbytes for s in optimizer.state.values() for x in s.values() if x.ndim]
        return {
            PARAMETERS: sum(local(p).nbytes for p in (*parameters, *buffers)),
            MOMENTS: sum(states),
            GRADIENTS: gradients,
            "storages": storages.peak,
            "allocated": allocated,
        }


def each(configs, families):
    return [really(*one) for one in zip(configs, families, strict=True)]


FULL = {"activation_checkpointing": "full"}
ONE_RANK = [
    ("deepseek_v3", {}, {}),
    ("deepseek_v3", {}, FULL),
    ("qwen3", {}, {"activation_checkpointing": "selective"}),
]
TWO_RANKS = [
    ("deepseek_v3", {"dp_shard": 2, "ep": 2}, FULL),
    ("deepseek_v3", {"pp": 2, "pp_schedule": "1F1B"}, FULL),
    ("qwen3", {"pp": 2, "pp_schedule": "Interleaved1F1B"}, {}),
]


@pytest.mark.parametrize(("size", "layouts"), [(1, ONE_RANK), (2, TWO_RANKS)])
def test_a_real_step_takes_what_is_predicted(ranks, monkeypatch, size, layouts):
    """Parameters, moments and gradients to the byte; all at the peak within a tenth."""
    monkeypatch.setattr(simulation, "BLOCK", 1)
    configs = [config_of(1024, layout, **train) for _, layout, train in layouts]
    families = [family for family, _, _ in layouts]
    for rank, found in enumerate(ranks(size, each, configs=configs, families=families)):
        for config, family, real in zip(configs, families, found, strict=True):
            with simulated_rank(config.parallel, rank, size) as world:
                model = model_json(family)
                plan = plan_model(config, family_of(model), read_model_config(model), world)
                memory = run_step(plan, config, world, imbalance=1.0)
            for purpose in (PARAMETERS, MOMENTS, GRADIENTS):
                assert memory.held[purpose] == real[purpose]
            peak = memory.peak - memory.held[PARAMETERS] - memory.held[MOMENTS]
            assert peak == pytest.approx(real["storages"], rel=0.1)
            if size == 1:
                assert peak == pytest.approx(real["allocated"], rel=0.1)
