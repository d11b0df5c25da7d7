"""How much memory a step takes on a GPU, and for what: the step itself runs, of any rank of a run
of any size, on tensors without memory (simulation.py), with the real model, layout, schedule and
loss.

What it cannot know is stated: how unevenly tokens choose experts, how long documents are, and what
a device keeps for itself.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchsft.config import Config, Parallel
from torchsft.data.batch import Batch
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.models.moe import Router
from torchsft.optim.offload import gathered_from
from torchsft.parallel.memory import held_moments
from torchsft.planning.build import ModelPlan, plan_model
from torchsft.planning.simulation import (
    GRADIENTS,
    META,
    MOMENTS,
    PARAMETERS,
    RANKS_PER_NODE,
    LiveMemory,
    SimulatedWorld,
    simulated_rank,
)

IMBALANCE = 1.5  # rows that a rank's experts receive, over the mean
DOCUMENT = 512  # tokens of each document of a packed row
# Bytes beside torch's tensors: CUDA's context, kernels and NCCL's communicators.
CONTEXT = 3_500_000_000
# Bytes between torch's tensors: what its allocator has reserved and cannot give.
FRAGMENTS = 2_000_000_000
RESERVE = CONTEXT + FRAGMENTS


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank when it holds most.

    Attributes:
        pp_rank: which pipeline rank it is.
        held: bytes by purpose (names in simulation.py).
        host: bytes on the host at most (--optim.offload, --train.activation-offload), pinned.
        timeline: as `held`, at the worst moment of each layer's passes, in their order.
    """

    pp_rank: int
    held: Mapping[str, int]
    host: int
    timeline: Sequence[Mapping[str, int]] = ()

    @property
    def allocated(self) -> int:
        """What torch's tensors take: `torch.cuda.max_memory_allocated`."""
        return sum(self.held.values())

    @property
    def needed(self) -> int:
        """The same and the reserve: what a device must have."""
        return self.allocated + RESERVE


def predict(
    config: Config,
    model_config: Mapping[str, Any],
    size: int,
    pp_rank: int = 0,
    imbalance: float = IMBALANCE,
) -> Memory:
    """Predict the memory of a pipeline rank's first data rank through a step behind the first one.

    Args:
        config, model_config, size, pp_rank: see `planned_rank`.
        imbalance: rows that the rank's experts receive, in all layers and microbatches, over the
            mean.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    config = on_gpus(config)
    with planned_rank(config, model_config, size, pp_rank) as (plan, world):
        return memory_of(plan, config, world, imbalance)


def on_gpus(config: Config) -> Config:
    """Return the configuration with what `auto` in --precision.compute is on a GPU."""
    if config.precision.compute != "auto":
        return config
    precision = dataclasses.replace(config.precision, compute="bf16")
    return dataclasses.replace(config, precision=precision)


@contextmanager
def planned_rank(
    config: Config,
    model_config: Mapping[str, Any],
    size: int,
    pp_rank: int = 0,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Iterator[tuple[ModelPlan, SimulatedWorld]]:
    """Be a pipeline rank's first data rank, and spread the model over the ranks.

    Args:
        config: of the run; resolved, see `on_gpus`.
        model_config: config.json of the model.
        size: ranks.
        pp_rank: of `--parallel.pp`.
        ranks_per_node: GPUs of a node.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    rank = pp_rank * (size // config.parallel.pp)
    with simulated_rank(config.parallel, rank, size, ranks_per_node) as world:
        yield (
            plan_model(config, family_of(model_config), read_model_config(model_config), world),
            world,
        )


def memory_of(plan: ModelPlan, config: Config, world: SimulatedWorld, imbalance: float) -> Memory:
    """Return what a rank holds through a step; it leaves the plan's model changed."""
    memory = run_step(plan, config, world, imbalance)
    host = memory.host_peak
    if config.optim.offload:
        host += held_moments(plan.model, config.optim)
    return Memory(world.dense.get_local_rank("pp"), memory.at_peak, host, memory.timeline)


def run_step(
    plan: ModelPlan, config: Config, world: SimulatedWorld, imbalance: float
) -> LiveMemory:
    """Run a step's passes, behind an update that has made moments."""
    memory = LiveMemory(answers(plan, world, imbalance))
    on_host, parallel = config.optim.offload, config.parallel
    for tensor in (*plan.model.parameters(), *plan.model.buffers()):
        with_memory = not (on_host and isinstance(tensor, nn.Parameter))
        storage = local(tensor.detach()).untyped_storage()
        memory.hold(storage, PARAMETERS if with_memory else None)
    if not on_host:
        memory.add(held_moments(plan.model, config.optim), MOMENTS)
    if parallel.pp == 1 and plan.microbatches > 1:
        # One is run: a later one, which finds gradients there.
        for parameter in plan.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                storage = local(parameter.grad).untyped_storage()
                memory.hold(storage, None if on_host else GRADIENTS)
    # FSDP replaces parameters in these dictionaries
    begin_layer = partial(
        _begin_layer, memory, [module._parameters for module in plan.model.modules()]
    )
    for layer in plan.model.model.layers.values():
        layer.compute = _counted(layer.compute, begin_layer)
    with memory:
        if on_host:
            for stage in plan.stages:
                stage.register_forward_pre_hook(put_copies_on_device)
        several = microbatches_run(parallel, plan.microbatches)
        batches = [full_batch(plan.tokens) for _ in range(several)]
        pipeline = dataclasses.replace(plan, microbatches=several).pipeline(config, world)
        plan.model.train()
        pipeline.step(batches, 1.0)
        begin_layer()
    return memory


def microbatches_run(parallel: Parallel, microbatches: int) -> int:
    """Return how many of a step's microbatches are run to predict it."""
    if parallel.pp == 1:
        return 1
    # No other schedule has more in flight, and none keeps anything of those that are done.
    return microbatches if parallel.pp_schedule == "GPipe" else min(microbatches, 2 * parallel.pp)


def answers(plan: ModelPlan, world: SimulatedWorld, imbalance: float) -> Callable[[Tensor], Tensor]:
    """Return what the host is told of the device's integers, see `LiveMemory`."""
    ep, nodes = world.expert["ep"].size(), world.expert_nodes
    chosen = [torch.Size()]  # of the exchange that is planned: tokens and choices
    moes = [*plan.model.moe_layers().values()]
    for moe in moes:
        if ep > 1:
            moe.exchange.plan = _noted(moe.exchange.plan, chosen)

    def ask(integers: Tensor) -> Tensor:
        """Tell the host how long documents are, or how many rows go to and come from each rank, and
        where those of each expert here end.
        """
        count = integers.numel()
        if integers.ndim == 1:
            documents = count - 1
            return torch.tensor([plan.tokens // documents] * documents + [0])
        tokens, choices = chosen[0]
        rows = tokens * choices
        counts = torch.full((ep,), rows // ep)
        if nodes > 1:  # copies and rows for each node, then rows for each rank of this one
            copies = int(tokens * share_of_nodes(moes[0].gate, nodes))
            each = rows // nodes, rows // (ep // nodes)
            counts = torch.tensor([copies, *each]).repeat_interleave(
                torch.tensor([nodes, nodes, ep // nodes])
            )
        received = counts.clone()
        received[2 * nodes * (nodes > 1) :] = int(imbalance * counts[-1])
        experts = count - 2 * len(counts)
        here = received[2 * nodes * (nodes > 1) :].sum()
        ends = torch.arange(1, experts + 1) * here // experts
        return torch.cat([counts, received, ends]).unsqueeze(0)

    return ask


def share_of_nodes(gate: Router, nodes: int) -> float:
    """Return the share of nodes that hold some of the experts that a token chooses at random: where
    groups of experts compete, those that hold an open one; else by each choice alone.
    """
    groups = getattr(gate, "groups", 1)
    if groups % nodes == 0:
        elsewhere = math.comb(groups - groups // nodes, gate.top_groups)
        return 1 - elsewhere / math.comb(groups, gate.top_groups)
    return 1 - (1 - 1 / nodes) ** gate.top_k


@torch.no_grad()  # in which `local` costs little
def _begin_layer(memory: LiveMemory, of_modules: list[dict[str, nn.Parameter | None]]) -> None:
    parameters = itertools.chain.from_iterable(each.values() for each in of_modules)
    memory.begin_layer(local(p.grad) for p in parameters if p is not None and p.grad is not None)


def _counted(compute: Callable[..., Tensor], begin_layer: Callable[[], None]) -> Any:
    """Return a layer's `compute` that says when it begins, also when it is computed again."""

    def compute_and_count(*args: Any) -> Tensor:
        begin_layer()
        return compute(*args)

    return compute_and_count


def _noted(plan: Callable[[Tensor], Any], chosen: list[torch.Size]) -> Any:
    """Return an exchange's `plan` that says how many tokens choose how many experts: where a layer
    is streamed, those of a piece.
    """

    def note_and_plan(chosen_SK: Tensor) -> Any:
        chosen[0] = chosen_SK.shape
        return plan(chosen_SK)

    return note_and_plan


def put_copies_on_device(stage: FSDPModule, _: Any) -> None:
    """Let FSDP gather from copies in the dtype to gather in, as optim/offload.py does."""
    for module in stage.modules():
        for part in gathered_from(module) if isinstance(module, FSDPModule) else ():
            part._sharded_param_data = part._sharded_param_data.to(part.param_dtype)


def full_batch(tokens: int) -> Batch:
    """Return a microbatch that is full."""
    integers = torch.empty(tokens, dtype=torch.int64, device=META)
    bounds = torch.empty(max(1, tokens // DOCUMENT) + 1, dtype=torch.int32, device=META)
    weights = torch.empty(tokens, device=META)
    return Batch(integers, integers, weights, integers, bounds, max_seqlen=tokens, padding=0)
