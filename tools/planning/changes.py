"""What to change so that a run fits: real changes of options, each tried by prediction, those first
that cost least speed by the estimate of a step's time (estimate.py).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.planning.estimate import estimate
from tools.planning.options import changed, option, written
from tools.planning.report import Plan, Run, make_plan, run_of
from torchsft.cli import options_of
from torchsft.config import Config, InputError
from torchsft.parallel.stages import ONE_STAGE
from torchsft.planning import simulation
from torchsft.planning.memory import RESERVE

SECONDS = 150  # of a core that trying may take
MOST_TOGETHER = 3  # changes
# A change saves about as much beside others as alone, at most this much more.
MARGIN = 1.05
# What each further change must gain of speed, as a share, to be worth its complication.
SIMPLICITY = 0.06


@dataclass(frozen=True)
class Change:
    """A change of options.

    Attributes:
        options: by their names; `world_size` too.
        remark: what it changes besides.
        saves: of what is held, by purpose (simulation.py), what it can save at all; None: any.
        on_host: whether it saves memory of the host.
    """

    options: Mapping[str, Any]
    remark: str = ""
    saves: Sequence[str] | None = None
    on_host: bool = False


@dataclass(frozen=True)
class Remedy:
    """Changes that together make a run fit.

    Attributes:
        options: to paste.
        loss: share of a step's time that they cost, times GPUs, as estimated; below 0: they gain.
        remarks: what they change besides.
        plan: of the run with them.
    """

    options: str
    loss: float
    remarks: str
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON-able dictionary; sizes are bytes."""
        left = -self.plan.lacking
        return {"options": self.options, "loss": self.loss, "remarks": self.remarks, "left": left}


STATE = (simulation.PARAMETERS, simulation.GATHERED, simulation.GRADIENTS, simulation.MOMENTS)
ACTIVATIONS = (simulation.IN_FLIGHT, simulation.LAYER, simulation.EXCHANGE)
ROUNDS = "rounds at random: learning curves in tools/benchmarks.md"
ON_HOSTS = "needs memory of hosts"


def candidates(run: Run) -> Iterator[Change]:
    """Yield changes that may help, whether they are possible or not."""
    yield from _of_numbers(run)
    yield from _of_activations(run)
    yield from _of_layout(run)


def _of_numbers(run: Run) -> Iterator[Change]:
    """Yield those of what the optimizer keeps and the loss computes at one time."""
    config, optim = run.config, run.config.optim
    if optim.kind == "adamw" and not optim.offload:
        for moments in {"fp32": ("bf16", "int8"), "bf16": ("int8",), "int8": ()}[optim.moments]:
            yield Change({"optim.moments": moments}, ROUNDS, STATE)
        if optim.masters == "fp32":
            yield Change({"optim.masters": "bf16"}, ROUNDS, STATE)
        if (optim.moments, optim.masters) == ("fp32", "fp32"):
            yield Change({"optim.offload": True}, ON_HOSTS, STATE)
    chunk = config.model.loss_chunk or 2**26 // run.model_config.get("vocab_size", 2**17)
    if chunk >= 128:
        yield Change({"model.loss_chunk": chunk // 2}, "", (simulation.LOSS,))
    if config.checkpoint.mode == "async":
        remark = "training waits while checkpoints are written"
        yield Change({"checkpoint.mode": "sync"}, remark, (), on_host=True)


def _of_activations(run: Run) -> Iterator[Change]:
    """Yield those of what is kept for the backward pass."""
    train = run.config.train
    mode, name = train.activation_checkpointing, "train.activation_checkpointing"
    every, products = "train.activation_checkpointing_every", "train.selective_products"
    modes = ("none", "selective", "full", "stream")
    for other in modes[modes.index(mode) + 1 :]:
        whole = {name: other, every: 1, products: False}
        yield Change(whole, "", ACTIVATIONS)
        if mode == "none" and other != "stream":
            yield Change({**whole, every: 2}, "", ACTIVATIONS)
    if train.activation_checkpointing_every > 1:
        yield Change({every: 1}, "", ACTIVATIONS)
    if train.selective_products:
        yield Change({products: False}, "", ACTIVATIONS)
    if mode != "none" and not train.activation_offload:
        yield Change({"train.activation_offload": True}, ON_HOSTS, (simulation.IN_FLIGHT,))
    if train.micro_batch_size > 1:
        yield Change({"train.micro_batch_size": train.micro_batch_size // 2})


def _of_layout(run: Run) -> Iterator[Change]:
    """Yield other layouts of the same ranks."""
    parallel = run.config.parallel
    shard, pp = parallel.dp_shard, parallel.pp
    balanced = {"parallel.pp_layers": ()}
    if pp > 1 and parallel.pp_schedule not in ONE_STAGE:
        yield Change({"parallel.pp_schedule": "1F1B", **balanced})
    yield Change({"parallel.ep": 2 * parallel.ep})
    if parallel.ep > 1:
        yield Change({"parallel.ep": parallel.ep // 2})
    yield Change({"parallel.pp": 2 * pp, "parallel.dp_shard": shard // 2, **balanced})
    if pp > 1:
        yield Change({"parallel.pp": pp // 2, "parallel.dp_shard": 2 * shard, **balanced})
    for axis in ("cp", "tp"):
        more = {f"parallel.{axis}": 2 * getattr(parallel, axis)}
        yield Change({**more, "parallel.dp_shard": shard // 2})


def more_gpus(plan: Plan) -> Change:
    """Return the change to so many times the GPUs that what is shared among them fits at all."""
    run, held = plan.run, plan.fullest.memory.held
    shared = sum(held.get(purpose, 0) for purpose in STATE) / (run.gpu.memory - RESERVE)
    times = 2 ** max(1, math.ceil(math.log2(max(shared, 1))))
    parallel, train = run.config.parallel, run.config.train
    options = {"world_size": times * run.size, "parallel.dp_shard": times * parallel.dp_shard}
    least = train.micro_batch_size * parallel.dp_replicate * options["parallel.dp_shard"]
    if train.global_batch_size < least:
        options["train.global_batch_size"] = least
    return Change(options, f"{times} times the GPUs")


def run_with(run: Run, changes: Sequence[Change]) -> Run:
    """Return the run with other options.

    Raises:
        InputError: they do not fit together.
    """
    options = _merged(changes)
    size = options.pop("world_size", run.size)
    config = changed(run.config, options)
    return run_of(config, run.model_config, size, run.gpu, run.imbalance)


def _merged(changes: Sequence[Change]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.options.items()}


def _written(run: Run, changes: Sequence[Change]) -> str:
    """Return options as they are typed, without those that are so already."""
    words, settings = [], options_of(Config)
    for name, value in _merged(changes).items():
        if name == "world_size":
            words.append(f"--world-size {value}")
        elif option(run.config, name) != value:
            words.append(written(settings[name], value))
    return " ".join(words)


def gpu_seconds(run: Run) -> float:
    """Return how long a step takes, times GPUs.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    options = {"imbalance": run.imbalance, "with_range": False}
    found = estimate(run.config, run.model_config, run.size, run.gpu, **options)
    return found.step_seconds * run.size


class Search:
    """Tries changes alone, then together where what they saved alone is enough, by rising loss of
    speed.

    Args:
        plan: of a run that does not fit.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, plan.run
        self.seconds = gpu_seconds(plan.run)
        self.changes: list[Change] = []
        self.losses: list[float] = []  # of each change alone
        for change in filter(self.can_help, [*candidates(plan.run), more_gpus(plan)]):
            with contextlib.suppress(InputError):  # it is not possible
                self.losses.append(self.loss_of([change]))
                self.changes.append(change)
        self.saved: dict[tuple[int, ...], float] = {}  # numbers of changes -> bytes

    def loss_of(self, changes: Sequence[Change]) -> float:
        """Return which share of a step's time changes cost, times GPUs.

        Raises:
            InputError: they are not possible.
        """
        return gpu_seconds(run_with(self.run, changes)) / self.seconds - 1

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
            # options of which another value, or which without others, have been found
            options = frozenset(_merged([self.changes[number] for number in numbers]))
            if any(each <= options for each in found) or not self.may_be_enough(numbers):
                continue
            plan = self.try_out(numbers)
            if plan is not None and plan.fits:
                found[options] = self.remedy(numbers, plan)
        return sorted(found.values(), key=lambda each: (each.plan.run.size, each.loss))

    def by_loss(self) -> list[tuple[int, ...]]:
        """Return the numbers of changes that go together, none before its parts, and what needs
        more GPUs last.
        """
        numbers = range(len(self.changes))
        sets = [
            together
            for count in range(1, MOST_TOGETHER + 1)
            for together in itertools.combinations(numbers, count)
            if self.go_together(together)
        ]

        def order(together: tuple[int, ...]) -> tuple[bool, float]:
            grows = any("world_size" in self.changes[number].options for number in together)
            losses = sum(max(0.0, self.losses[number]) for number in together)
            return grows, losses + SIMPLICITY * len(together)

        return sorted(sets, key=order)

    def go_together(self, numbers: Sequence[int]) -> bool:
        """Whether no two changes are of the same option."""
        names = [name for number in numbers for name in self.changes[number].options]
        return len(names) == len(set(names))

    def may_be_enough(self, numbers: tuple[int, ...]) -> bool:
        """Whether several changes may save enough, by what parts of them have saved."""
        if len(numbers) == 1:
            return True
        if any((number,) not in self.saved for number in numbers):
            return False
        least = sum(self.saved[number,] for number in numbers)
        for number in numbers:
            others = tuple(other for other in numbers if other != number)
            least = min(least, self.saved.get(others, least) + self.saved[number,])
        return MARGIN * least >= self.plan.lacking

    def try_out(self, numbers: tuple[int, ...]) -> Plan | None:
        """Return the plan with changes, as far as it fits, and remember what they save; None where
        they are not possible.
        """
        changes = [self.changes[number] for number in numbers]
        try:
            plan = make_plan(run_with(self.run, changes), whole=False)
        except InputError:
            return None
        saved = self.plan.fullest.memory.needed - plan.fullest.memory.needed
        if saved > 0 or any(change.on_host for change in changes):
            self.saved[numbers] = saved
        return plan

    def remedy(self, numbers: Sequence[int], plan: Plan) -> Remedy:
        """Return what is said of changes that make the run fit."""
        changes = [self.changes[number] for number in numbers]
        remarks = dict.fromkeys(change.remark for change in changes if change.remark)
        loss = self.loss_of(changes)
        return Remedy(_written(self.run, changes), loss, "; ".join(remarks), plan)


def lines_of(plan: Plan, remedies: Sequence[Remedy]) -> list[str]:
    """Say by how much a run does not fit, and what makes it fit."""
    gpu, fullest = plan.run.gpu, plan.fullest
    lines = []
    if plan.lacking > 0:
        lines.append(
            f"does not fit: a GPU of pipeline rank {fullest.memory.pp_rank} needs "
            f"{fullest.memory.needed / 1e9:,.1f} GB, {plan.lacking / 1e9:,.1f} more than the "
            f"{gpu.memory / 1e9:,.1f} of {gpu.name}"
        )
    if plan.lacking_on_host > 0:
        lines.append(
            f"does not fit: the host of a node needs {sum(plan.host.values()) / 1e9:,.1f} GB, "
            f"{plan.lacking_on_host / 1e9:,.1f} more than its {gpu.host_memory / 1e9:,.1f}"
        )
    if not remedies:
        return [*lines, "no change that was tried makes it fit; take more GPUs, or --search"]
    lines.append(
        "what makes it fit, in place of the same options where they are given, and what it costs "
        "of a step's time, times GPUs, as estimated:"
    )
    for remedy in remedies:
        left = -remedy.plan.lacking / 1e9
        remark = f"; {remedy.remarks}" if remedy.remarks else ""
        lines.append(f"  {remedy.options}    ({pace(remedy.loss)}, {left:.1f} GB left{remark})")
    return lines


def pace(loss: float) -> str:
    """Return in words how much longer a step takes, as a share."""
    if abs(loss) < 0.005:
        return "as fast"
    if loss >= 1:
        return f"{1 + loss:.1f} times as long"
    return f"{abs(loss):.0%} {'slower' if loss > 0 else 'faster'}"
