"""Find the fastest ways to run a model on so many GPUs: layouts, schedules, microbatches,
activation checkpointing, optimizer modes and number formats, but for what the command line fixes.

1. Every combination that torchsft's own checks allow is weighed: a quick sum says what it needs
   (`quick_sum`: parameters by layout, activations by blocks that were measured once, scaled by
   tokens), a rough formula (`rough_seconds`) how long it takes beside others.
2. Of the first ones blocks are measured in their own layout (blocks.py), which makes the sum
   better, and the step is estimated (estimate.py), which orders them.
3. From the fastest on, the fullest pipeline rank runs for real on fake ranks
   (torchsft/planning/memory.py), until as many fit as are shown.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import operator
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch

from tools.planning.blocks import EMBEDDING, HEAD, MTP, Blocks, layer_names, measure
from tools.planning.costs import OF_ATTENTION, OF_MEMORY, PRODUCTS, Software
from tools.planning.estimate import HOST_BANDWIDTH, PCIE, Estimate, Step, estimate
from tools.planning.gpus import Gpu
from tools.planning.page import Table
from tools.planning.replay import BACKWARD, FORWARD, INPUT, WEIGHT, order
from tools.planning.report import PROCESS, check_gpu, role_of, run_of
from torchsft.cli import (
    CONFIG_FILE,
    Option,
    Values,
    flag_of,
    options_of,
    read_arguments,
    read_file,
)
from torchsft.config import Config, InputError, Parallel
from torchsft.config.optim_options import BLOCK
from torchsft.data.stream import microbatches_per_step, tokens_per_microbatch
from torchsft.models.families import family_of, read_model_config
from torchsft.models.language_model import ModelConfig, trained_mtp_layers
from torchsft.parallel.memory import FP32
from torchsft.parallel.sequence import check_sizes
from torchsft.parallel.stages import ONE_STAGE, ZERO_BUBBLE, StagePlan, plan_stages
from torchsft.parallel.tensor import style_of
from torchsft.planning.memory import RESERVE

# Each a dimension of the search: values of all its options together, from the ones that are
# preferred at equal speed to those that are not.
CHECKPOINTING: tuple[Values, ...] = (
    {"train.activation_checkpointing": "none", "train.selective_products": False},
    {"train.activation_checkpointing": "selective", "train.selective_products": True},
    {"train.activation_checkpointing": "selective", "train.selective_products": False},
    {"train.activation_checkpointing": "full", "train.selective_products": False},
)
OPTIMIZERS: tuple[Values, ...] = tuple(
    {
        "optim.offload": offload,
        "optim.moments": moments,
        "optim.masters": masters,
        "checkpoint.mode": mode,
    }
    for offload, moments, masters, mode in (
        (False, "fp32", "fp32", "async"),
        (True, "fp32", "fp32", "async"),
        (True, "fp32", "fp32", "sync"),  # hosts that have no room for the copy
        (False, "bf16", "fp32", "async"),
        (False, "int8", "fp32", "async"),
        (False, "bf16", "bf16", "async"),
        (False, "int8", "bf16", "async"),
    )
)
PRECISIONS: tuple[Values, ...] = tuple(
    {"precision.compute": compute, "precision.experts": experts}
    for compute, experts in (
        ("bf16", "same"),
        ("blockwise", "same"),
        ("float8", "same"),
    )
)
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
# What changes numbers, beside fp32 masters and moments and products in bf16.
INEXACT = {
    "optim.moments": "fp32",
    "optim.masters": "fp32",
    "precision.compute": "bf16",
    "precision.experts": "same",
}


def option(config: Config, name: str) -> Any:
    """Return the value of an option by its dotted name."""
    return operator.attrgetter(name)(config)


def changed(config: Config, values: Values) -> Config:
    """Return a configuration with other values of options.

    Raises:
        InputError: they do not go together.
    """
    sections: dict[str, Values] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    parts = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in sections.items()
    }
    return dataclasses.replace(config, **parts)


@dataclass(frozen=True)
class Task:
    """What is searched.

    Attributes:
        config: of the run, whose options in `fixed` stay; with `auto` as on GPUs.
        fixed: dotted names of options.
        model_config: config.json of the model.
        size: GPUs.
        imbalance: rows that a rank's experts receive, over the mean.
    """

    config: Config
    fixed: frozenset[str]
    model_config: Mapping[str, Any]
    size: int
    gpu: Gpu
    imbalance: float

    @cached_property
    def sizes(self) -> ModelConfig:
        """The model's configuration."""
        return read_model_config(self.model_config)

    def of_dimension(self, dimension: Sequence[Values]) -> list[Values]:
        """Return the values of a dimension that agree with what is fixed; if none does, what the
        configuration has.
        """
        agree = [
            values
            for values in dimension
            if all(option(self.config, name) == values[name] for name in self.fixed & {*values})
        ]
        return agree or [{name: option(self.config, name) for name in dimension[0]}]

    def axis(self, name: str, values: Iterable[int]) -> list[int]:
        """Return the sizes of an axis: that which is fixed, or `values`."""
        return [option(self.config, name)] if name in self.fixed else list(values)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]


def powers(most: int) -> list[int]:
    """Return powers of two up to a number, from 1."""
    return [1 << place for place in range(max(most, 1).bit_length())]


SHORTEST, LONGEST = 2048, 32768  # tokens of a microbatch on a rank, but for what rows ask for


def layouts(task: Task) -> Iterator[Config]:
    """Yield the layouts, schedules and microbatches to weigh; some of them are refused later.

    Powers of two for tp (within a node), cp and dp_replicate (of nodes), divisors for the others.
    GPipe is left out where it is not fixed: its bubble is that of 1F1B, with more in flight.
    """
    node, sizes, train = task.gpu.ranks_per_node, task.sizes, task.config.train
    experts = math.gcd(*map(sizes.routed_experts, range(sizes.num_hidden_layers)))
    names = get_args(get_type_hints(Parallel)["pp_schedule"])
    kinds = [name for name in names if name != "GPipe"]
    if "parallel.pp_schedule" in task.fixed:
        kinds = [task.config.parallel.pp_schedule]
    row = task.config.data.seq_len
    axes = itertools.product(
        task.axis("parallel.pp", divisors(task.size)),
        task.axis("parallel.dp_replicate", powers(task.size // node)),
        task.axis("parallel.cp", powers(max(row // SHORTEST, 1))),
        task.axis("parallel.tp", powers(min(node, task.size))),
    )
    for pp, replicate, cp, tp in axes:
        shard, rest = divmod(task.size, pp * replicate * cp * tp)
        if (
            rest
            or shard not in task.axis("parallel.dp_shard", [shard])
            or pp > sizes.num_hidden_layers
        ):
            continue
        of_experts = [each for each in divisors(shard * cp * tp) if experts % each == 0]
        rows = powers(train.global_batch_size // (replicate * shard))
        for ep, micro in itertools.product(
            task.axis("parallel.ep", of_experts), task.axis("train.micro_batch_size", rows)
        ):
            if micro > 1 and cp > 1:  # as many tokens as with half of both, which travel more
                continue
            tokens = micro * row // (cp * tp)
            given = "train.micro_batch_size" in task.fixed
            if not given and tokens > max(LONGEST, row // (cp * tp)):
                continue
            if (
                tokens < min(SHORTEST, row)
                and cp * tp > 1
                and not {
                    "parallel.cp",
                    "parallel.tp",
                }
                & task.fixed
            ):
                continue
            axis = dict(zip(AXES, (pp, replicate, shard, cp, tp, ep), strict=True))
            for kind in kinds if pp > 1 else kinds[:1]:
                parallel = dataclasses.replace(task.config.parallel, **axis, pp_schedule=kind)
                yield dataclasses.replace(
                    task.config,
                    parallel=parallel,
                    train=dataclasses.replace(train, micro_batch_size=micro),
                )


# ---------------------------------------------------------------- what a layout needs


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


def microbatches_of(config: Config) -> int:
    """Return the microbatches of a step on each data rank."""
    parallel, train = config.parallel, config.train
    data_size = parallel.dp_replicate * parallel.dp_shard
    return microbatches_per_step(train.global_batch_size, train.micro_batch_size, data_size)


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


# ---------------------------------------------------------------- what is weighed


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


# ---------------------------------------------------------------- the search


def reference(task: Task, modes: Values) -> Blocks:
    """Measure blocks in a small layout, to be scaled: a layer's experts over at most a node."""
    config, sizes = task.config, task.sizes
    experts = math.gcd(*map(sizes.routed_experts, range(sizes.num_hidden_layers)))
    ep = max(each for each in divisors(experts) if each <= task.gpu.ranks_per_node)
    axes = dict.fromkeys((f"parallel.{axis}" for axis in AXES), 1)
    values = {"train.micro_batch_size": 1, "train.global_batch_size": 3 * ep}
    values |= axes | {"parallel.dp_shard": ep, "parallel.ep": ep} | modes
    return _measured(dataclasses.replace(task, size=ep), changed(config, values))


def _measured(task: Task, config: Config) -> Blocks:
    return measure(
        config,
        task.model_config,
        task.size,
        imbalance=task.imbalance,
        ranks_per_node=task.gpu.ranks_per_node,
    )


def appraise(task: Task, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Measure the blocks of candidates that share them, sum anew, and estimate those that fit."""
    try:
        blocks = _measured(task, candidates[0].config)
    except InputError as error:
        return [dataclasses.replace(each, refused=str(error)) for each in candidates]
    known, found = Layouts(task), []
    for candidate in candidates:
        config = candidate.config
        needed, pp_rank, host = quick_sum(config, blocks, known.roles(config, blocks.layers))
        candidate = dataclasses.replace(candidate, needed=needed, pp_rank=pp_rank, host=host)
        if may_fit(task.gpu, candidate):
            timed = estimate(
                config,
                task.model_config,
                task.size,
                task.gpu,
                imbalance=task.imbalance,
                blocks=blocks,
                with_range=False,
            )
            timed = dataclasses.replace(timed, events=[])  # many, and not shown
            candidate = dataclasses.replace(candidate, seconds=timed.step_seconds, estimate=timed)
        found.append(candidate)
    return found


def construct(task: Task, candidate: Candidate) -> Candidate:
    """Run a step of a candidate's fullest pipeline rank on fake ranks."""
    try:
        run = run_of(candidate.config, task.model_config, task.size, task.gpu, task.imbalance)
        role = role_of(run, [candidate.pp_rank])
    except InputError as error:
        return dataclasses.replace(candidate, refused=str(error))
    on_node = sum(role.host.values()) * min(task.gpu.ranks_per_node, task.size)
    return dataclasses.replace(candidate, predicted=(role.memory.needed, on_node))


def fits(gpu: Gpu, candidate: Candidate) -> bool:
    """Whether a candidate that was constructed fits."""
    if candidate.refused or candidate.predicted is None:
        return False
    needed, on_node = candidate.predicted
    return needed <= gpu.memory and on_node <= gpu.host_memory


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        best: the fastest that fit, constructed; fastest first. If all of them change numbers, one
            more that does not.
        others: faster ones that do not fit or cannot be, and the fastest behind them.
        smallest: a candidate on the smallest number of GPUs that fits, and that number; None: none
            does.
        weighed: combinations that were looked at.
        refusals: what torchsft's own checks said, and how often.
        deviation: of the quick sum from execution, the least and the most share.
        seconds: that the search took.
    """

    task: Task
    best: list[Candidate]
    others: list[Candidate]
    smallest: tuple[int, Candidate] | None
    weighed: int
    refusals: Counter[str]
    deviation: tuple[float, float]
    seconds: float


NEAR = 1.3  # times a GPU's memory: what needs more is not listed among what does not fit
MEASURED, TOGETHER = 64, 16  # layouts whose blocks are measured, and those of a round
EACH = 6  # candidates of each that are estimated
SHOWN = 10


def search(task: Task, say: Callable[[str], None]) -> Found:
    """Search, in two processes.

    Raises:
        InputError: nothing can be at all.
    """
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        kinds = itertools.product(task.of_dimension(CHECKPOINTING), formats_of(task))
        modes = [checkpointing | values for checkpointing, values in kinds]
        measured = pool.map(partial(reference, task), modes)
        references = dict(zip((tuple(each.values()) for each in modes), measured, strict=True))
        weighing = Weighing(task, references)
        candidates = sorted(weighing.candidates(), key=lambda each: each.order)
        if not candidates:
            sentence, _ = max(weighing.refusals.items(), key=lambda each: each[1])
            raise InputError(f"no layout of {task.size} GPUs can be; mostly: {sentence}")
        say(f"{weighing.count} combinations weighed in {time.perf_counter() - began:.0f} s")
        appraised = appraise_first(weighing, candidates, pool)
        say(f"{len(appraised)} estimated")
        unfit = [each for each in appraised if each.estimate is None]
        ready = sorted((each for each in appraised if each.estimate), key=lambda each: each.order)
        best, tried = [], []
        while ready and len(best) < SHOWN:
            some = ready[: SHOWN - len(best)]
            ready = ready[len(some) :]
            tried += pool.map(partial(construct, task), some)
            best = [each for each in tried if fits(task.gpu, each)]
        exact = next((each for each in ready if not each.inexact), None)
        if exact and all(each.inexact for each in best):
            tried.append(construct(task, exact))
            best += [each for each in tried[-1:] if fits(task.gpu, each)]
        say(f"{len(tried)} constructed, of which {len(best)} fit")
        smallest = smallest_number(task, references, pool, say)
    near = NEAR * task.gpu.memory
    slow = [e for e in candidates if not may_fit(task.gpu, e) and e.needed <= near]
    others = [each for each in tried if each not in best] + unfit + slow
    shares = [each.needed / each.predicted[0] - 1 for each in tried if each.predicted] or [0.0]
    return Found(
        task,
        sorted(best, key=lambda each: each.order),
        sorted(others, key=lambda each: each.order)[:SHOWN],
        smallest,
        weighing.count,
        weighing.refusals,
        (min(shares), max(shares)),
        time.perf_counter() - began,
    )


def appraise_first(
    weighing: Weighing, candidates: Sequence[Candidate], pool: ProcessPoolExecutor
) -> list[Candidate]:
    """Appraise the fastest of those that may fit, half of which change no numbers, in rounds: what
    the rough time was wrong by for one kind of layout corrects it for others of that kind. Kinds
    that were not tried are taken for as good as the best one.
    """
    groups: dict[Any, list[Candidate]] = {}
    for each in candidates:
        if may_fit(weighing.task.gpu, each):
            groups.setdefault(each.measured_as, []).append(each)
    waiting = [group[:EACH] for group in groups.values()]
    wrong: dict[Any, float] = {}
    found: list[Candidate] = []
    for _ in range(MEASURED // TOGETHER):
        least = min(wrong.values(), default=1.0)
        waiting.sort(key=lambda group: group[0].seconds * wrong.get(kind_of(group[0]), least))
        kinds: Counter[Any] = Counter()
        some = []
        for group in waiting:
            kind, exact = kind_of(group[0]), not group[0].inexact
            if kinds[kind] < TOGETHER // 4 and kinds[exact] < TOGETHER // 2:
                kinds.update((kind, exact))
                some.append(group)
        waiting = [group for group in waiting if group not in some]
        task = weighing.task
        for group, after in zip(some, pool.map(partial(appraise, task), some), strict=True):
            found += after
            for rough, timed in zip(group, after, strict=True):
                if timed.estimate:
                    wrong[kind_of(rough)] = timed.seconds / rough.seconds
    return found


def kind_of(candidate: Candidate) -> tuple[Any, ...]:
    """Return what the rough time is wrong by alike for."""
    config = candidate.config
    parallel = config.parallel
    pipeline, micro = parallel.pp > 1, config.train.micro_batch_size
    formats = config.precision.compute, config.optim.offload
    return pipeline, micro, parallel.cp, parallel.tp, *formats


def smallest_number(
    task: Task, references: Mapping[Any, Blocks], pool: ProcessPoolExecutor, say: Callable
) -> tuple[int, Candidate] | None:
    """Return the smallest number of GPUs on which something fits that changes no numbers, and the
    candidate; of powers of two and three times these, up to the task's.
    """
    exact = [
        values
        for values in OPTIMIZERS
        if values["optim.moments"] == values["optim.masters"] == "fp32"
    ]
    for size in sorted({*powers(task.size), *(3 * each for each in powers(task.size // 3))}):
        fewer = dataclasses.replace(task, size=size)
        weighing = Weighing(fewer, references)
        exact = {"optim.moments": "fp32", "optim.masters": "fp32"}.items()
        modes = [each for each in weighing.optimizers if exact <= each.items()]
        weighing.optimizers = modes or weighing.optimizers
        weighing.precisions = weighing.precisions[:1]
        found = [each for each in weighing.candidates() if may_fit(task.gpu, each)]
        lean = sorted(found, key=lambda each: each.needed)[:2]
        for candidate in pool.map(partial(construct, fewer), lean):
            if fits(task.gpu, candidate):
                return size, candidate
    return None


# ---------------------------------------------------------------- what is asked, and said


def fixed_by(
    argv: Sequence[str], presets: Mapping[str, Callable[[], Config]], kind: type[Config]
) -> frozenset[str]:
    """Return the options that a command line gives, itself or in its file.

    Args:
        argv: behind the recipe.
        presets: of the recipe.
        kind: dataclass of the options that the command line may have.
    """
    options = options_of(kind)
    named = bool(argv) and argv[0] in presets
    given, _ = read_arguments(argv[1:] if named else argv, options)
    file = given.pop(CONFIG_FILE.name, None)
    return frozenset(given) | frozenset(read_file(file, options) if file else ())


def command_of(task: Task, candidate: Candidate, recipe: str, preset: str) -> str:
    """Return the command line of a run: what the candidate has decided, and what was given."""
    node = task.gpu.ranks_per_node
    nodes, each = max(1, task.size // node), min(node, task.size)
    words = ["torchrun", f"--nnodes {nodes}", f"--nproc-per-node {each}", recipe, preset]
    decided = [f"parallel.{axis}" for axis in AXES]
    decided += ["parallel.pp_schedule"] * (candidate.config.parallel.pp > 1)
    decided += ["train.micro_batch_size", "train.global_batch_size", *CHECKPOINTING[0]]
    decided += [*OPTIMIZERS[0], *PRECISIONS[0]]
    for name, setting in options_of(Config).items():
        value = option(candidate.config, name)
        always = name in task.fixed or name == "train.global_batch_size"
        if always or (name in decided and value != option(task.config, name)):
            words.append(written(setting, value))
    if "model.path" not in task.fixed:
        words.append("--model.path HF_DIR")
    if "data.train" not in task.fixed:
        words.append("--data.train FILE")
    return " ".join(words)


def written(setting: Option, value: Any) -> str:
    """Return an option as the command line has it."""
    if setting.kind is bool:
        return setting.flag if value else flag_of(setting.negation)
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([setting.flag, *(shlex.quote(str(each)) for each in values)])


def row_of(task: Task, candidate: Candidate) -> tuple[str, ...]:
    """Return a candidate in words: step, tokens/s, memory, layout and modes."""
    config, gpu = candidate.config, task.gpu
    parallel, train = config.parallel, config.train
    sizes = [f"{axis} {getattr(parallel, axis)}" for axis in AXES if getattr(parallel, axis) > 1]
    layout = " x ".join(sizes) or "one rank"
    layout += f", {parallel.pp_schedule}" if parallel.pp > 1 else ""
    modes = [f"{train.micro_batch_size} row(s)", f"checkpointing {train.activation_checkpointing}"]
    modes += ["products kept"] * train.selective_products
    modes += ["optimizer on the host"] * config.optim.offload
    speed = train.global_batch_size * config.data.seq_len / candidate.seconds / task.size
    needed, on_node = candidate.predicted or (
        candidate.needed,
        candidate.host * gpu.ranks_per_node,
    )
    verdict = candidate.refused
    if needed > gpu.memory:
        verdict = f"{(needed - gpu.memory) / 1e9:.1f} GB too many on a GPU"
    elif on_node > gpu.host_memory:
        verdict = f"{(on_node - gpu.host_memory) / 1e9:.0f} GB too many on a node's host"
    return (
        f"{candidate.seconds:.2f} s" + ("" if candidate.estimate else " (roughly)"),
        f"{speed:,.0f}",
        f"{needed / 1e9:.1f}" + ("" if candidate.predicted else " (sum)"),
        f"{layout}; {', '.join(modes)}",
        ", ".join(candidate.inexact) or "exact",
        verdict or "fits",
    )


HEADINGS = ("step", "tokens/s/GPU", "GB", "layout and modes", "changes numbers", "")


def lines_of(found: Found, recipe: str, preset: str) -> list[str]:
    """Return what was found as text."""
    task = found.task
    lines = [f"Fastest on {task.size} {task.gpu.name} ({task.gpu.memory / 1e9:.1f} GB):"]
    for place, each in enumerate(found.best, start=1):
        lines.append(f"{place:>2}. " + "  ".join(row_of(task, each)[:-1]))
        lines.append("    " + command_of(task, each, recipe, preset))
    if not found.best:
        lines.append("nothing fits")
    lines.append("Would be as fast, but:")
    lines += ["    " + "  ".join(row_of(task, each)) for each in found.others]
    lines += [f"    {count} x {text}" for text, count in found.refusals.most_common(3)]
    smallest = "no number up to this one fits without changing numbers"
    if found.smallest:
        size, each = found.smallest
        layout = row_of(dataclasses.replace(task, size=size), each)[3]
        smallest = f"{size} GPUs ({layout}) are the fewest that fit without changing numbers"
    low, high = found.deviation
    lines.append(smallest + "; powers of two, and three times these, were looked at")
    lines.append(
        f"{found.weighed:,} combinations; of those constructed the quick sum was "
        f"{low:+.0%} to {high:+.0%} from execution; {found.seconds:.0f} s"
    )
    return lines


def table_of(found: Found, recipe: str, preset: str) -> Table:
    """Return what was found as a table of the page."""
    rows = [
        (*row_of(found.task, each), command_of(found.task, each, recipe, preset))
        for each in (*found.best, *found.others)
    ]
    note = "Those that fit were constructed on fake ranks; of others the sum of a formula is shown."
    return Table("Search", (*HEADINGS, "command"), rows, note, commands=True)


def to_json(found: Found, recipe: str, preset: str) -> dict[str, Any]:
    """Return what was found as JSON."""
    task = found.task

    def of(each: Candidate) -> dict[str, Any]:
        words = dict(zip(HEADINGS[:-1], row_of(task, each), strict=False))
        words |= {"why not": row_of(task, each)[-1]}
        return words | {"command": command_of(task, each, recipe, preset)}

    return {
        "fit": [of(each) for each in found.best],
        "others": [of(each) for each in found.others],
        "smallest": found.smallest and found.smallest[0],
        "refusals": dict(found.refusals.most_common()),
        "deviation of the quick sum": found.deviation,
    }
