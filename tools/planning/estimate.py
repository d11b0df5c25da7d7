"""How long a step of a run takes, and what that costs: seconds of every block (blocks.py,
costs.py), the schedule replayed (replay.py), and the update.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.planning import costs
from tools.planning.blocks import measure
from tools.planning.costs import Parts, Software
from tools.planning.gpus import Gpu
from tools.planning.operations import BACKWARD, FORWARD, ONCE, RECOMPUTED, Block, Blocks
from tools.planning.replay import (
    EXPOSED,
    OPTIMIZER,
    WAIT,
    Event,
    StageCost,
    bubble,
    order,
    replay,
    seconds_by_kind,
)
from torchsft.config import Config, Optim
from torchsft.data.stream import microbatches_of
from torchsft.metrics.throughput import mfu
from torchsft.models.families import read_model_config
from torchsft.models.language_model import trained_mtp_layers
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.world import mesh_sizes
from torchsft.planning.memory import DOCUMENT, IMBALANCE, on_gpus

# Bytes per second of a GPU's share of its host's memory and of its PCIe link; assumed.
HOST_BANDWIDTH, PCIE = 40e9, 45e9
# What a slow and a fast machine make of the shares of peaks, and of links.
UNCERTAIN = {"kernels": 0.25, "links": 0.3}
LINKS = ("node", "network", "exchange", "deepep")


@dataclass(frozen=True)
class Text:
    """What is trained on.

    Attributes:
        documents: tokens of each document of some microbatches.
        filled: share of rows that is no padding.
        steps: of the run; None: nothing says how many.
        source: where this is from.
    """

    documents: Sequence[float]
    filled: float
    steps: int | None
    source: str


@dataclass(frozen=True)
class Estimate:
    """Of a run.

    Attributes:
        step_seconds: of one step.
        low, high: of the same, with the reason among `assumptions`.
        bubble: share of all ranks' time in which pipeline ranks wait for each other.
        tokens_per_second_per_gpu: padding not counted.
        mfu: as a run's metrics have it (metrics/throughput.py), of bf16's peak.
        gpu_hours: of the whole run; None: neither --train.steps nor data say how long it is.
        money: USD, likewise.
        parts: seconds of a step, by what they are spent on; of all pipeline ranks the mean.
        events: of each pipeline rank.
        assumptions: in words.
        software: that was assumed.
    """

    step_seconds: float
    low: float
    high: float
    bubble: float
    tokens_per_second_per_gpu: float
    mfu: float
    gpu_hours: float | None
    money: float | None
    parts: Mapping[str, float]
    events: list[Event]
    assumptions: list[str]
    software: Software = dataclasses.field(default_factory=Software)


def estimate(
    config: Config,
    model_config: Mapping[str, Any],
    size: int,
    gpu: Gpu,
    *,
    imbalance: float = IMBALANCE,
    software: Software | None = None,
    text: Text | None = None,
    blocks: Blocks | None = None,
    with_range: bool = True,
) -> Estimate:
    """Estimate a run.

    Args:
        config: of the run.
        model_config: config.json of the model.
        size: ranks.
        gpu: that each rank has.
        imbalance: rows that the busiest rank's experts receive in each layer, over the mean; all
            ranks of an exchange wait for it.
        software: what runs.
        text: what is trained on; None: documents of `DOCUMENT` tokens, as `assumed_text` says.
        blocks: of this run, measured before; None: they are measured.
        with_range: whether `low` and `high` are estimated too.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    config, software = on_gpus(config), software or Software()
    if config.model.compile:
        software = dataclasses.replace(software, compiled=True)
    sizes = mesh_sizes(config.parallel, size)["dense"]
    parallel = dataclasses.replace(config.parallel, dp_shard=sizes["dp_shard"])
    config = dataclasses.replace(config, parallel=parallel)
    text = text or assumed_text(config)
    imbalance = 1.0 if software.forced_balance else imbalance
    options = {
        "documents": text.documents,
        "ranks_per_node": gpu.ranks_per_node,
        "fa3": software.fa3,
        "balanced": software.forced_balance,
    }
    blocks = blocks or measure(config, model_config, size, imbalance=imbalance, **options)
    step = Step(config, model_config, size, gpu, software, blocks)
    found = step.replayed()
    seconds = max(event.end for event in found)
    low = high = seconds
    if with_range:
        even = blocks
        if imbalance > 1:
            even = measure(config, model_config, size, imbalance=1.0, **options)
        low, high = (
            max(
                event.end
                for event in dataclasses.replace(step, gpu=_like(gpu, sign), blocks=each).replayed()
            )
            for sign, each in ((1, even), (-1, blocks))
        )
    rows = config.train.global_batch_size
    tokens = rows * config.data.seq_len * text.filled
    flops = read_model_config(model_config).flops(list(text.documents))
    flops *= tokens / sum(text.documents) / size
    hours = None if text.steps is None else text.steps * seconds * size / 3600
    return Estimate(
        seconds,
        low,
        high,
        bubble(found),
        tokens / seconds / size,
        mfu(flops, seconds, gpu.peak_flops["bf16"] / 1e12),
        hours,
        None if hours is None else hours * gpu.price,
        step.parts(found),
        found,
        step.assumptions(imbalance, text),
        software,
    )


def of_run(
    config: Config,
    model_config: Mapping[str, Any],
    size: int,
    gpu: Gpu,
    imbalance: float,
    software: Software,
) -> Estimate:
    """Estimate a run, with its own data where there are some.

    Raises:
        InputError: options, model, ranks and data do not fit together.
    """
    text = None
    if config.data.train and config.model.path and not config.data.streaming:
        text = read_text(config, model_config, size)
    elif config.data.train:
        text = assumed_text(config)
        why = "streamed" if config.data.streaming else "without the tokenizer of --model.path"
        text = dataclasses.replace(text, source=f"{text.source}; --data.train was not read ({why})")
    options = {"imbalance": imbalance, "software": software, "text": text}
    return estimate(config, model_config, size, gpu, **options)


def assumed_text(config: Config) -> Text:
    """Return what is assumed of data that is not there."""
    length = min(DOCUMENT, config.data.seq_len)
    documents = [length] * max(1, config.data.seq_len // length)
    return Text(documents, 1.0, config.train.steps, f"assumed: documents of {length} tokens")


def read_text(config: Config, model_config: Mapping[str, Any], size: int) -> Text:
    """Return what --data.train gives with the tokenizer of --model.path, packed as training does
    it: of the first steps of one data rank.

    Raises:
        InputError: a source, row or template cannot be used.
    """
    from torchsft.data.run_data import DataRank, load_run_data

    sizes = read_model_config(model_config)
    dense = mesh_sizes(config.parallel, size)["dense"]
    train = config.train
    data = load_run_data(
        config,
        Path(config.model.path),
        DataRank(0, dense["dp_replicate"] * dense["dp_shard"]),
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_position_embeddings,
        attention_cost=sizes.flops,
        progress=False,
        message=lambda _: None,
    )
    documents, rows = [], 0
    for _ in range(min(data.total_steps, 8)):
        for batch in next(data.loader).microbatches:
            lengths = batch.cu_seqlens.diff().tolist()
            documents += [length for length in lengths if length]
            rows += train.micro_batch_size
    filled = sum(documents) / (rows * config.data.seq_len)
    source = f"{len(documents)} documents of {rows} rows of {', '.join(config.data.train)}"
    return Text(documents, filled, data.total_steps, source)


def _like(gpu: Gpu, sign: int) -> Gpu:
    """Return a GPU that reaches more (1) or less (-1) of its peaks than assumed."""
    efficiency = {}
    for name, share in gpu.efficiency.items():
        much = UNCERTAIN["links" if name in LINKS else "kernels"]
        efficiency[name] = min(share * (1 + much) ** sign, 1.0)
    return dataclasses.replace(gpu, efficiency=efficiency)


@dataclass(frozen=True)
class Step:
    """A step of a run; of `config` dp_shard is resolved."""

    config: Config
    model_config: Mapping[str, Any]
    size: int
    gpu: Gpu
    software: Software
    blocks: Blocks

    @property
    def microbatches(self) -> int:
        """Of each data rank."""
        return microbatches_of(self.config)

    def stages(self) -> tuple[list[list[Block]], tuple[int, ...]]:
        """Return the blocks of each stage, and the pipeline rank of each."""
        sizes = read_model_config(self.model_config)
        mtp_layers = trained_mtp_layers(self.config.model.mtp, sizes)
        plan = plan_stages(self.config.parallel, sizes, self.microbatches, mtp_layers)
        parts = [plan.part([stage]) for stage in range(len(plan.layers))]
        return [self.blocks.of_stage(**part) for part in parts], plan.ranks

    def passes(self, block: Block) -> tuple[Parts, Parts]:
        """Return the seconds of a block's forward and backward pass."""
        of = block.operations
        again = Counter(of.get(BACKWARD, Counter()))
        again.update(of.get(RECOMPUTED, Counter()))
        return (
            costs.seconds_of(of.get(FORWARD, Counter()), self.gpu, self.software, False),
            costs.seconds_of(again, self.gpu, self.software, True),
        )

    def stage_cost(self, blocks: Sequence[Block]) -> StageCost:
        """Return the seconds of a stage."""
        forward = backward = weights = gather = reduce = 0.0
        recomputes = any(block.operations.get(RECOMPUTED) for block in blocks)
        for block in blocks:
            both = self.passes(block)
            forward += both[0].total()
            backward += both[1].total()
            operations = block.operations.get(BACKWARD, Counter())
            weights += costs.weight_seconds(operations, self.gpu, self.software)
            once = block.operations.get(ONCE, Counter())
            first, last = costs.once_seconds(once, self.gpu, self.software)
            gather += first
            reduce += last
        # torch's weight pass would compute checkpointed layers again for each of their parameters:
        # torchsft does the whole backward pass at once there
        return StageCost(forward, backward, 0.0 if recomputes else weights, gather, reduce)

    def replayed(self) -> list[Event]:
        """Return the events of a step."""
        parallel = self.config.parallel
        stages, ranks = self.stages()
        known: dict[tuple[str, ...], StageCost] = {}
        found = []
        for blocks in stages:
            key = tuple(block.name for block in blocks)
            if key not in known:
                known[key] = self.stage_cost(blocks)
            found.append(known[key])
        if parallel.pp == 1:  # microbatches gather and sum by themselves; the last one adds to that
            (cost,) = found
            found = [dataclasses.replace(cost, gather=0.0)]
        actions = order(parallel.pp_schedule, parallel.pp, len(stages), self.microbatches)
        parameters = [
            sum(
                block.trained
                for blocks, at in zip(stages, ranks, strict=True)
                if at == rank
                for block in blocks
            )
            for rank in range(parallel.pp)
        ]
        events = replay(actions, found, self.transfer(), self.update(max(parameters)))
        return events

    def transfer(self) -> float:
        """Return the seconds that hidden states need to the next stage's rank."""
        size, gpu = self.blocks.hidden, self.gpu
        where = "node" if self.size <= gpu.ranks_per_node else "network"
        speed = getattr(gpu, f"{where}_bandwidth") * gpu.efficiency[where]
        return size / speed + gpu.latency_seconds[where]

    def update(self, parameters: int) -> float:
        """Return the seconds from the last gradient to the next step: norm, clipping, optimizer.

        On the host it runs beside the next forward pass; what is waited for is the copy of the
        gradients, and what of the update is longer than that pass.
        """
        optim, gpu = self.config.optim, self.gpu
        latency = gpu.latency_seconds["network" if self.size > gpu.ranks_per_node else "node"]
        norm = 2 * latency * math.log2(max(self.size, 2))
        size = parameters * update_bytes(optim)
        if optim.offload:
            forward = self.microbatches * sum(
                self.passes(block)[0].total() for block in self.stages()[0][0]
            )
            copy = parameters * 4 / PCIE
            on_host = (size + 8 * parameters) / HOST_BANDWIDTH + parameters * 2 / PCIE
            return norm + copy + max(0.0, on_host - forward)
        return norm + size / (gpu.memory_bandwidth * gpu.efficiency["memory"])

    def parts(self, events: Sequence[Event]) -> dict[str, float]:
        """Return the seconds of a step by what they are spent on, of all pipeline ranks the
        mean.
        """
        pp, total = self.config.parallel.pp, Counter()
        for blocks in self.stages()[0]:
            for block in blocks:
                for parts in self.passes(block):
                    for name, seconds in parts.items():
                        total[name] += seconds * self.microbatches / pp
        kinds = seconds_by_kind(events)
        total["waiting for other pipeline ranks"] = kinds.get(WAIT, 0.0) / pp
        total["exposed gathers and sums of gradients"] = kinds.get(EXPOSED, 0.0) / pp
        total["update"] = kinds.get(OPTIMIZER, 0.0) / pp
        return dict(total)

    def assumptions(self, imbalance: float, text: Text) -> list[str]:
        """Return what the estimate takes for granted."""
        gpu, software, parallel = self.gpu, self.software, self.config.parallel
        measured = f"{len(gpu.products)} products measured" if gpu.products else "none measured"
        shares = ", ".join(f"{name} {share:.2f}" for name, share in gpu.efficiency.items())
        found = [
            f"lengths of documents: {text.source}",
            f"in every layer all ranks wait for one that receives {imbalance:g} x the mean rows",
            f"shares of peaks on {gpu.name} ({measured}): {shares}",
            f"a kernel's gap {costs.KERNEL * 1e6:g} us, its launch on the host "
            f"{costs.LAUNCH * 1e6:g} us, {costs.REFILL * 1e6:g} us idle behind each wait of the "
            "host",
            "the exchange of rows is hidden by shared experts, and in backward passes by what is "
            "computed again; everything else of it is waited for",
            "FSDP2's gathers and sums run beside kernels, and not beside other collectives",
        ]
        if parallel.pp > 1:
            found.append("hidden states travel between stages beside what is computed")
            found.append("a stage's parameters are gathered once a step, and gradients summed once")
        if parallel.cp * parallel.tp > 1:
            found.append("collectives of tp and cp are waited for")
        if self.config.optim.offload:
            found.append(
                f"the host updates at {HOST_BANDWIDTH / 1e9:g} GB/s a GPU, beside the next forward "
                f"pass, and copies at {PCIE / 1e9:g} GB/s"
            )
        given = [name for name in costs.OPTIONS if getattr(software, name.replace("-", "_"))]
        found += [f"{name}; without it {costs.OPTIONS[name]}" for name in given]
        found.append(
            f"range: shares of kernels {UNCERTAIN['kernels']:.0%} and of links "
            f"{UNCERTAIN['links']:.0%} better or worse, as nothing of this ran on a GPU yet; at "
            "best experts are even"
        )
        return found


def update_bytes(optim: Optim) -> float:
    """Return the bytes of a parameter that norm and update read and write: the gradient three times
    (norm, clipping there and back), then gradient, master and moments, of which the last two are
    written too.
    """
    master = {"fp32": 4, "bf16": 2}[optim.masters]
    moments = 2 * {"fp32": 4, "bf16": 2, "int8": 1.03}[optim.moments]
    return 4 * master + 2 * (master + moments)


def lines_of(found: Estimate, gpu: Gpu, fits: bool = True) -> list[str]:
    """Return an estimate as text."""
    step, low, high = (
        f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.3g}"
        for seconds in (found.step_seconds, found.low, found.high)
    )
    lines = [
        "",
        f"Time of a step{', if it fitted' * (not fits)}: {step} s ({low} to {high}); "
        f"{found.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, MFU {found.mfu:.1%}",
    ]
    for name, seconds in sorted(found.parts.items(), key=lambda part: -part[1]):
        share = seconds / found.step_seconds
        if share >= 0.001:
            lines.append(f"  {name:40} {seconds:8.2f} s {share:6.1%}")
    price = f"at {gpu.price:g} USD a GPU-hour ({gpu.source('price')})"
    if found.gpu_hours is None:
        hours = 1e9 / found.tokens_per_second_per_gpu / 3600
        lines.append(
            f"10^9 tokens: {hours:,.0f} GPU-hours, {hours * gpu.price:,.0f} USD {price}; give "
            "--train.steps, or --data.train and --model.path, for those of the run"
        )
    else:
        lines.append(f"the run: {found.gpu_hours:,.1f} GPU-hours, {found.money:,.0f} USD {price}")
    return [*lines, "Assumed:", *(f"  {text}" for text in found.assumptions)]


def to_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON-able nested dictionaries, without events; of seconds and USD."""
    fields = dataclasses.asdict(dataclasses.replace(found, events=[]))
    del fields["events"]
    return fields
