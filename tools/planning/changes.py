"""What to change so that a run fits: real changes of options, each tried by prediction, those first
that cost least speed.

How much speed a change costs is assumed here, as a share of a step's time; bubbles are computed.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.planning.report import Plan, Run, make_plan, run_of
from torchsft.cli import build, flag_of, options_of
from torchsft.config import Config, InputError
from torchsft.parallel.stages import ONE_STAGE
from torchsft.planning import simulation

SECONDS = 150  # of a core that trying may take
MOST_TOGETHER = 3  # changes
# A change saves about as much beside others as alone, at most this much more.
MARGIN = 1.05
# What each further change must gain of speed to be worth its complication.
SIMPLICITY = 0.03


@dataclass(frozen=True)
class Change:
    """A change of options.

    Attributes:
        options: by their names; `world_size` too.
        loss: expected share of a step's time that it costs.
        remark: what it changes besides.
        saves: shares of what is held, by purpose (simulation.py), that it can save; None: of any.
        on_host: whether it saves memory of the host.
    """

    options: Mapping[str, Any]
    loss: float
    remark: str = ""
    saves: Mapping[str, float] | None = None
    on_host: bool = False


@dataclass(frozen=True)
class Remedy:
    """Changes that together make a run fit.

    Attributes:
        options: to paste.
        loss: expected share of a step's time.
        remarks: what they change besides.
        plan: of the run with them.
    """

    options: str
    loss: float
    remarks: str
    plan: Plan


ACTIVATIONS = {simulation.IN_FLIGHT: 1, simulation.LAYER: 1, simulation.EXCHANGE: 1}


def candidates(run: Run) -> Iterator[Change]:
    """Yield changes that may help, whether they are possible or not."""
    yield from _of_numbers(run)
    yield from _of_activations(run)
    yield from _of_layout(run)


def _of_numbers(run: Run) -> Iterator[Change]:
    """Yield those of what the optimizer keeps and the loss computes at one time."""
    config, optim = run.config, run.config.optim
    rounds = "rounds at random: learning curves in tools/benchmarks.md"
    if optim.kind == "adamw" and not optim.offload:
        order = ("fp32", "bf16", "int8")
        for moments, share in (("bf16", 0.5), ("int8", 0.75)):
            if order.index(moments) > order.index(optim.moments):
                saves, loss = {simulation.MOMENTS: share}, 0.005 * (moments == "int8")
                yield Change({"optim.moments": moments}, loss, rounds, saves)
        if optim.masters == "fp32":
            halves = dict.fromkeys((simulation.PARAMETERS, simulation.GRADIENTS), 0.5)
            halves[simulation.GATHERED] = 1
            yield Change({"optim.masters": "bf16"}, 0.0, rounds, halves)
    if optim.kind == "adamw" and (optim.moments, optim.masters) == ("fp32", "fp32"):
        all_of_it = dict.fromkeys((simulation.MOMENTS, simulation.GRADIENTS), 1)
        all_of_it[simulation.PARAMETERS] = 0.5
        if not optim.offload:
            yield Change({"optim.offload": True}, 0.2, "needs memory of hosts", all_of_it)
    vocabulary = run.model_config.get("vocab_size", 2**17)
    chunk = config.model.loss_chunk or max(2**26 // vocabulary, 1)
    if chunk >= 128:
        yield Change({"model.loss_chunk": chunk // 2}, 0.005, "", {simulation.LOSS: 1})
    if config.checkpoint.mode == "async":
        remark = "training waits while checkpoints are written"
        yield Change({"checkpoint.mode": "sync"}, 0.01, remark, {}, on_host=True)


def _of_activations(run: Run) -> Iterator[Change]:
    """Yield those of what is kept for the backward pass."""
    train = run.config.train
    mode, name = train.activation_checkpointing, "train.activation_checkpointing"
    losses = {"none": 0.0, "selective": 0.2, "full": 0.25, "stream": 0.35}
    reset = {"train.activation_checkpointing_every": 1, "train.selective_products": False}
    for other in list(losses)[list(losses).index(mode) + 1 :]:
        loss = losses[other] - losses[mode]
        yield Change({name: other, **reset}, loss, "", ACTIVATIONS)
        if mode == "none" and other != "stream":
            half = {**reset, "train.activation_checkpointing_every": 2}
            yield Change({name: other, **half}, loss / 2, "", ACTIVATIONS)
    if mode != "none" and train.activation_checkpointing_every > 1:
        yield Change({"train.activation_checkpointing_every": 1}, 0.1, "", ACTIVATIONS)
    if train.selective_products:
        yield Change({"train.selective_products": False}, 0.03, "", ACTIVATIONS)
    if mode != "none" and not train.activation_offload:
        remark = "needs memory of hosts"
        yield Change({"train.activation_offload": True}, 0.05, remark, {simulation.IN_FLIGHT: 1})
    if train.micro_batch_size > 1:
        yield Change({"train.micro_batch_size": train.micro_batch_size // 2}, 0.05)


def _of_layout(run: Run) -> Iterator[Change]:
    """Yield other layouts of the same ranks, and twice as many."""
    parallel = run.config.parallel
    if parallel.pp > 1 and parallel.pp_schedule not in ONE_STAGE:
        options = {"parallel.pp_schedule": "1F1B", "parallel.pp_layers": ()}
        yield Change(options, _more_bubble(run, parallel.pp, "1F1B"))
    if run.model_config.keys() & {"n_routed_experts", "num_experts", "num_local_experts"}:
        for ep in (2 * parallel.ep, parallel.ep // 2):
            yield Change({"parallel.ep": ep}, 0.03)
    for pp in (2 * parallel.pp, parallel.pp // 2):
        shard = parallel.dp_shard * parallel.pp // max(pp, 1)
        options = {"parallel.pp": pp, "parallel.dp_shard": shard, "parallel.pp_layers": ()}
        schedule = parallel.pp_schedule
        yield Change(options, max(0.01, _more_bubble(run, pp, schedule)))
    for axis, loss in (("cp", 0.08), ("tp", 0.15)):
        options = {f"parallel.{axis}": 2 * getattr(parallel, axis)}
        yield Change({**options, "parallel.dp_shard": parallel.dp_shard // 2}, loss)
    options = {"world_size": 2 * run.size, "parallel.dp_shard": 2 * parallel.dp_shard}
    yield Change(options, 1.0, "twice as many GPUs")


def _more_bubble(run: Run, pp: int, schedule: str) -> float:
    """Return which share of a step's time another pipeline waits more."""

    def share(pp: int, schedule: str, microbatches: float) -> float:
        rounds = microbatches * (1 if schedule in ONE_STAGE else 2)
        return (pp - 1) / (rounds + pp - 1)

    parallel = run.config.parallel
    before = share(parallel.pp, parallel.pp_schedule, run.microbatches)
    return share(pp, schedule, run.microbatches * pp / parallel.pp) - before


def changed(run: Run, changes: Sequence[Change]) -> Run:
    """Return the run with other options.

    Raises:
        InputError: they do not fit together.
    """
    options = _merged(changes)
    size = options.pop("world_size", run.size)
    values = {name: operator.attrgetter(name)(run.config) for name in options_of(Config)}
    config = build(Config, values | options)
    return run_of(config, run.model_config, size, run.gpu, run.imbalance)


def _merged(changes: Sequence[Change]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.options.items()}


def _written(run: Run, changes: Sequence[Change]) -> str:
    """Return options as they are typed, without those that are so already."""
    words = []
    for name, value in _merged(changes).items():
        if name != "world_size" and operator.attrgetter(name)(run.config) == value:
            continue
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"{flag_of(name)} {shown}".rstrip())
    return " ".join(words)


class Search:
    """Tries changes alone, then together where what they saved alone is enough, by rising loss of
    speed.

    Args:
        plan: of a run that does not fit.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, plan.run
        self.changes = [each for each in candidates(plan.run) if self.can_help(each)]
        self.saved: dict[int, float] = {}  # number of a change -> bytes that it saves alone

    def can_help(self, change: Change) -> bool:
        """Whether a change is of what is lacking, and of what is held at all."""
        if self.plan.lacking <= 0 or change.on_host:
            return self.plan.lacking_on_host > 0 and (change.on_host or change.saves is None)
        held = self.plan.fullest.memory.held
        return change.saves is None or any(held.get(purpose) for purpose in change.saves)

    def cheapest(self, count: int) -> list[Remedy]:
        """Return the changes that cost least, as far as they are found in SECONDS."""
        until, found = time.process_time() + SECONDS, {}
        for numbers in self.by_loss():
            if len(found) == count or time.process_time() > until:
                break
            if any(each <= set(numbers) for each in found) or not self.may_be_enough(numbers):
                continue
            plan = self.try_out(numbers)
            if plan is not None and plan.fits:
                found[frozenset(numbers)] = self.remedy(numbers, plan)
        return list(found.values())

    def by_loss(self) -> list[tuple[int, ...]]:
        """Return the numbers of changes that go together, none before its parts."""
        numbers = range(len(self.changes))
        sets = [
            together
            for count in range(1, MOST_TOGETHER + 1)
            for together in itertools.combinations(numbers, count)
            if self.go_together(together)
        ]
        return sorted(sets, key=lambda together: self.loss(together) + SIMPLICITY * len(together))

    def may_be_enough(self, numbers: Sequence[int]) -> bool:
        """Whether several changes may save enough, by what each has saved alone."""
        if len(numbers) == 1:
            return True
        if any(number not in self.saved for number in numbers):
            return False
        return MARGIN * sum(self.saved[number] for number in numbers) >= self.plan.lacking

    def go_together(self, numbers: Sequence[int]) -> bool:
        """Whether no two changes are of the same option."""
        names = [name for number in numbers for name in self.changes[number].options]
        return len(names) == len(set(names))

    def loss(self, numbers: Sequence[int]) -> float:
        """Return the loss of changes together; one that gains speed is not counted against."""
        return sum(max(0.0, self.changes[number].loss) for number in numbers)

    def try_out(self, numbers: tuple[int, ...]) -> Plan | None:
        """Return the plan with changes, as far as it fits; None where they are not possible. Of one
        alone, what it saves is remembered.
        """
        changes = [self.changes[number] for number in numbers]
        try:
            plan = make_plan(changed(self.run, changes), whole=False)
        except InputError:
            return None
        saved = self.plan.fullest.memory.needed - plan.fullest.memory.needed
        if len(numbers) == 1 and (saved > 0 or changes[0].on_host):
            self.saved[numbers[0]] = saved
        return plan

    def remedy(self, numbers: Sequence[int], plan: Plan) -> Remedy:
        """Return what is printed of changes that make the run fit."""
        changes = [self.changes[number] for number in numbers]
        remarks = dict.fromkeys(change.remark for change in changes if change.remark)
        return Remedy(_written(self.run, changes), self.loss(numbers), "; ".join(remarks), plan)


def lines_of(plan: Plan, remedies: Sequence[Remedy]) -> list[str]:
    """Say by how much a run does not fit, and what makes it fit."""
    gpu, fullest = plan.run.gpu, plan.fullest
    lines = []
    if plan.lacking > 0:
        rank = fullest.memory.pp_rank
        lines.append(
            f"does not fit: a GPU of pipeline rank {rank} needs {fullest.memory.needed / 1e9:.1f} "
            f"GB, {plan.lacking / 1e9:.1f} more than the {gpu.memory / 1e9:.1f} of {gpu.name}"
        )
    if plan.lacking_on_host > 0:
        lines.append(
            f"does not fit: the host of a node needs {sum(plan.host.values()) / 1e9:,.1f} GB, "
            f"{plan.lacking_on_host / 1e9:,.1f} more than its {gpu.host_memory / 1e9:,.1f}"
        )
    if not remedies:
        return [*lines, "no change that was tried makes it fit; take more GPUs, or --search"]
    lines.append("what makes it fit, the least loss of speed (assumed) first:")
    for remedy in remedies:
        left = -remedy.plan.lacking / 1e9
        remark = f"; {remedy.remarks}" if remedy.remarks else ""
        loss = "no loss" if remedy.loss == 0 else f"about {100 * remedy.loss:.0f} % slower"
        if remedy.loss >= 1:
            loss = "more GPUs"
        lines.append(f"  {remedy.options}    ({loss}, {left:.1f} GB left{remark})")
    return lines
