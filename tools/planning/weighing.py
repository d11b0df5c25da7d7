"""How much a combination needs and about how long it takes, for tens of thousands of them: a quick
sum (parameters by layout, activations by blocks that were measured once, scaled by tokens) and a
rough time beside others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch

from tools.planning.blocks import layer_names
from tools.planning.candidates import (
    AXES,
    CHECKPOINTING,
    INEXACT,
    OPTIMIZERS,
    PRECISIONS,
    Task,
    layouts,
)
from tools.planning.costs import OF_ATTENTION, OF_MEMORY, PRODUCTS, Software
from tools.planning.estimate import HOST_BANDWIDTH, PCIE, Estimate, Step
from tools.planning.gpus import Gpu
from tools.planning.operations import EMBEDDING, HEAD, MTP, Blocks
from tools.planning.options import changed, option
from tools.planning.replay import BACKWARD, FORWARD, INPUT, WEIGHT, order
from tools.planning.report import PROCESS, check_gpu
from torchsft.cli import (
    Values,
)
from torchsft.config import Config, InputError, Parallel
from torchsft.config.optim_options import BLOCK
from torchsft.data.stream import microbatches_of, tokens_per_microbatch
from torchsft.models.families import family_of
from torchsft.models.language_model import trained_mtp_layers
from torchsft.parallel.memory import FP32
from torchsft.parallel.sequence import check_sizes
from torchsft.parallel.stages import ONE_STAGE, ZERO_BUBBLE, StagePlan, plan_stages
from torchsft.parallel.tensor import style_of
from torchsft.planning.memory import RESERVE


@dataclass(frozen=True)
class Role:
    """A pipeline rank.

    Attributes:
        stages: blocks of each of its stages.
        in_flight: microbatches of each of them, when they are most together.
        is_first: whether a stage is the model's first, which receives nothing.
    """

    pp_rank: int
    stages: tuple[tuple[str, ...], ...]
    in_flight: tuple[int, ...]
    is_first: tuple[bool, ...]


def most_in_flight(
    schedule: str, plan: StagePlan, microbatches: int, whole: bool
) -> list[tuple[int, ...]]:
    """Return, of each pipeline rank, the microbatches that its stages keep, when they are most.

    Args:
        whole: whether backward passes that a schedule splits are computed at once.
    """
    ranks = max(plan.ranks) + 1
    ends = (BACKWARD, INPUT) if whole else (BACKWARD, WEIGHT)
    found = []
    for rank, actions in enumerate(order(schedule, ranks, len(plan.layers), microbatches)):
        now = dict.fromkeys(plan.local(rank), 0)
        most: tuple[int, ...] = (0,)
        for action in actions:
            now[action.stage] += (action.kind == FORWARD) - (action.kind in ends)
            most = max(most, tuple(now.values()), key=sum)
        found.append(most)
    return found


class Layouts:
    """Which pipeline ranks there are; remembers, since many layouts share that."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.known: dict[Any, list[Role]] = {}
        self.mtp_layers = trained_mtp_layers(task.config.model.mtp, task.sizes)

    def roles(self, config: Config, names: Sequence[str]) -> list[Role]:
        """Return pipeline ranks of which no other has the same blocks and as many microbatches.

        Args:
            names: of the layers' blocks.

        Raises:
            InputError: layers, schedule, ranks and rows do not fit together.
        """
        parallel, microbatches = config.parallel, microbatches_of(config)
        whole = config.train.activation_checkpointing != "none"
        key = parallel.pp, parallel.pp_schedule, microbatches, tuple(names), whole
        if key not in self.known:
            self.known[key] = self._roles(parallel, microbatches, names, whole)
        return self.known[key]

    def _roles(
        self, parallel: Parallel, microbatches: int, names: Sequence[str], whole: bool
    ) -> list[Role]:
        plan = plan_stages(parallel, self.task.sizes, microbatches, self.mtp_layers)
        most = min(microbatches, 2 * parallel.pp)
        if parallel.pp_schedule == "GPipe":
            most = microbatches
        flights = most_in_flight(parallel.pp_schedule, plan, most, whole)
        last, found = len(plan.layers) - 1, {}
        for rank, in_flight in enumerate(flights):
            local = plan.local(rank)
            stages = tuple(
                (EMBEDDING,) * (stage == 0)
                + tuple(names[layer] for layer in plan.layers[stage])
                + (MTP,) * (stage == last and self.mtp_layers > 0)
                + (HEAD,) * (stage == last)
                for stage in local
            )
            role = Role(rank, stages, in_flight, tuple(stage == 0 for stage in local))
            found.setdefault((stages, in_flight), role)
        return list(found.values())


def state_bytes(config: Config, shards: int, trained: int, gathered: int) -> float:
    """Return what parameters, gradients and moments take through a step.

    Args:
        shards: elements that a rank has of parameters, of which `trained` are trained.
        gathered: elements of gathered copies, kept through a step in pipelines alone.
    """
    optim, pipeline = config.optim, config.parallel.pp > 1
    copies = gathered * (2 + FP32 + 2 * (config.precision.compute == "blockwise"))
    if optim.offload:
        return 2 * shards + copies * pipeline
    master = 2 if optim.masters == "bf16" else FP32
    moments = {"fp32": 2 * FP32, "bf16": 4, "int8": 2 + 2 * FP32 / BLOCK}[optim.moments]
    state = shards * master + trained * moments
    return state + (copies if pipeline else trained * master)


def host_bytes(config: Config, shards: int, trained: int) -> float:
    """Return what a rank takes of its host: the process, what --optim.offload keeps there, and the
    copy of a checkpoint that is written beside training.
    """
    offload = config.optim.offload
    size = FP32 * (2 * shards + 2 * trained) if offload else 0
    if config.checkpoint.mode == "async":
        size += (1 if offload else ROUNDED_UP) * FP32 * (shards + 2 * trained)
    return PROCESS + size


def quick_sum(config: Config, blocks: Blocks, roles: Sequence[Role]) -> tuple[int, int, int]:
    """Return the bytes that the fullest pipeline rank needs, which one it is, and what a rank needs
    at most of its host.
    """
    sums = [(*map(round, _needed(config, blocks, role)), role.pp_rank) for role in roles]
    needed, _, pp_rank = max(sums)
    return needed, pp_rank, max(host for _, host, _ in sums)


def _needed(config: Config, blocks: Blocks, role: Role) -> tuple[float, float]:
    known, parallel = blocks.by_name, config.parallel
    own = [known[name] for stage in role.stages for name in stage]
    shards, trained, gathered = (
        sum(getattr(block, name) for block in own) for name in ("parameters", "trained", "gathered")
    )
    kept = 0
    for stage, count, is_first in zip(role.stages, role.in_flight, role.is_first, strict=True):
        kept += count * sum(known[name].kept for name in stage)
        kept += 0 if is_first or parallel.pp == 1 else count * blocks.hidden
    working = max(block.working for block in own)
    total = state_bytes(config, shards, trained, gathered) + kept + working + RESERVE
    if parallel.pp == 1:
        # Two layers are gathered, and embedding and head all the time; and a layer's gradients.
        ends = known[EMBEDDING].gathered + known[HEAD].gathered
        layer = max(known[name].gathered for name in blocks.layers)
        total += 2 * (ends + 2 * layer) + FP32 * max(layer, ends / 2)
        if microbatches_of(config) == 1 and not config.optim.offload:
            total -= min(kept, trained * FP32)  # gradients come as activations go
    return total, host_bytes(config, shards, trained)


ROUNDED_UP = 1.4  # pinned memory, each tensor to a power of two


@dataclass(frozen=True)
class Elements:
    """Elements of a block's parameters.

    Attributes:
        split: over tp.
        whole: on each of its ranks.
        experts: of all routed experts.
    """

    split: int = 0
    whole: int = 0
    experts: int = 0

    def __add__(self, other: Elements) -> Elements:
        return Elements(
            self.split + other.split, self.whole + other.whole, self.experts + other.experts
        )

    def on_a_rank(self, parallel: Parallel) -> tuple[int, int]:
        """Return those of a shard, and of a gathered copy."""
        dense = self.split // parallel.tp + self.whole
        shards = parallel.dp_shard * parallel.cp
        of_experts = self.experts // (shards * parallel.tp)
        return dense // shards + of_experts, dense + self.experts // parallel.ep


def elements_of(task: Task) -> dict[str, Elements]:
    """Count the elements of each block, by its name."""
    config, found = task.config, {}
    family = family_of(task.model_config)
    with torch.device("meta"):
        model = family(task.sizes, mtp=config.model.mtp)
    names = layer_names(config, task.sizes)
    for name, parameter in model.named_parameters():
        module, _, key = name.rpartition(".")
        kind = EMBEDDING if "embed_tokens" in name else HEAD
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            kind = names[layer] if layer < len(names) else MTP
            if layer < len(names) and names.index(kind) != layer:
                continue
        count = parameter.numel()
        if ".experts." in name and "shared" not in name:
            one = Elements(experts=count)
        elif style_of(module, model.tensor_parallel) in (None, "gather") or key == "bias":
            one = Elements(whole=count)
        else:
            one = Elements(split=count)
        found[kind] = found.get(kind, Elements()) + one
    return found


def scaled(blocks: Blocks, elements: Mapping[str, Elements], config: Config) -> Blocks:
    """Return blocks that were measured in another layout as they are about in this one."""
    parallel, train = config.parallel, config.train
    tokens = tokens_per_microbatch(
        train.micro_batch_size, config.data.seq_len, parallel.cp, parallel.tp
    )
    share = tokens / (parallel.cp * parallel.tp) / blocks.tokens
    by_name = {}
    for name, block in blocks.by_name.items():
        shards, gathered = elements[name].on_a_rank(parallel)
        by_name[name] = dataclasses.replace(
            block,
            parameters=shards,
            trained=shards * block.trained // max(block.parameters, 1),
            gathered=gathered,
            kept=round(share * block.kept),
            working=round(share * block.working),
        )
    return dataclasses.replace(blocks, by_name=by_name, hidden=round(share * blocks.hidden))


LINKS = 0.6  # share of links' bandwidth that `rough_seconds` counts on


@dataclass(frozen=True)
class Whole:
    """The whole model.

    Attributes:
        moes: layers with experts.
        elements: of all layers.
        seconds: that kernels take for a token of a row, both ways, by `modes_of`.
    """

    moes: int
    elements: Elements
    seconds: Mapping[Any, float]


def whole_of(
    task: Task, elements: Mapping[str, Elements], references: Mapping[Any, Blocks]
) -> Whole:
    """Return what `rough_seconds` needs."""
    layers = range(task.sizes.num_hidden_layers)
    names = layer_names(task.config, task.sizes)
    together = sum((elements[name] for name in names), Elements())
    seconds = {}
    for modes, blocks in references.items():
        step = Step(task.config, task.model_config, task.size, task.gpu, Software(), blocks)
        total = 0.0
        for name, count in Counter([*names, EMBEDDING, HEAD]).items():
            for parts in step.passes(blocks.by_name[name]):
                total += count * sum(parts[each] for each in (PRODUCTS, OF_ATTENTION, OF_MEMORY))
        seconds[modes] = total / blocks.tokens
    return Whole(sum(map(task.sizes.is_moe, layers)), together, seconds)


def rough_seconds(task: Task, whole: Whole, config: Config, microbatches: int) -> float:
    """Return about how long a step takes beside others: kernels, rows on their way to experts,
    what tensor and context ranks exchange, the bubble, and gathers and sums of parameters.
    """
    gpu, sizes, parallel = task.gpu, task.sizes, config.parallel
    tokens = config.train.global_batch_size * config.data.seq_len / task.size
    inside, outside = gpu.node_bandwidth * LINKS, gpu.network_bandwidth * LINKS
    passes = tokens * whole.seconds[modes_of(config)]
    hidden = 2 * sizes.hidden_size * tokens  # bytes of a rank's tokens in a layer
    if parallel.ep > 1:
        nodes = parallel.ep / gpu.ranks_per_node
        if nodes > 1:
            passes += 8 * hidden * whole.moes * min(4, nodes) * (1 - 1 / nodes) / outside
        else:
            passes += 32 * hidden * whole.moes / inside
    if parallel.tp > 1:
        passes += 12 * hidden * parallel.tp * sizes.num_hidden_layers / inside
    if parallel.cp > 1:
        speed = inside if parallel.cp * parallel.tp <= gpu.ranks_per_node else outside
        passes += 12 * hidden * sizes.num_hidden_layers / speed
    shared = 0.0
    if parallel.dp_shard * parallel.cp > 1:
        edp = parallel.dp_shard * parallel.cp * parallel.tp // parallel.ep
        size = whole.elements.split / parallel.tp + whole.elements.whole
        size += whole.elements.experts / parallel.ep * (edp > 1)
        times = 8 / parallel.pp * (microbatches if parallel.pp == 1 else 1)
        within = task.size <= gpu.ranks_per_node
        shared = times * size / (inside if within else outside * gpu.ranks_per_node)
    if config.optim.offload:
        size = dataclasses.astuple(whole.elements)
        size = sum(size) / task.size * parallel.dp_replicate
        passes += FP32 * size / PCIE + max(0.0, 9 * FP32 * size / HOST_BANDWIDTH - passes / 4)
    bubble = 0.0
    if parallel.pp > 1:
        stages = 1 if parallel.pp_schedule in ONE_STAGE else 2
        bubble = (parallel.pp - 1) / (stages * microbatches)
        checkpoints = config.train.activation_checkpointing != "none"
        if parallel.pp_schedule in ZERO_BUBBLE and not checkpoints:
            bubble /= 3
    return passes * (1 + bubble) + max(0.0, shared - passes / 2)


@dataclass(frozen=True)
class Candidate:
    """A way to run.

    Attributes:
        config: all options.
        microbatches: of a step on each data rank.
        seconds: of a step, estimated; roughly until it is.
        needed: bytes of the fullest GPU, by the quick sum.
        pp_rank: which pipeline rank that is.
        host: bytes of the fullest rank's host, likewise.
        estimate: of its time; None: not estimated.
        predicted: bytes that this pipeline rank needs, and of a node's host, from execution; None:
            not run.
        refused: why it cannot be; empty: it can.
    """

    config: Config
    microbatches: int
    seconds: float
    needed: int
    pp_rank: int
    host: int
    estimate: Estimate | None = None
    predicted: tuple[int, int] | None = None
    refused: str = ""

    @property
    def inexact(self) -> list[str]:
        """Modes that change numbers."""
        values = {name: option(self.config, name) for name in INEXACT}
        return [f"{name} {values[name]}" for name in INEXACT if values[name] != INEXACT[name]]

    @property
    def order(self) -> tuple[float, int, int]:
        """What candidates are sorted by: time, to the hundredth; then exact ones first; then
        memory.
        """
        return float(f"{self.seconds:.3g}"), len(self.inexact), self.needed

    @property
    def measured_as(self) -> tuple[Any, ...]:
        """What blocks depend on."""
        config = self.config
        axes = tuple(getattr(config.parallel, axis) for axis in AXES)
        return (*axes, config.train.micro_batch_size, *modes_of(config))


class Weighing:
    """Weighs the candidates of a task.

    Attributes:
        refusals: sentences of torchsft's own checks, and how often each was said.
        count: of combinations that were looked at.
    """

    def __init__(self, task: Task, references: Mapping[Any, Blocks]) -> None:
        """`references`: blocks of some layout for each of CHECKPOINTING and of PRECISIONS, by
        `modes_of`.
        """
        self.task, self.references = task, references
        self.elements = elements_of(task)
        self.whole = whole_of(task, self.elements, references)
        self.layouts = Layouts(task)
        self.refusals: Counter[str] = Counter()
        self.count = 0
        self.scaled = lru_cache(maxsize=64)(self._scaled)
        self.checkpointing = task.of_dimension(CHECKPOINTING)
        self.optimizers = task.of_dimension(OPTIMIZERS)
        self.precisions = formats_of(task)

    def candidates(self) -> Iterator[Candidate]:
        """Yield, of each layout, number format and optimizer mode, the fastest checkpointing that
        fits, where no mode before is as fast; of a layout in which nothing fits what needs least.
        """
        for layout in layouts(self.task):
            try:
                check_sizes(self.task.sizes, _world_of(layout.parallel))
                for values in self.precisions:
                    yield from self._of_layout(changed(layout, values))
            except InputError as error:
                self.refusals[str(error)] += 1

    def _of_layout(self, layout: Config) -> Iterator[Candidate]:
        task = self.task
        leanest = self._weigh(layout, self.optimizers[-1] | self.checkpointing[-1])
        offloaded = [each for each in self.optimizers if each["optim.offload"]]
        if offloaded:
            other = self._weigh(layout, offloaded[-1] | self.checkpointing[-1])
            leanest = min(leanest, other, key=lambda each: each.needed)
        if not may_fit(task.gpu, leanest):
            yield leanest
            return
        fastest = math.inf
        for optimizer, checkpointing in itertools.product(self.optimizers, self.checkpointing):
            found = self._weigh(layout, optimizer | checkpointing)
            if may_fit(task.gpu, found) and found.seconds < fastest:
                fastest = found.seconds
                yield found

    def _weigh(self, layout: Config, values: Values) -> Candidate:
        self.count += 1
        config = changed(layout, values)
        parallel, train = config.parallel, config.train
        blocks = self.scaled(
            modes_of(config),
            train.micro_batch_size,
            *(getattr(parallel, axis) for axis in AXES[1:]),
        )
        found = quick_sum(config, blocks, self.layouts.roles(config, blocks.layers))
        microbatches = microbatches_of(config)
        seconds = rough_seconds(self.task, self.whole, config, microbatches)
        return Candidate(config, microbatches, seconds, *found)

    def _scaled(self, mode: Any, micro_batch_size: int, *sizes: int) -> Blocks:
        axes = {f"parallel.{axis}": size for axis, size in zip(AXES[1:], sizes, strict=True)}
        values = {"train.micro_batch_size": micro_batch_size} | axes
        return scaled(self.references[mode], self.elements, changed(self.task.config, values))


def formats_of(task: Task) -> list[Values]:
    """Return the number formats that the GPU has.

    Raises:
        InputError: it does not have the one that is fixed.
    """
    formats = task.of_dimension(PRECISIONS)
    found = [values for values in formats if _is_possible(task, values)]
    if not found:
        check_gpu(changed(task.config, formats[0]), task.gpu)
    return found


def _is_possible(task: Task, values: Values) -> bool:
    try:
        check_gpu(changed(task.config, values), task.gpu)
    except InputError:
        return False
    return True


def modes_of(config: Config) -> tuple[Any, ...]:
    """Return which of CHECKPOINTING and of PRECISIONS a configuration has."""
    return tuple(option(config, name) for name in (*CHECKPOINTING[0], *PRECISIONS[0]))


# A quick sum may be so much too high, and its candidate is looked at more closely all the same.
TOLERANCE = 1.03


def may_fit(gpu: Gpu, candidate: Candidate) -> bool:
    """Whether the quick sums let a candidate fit."""
    on_node = candidate.host * gpu.ranks_per_node
    return max(candidate.needed / gpu.memory, on_node / gpu.host_memory) <= TOLERANCE


def _world_of(parallel: Parallel) -> Any:
    """Return what `check_sizes` asks of a world."""
    axes = ("dp_shard", "cp", "tp")
    sizes = {axis: SimpleNamespace(size=partial(getattr, parallel, axis)) for axis in axes}
    return SimpleNamespace(dense=sizes)
