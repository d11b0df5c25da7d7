"""Find the fastest ways to run a model on so many GPUs.

1. Every combination (candidates.py) that torchsft's own checks allow is weighed: a quick sum says
   what it needs, a rough formula how long it takes beside others (weighing.py).
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
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tools.planning.blocks import measure
from tools.planning.candidates import AXES, CHECKPOINTING, OPTIMIZERS, Task, divisors, powers
from tools.planning.estimate import estimate
from tools.planning.gpus import Gpu
from tools.planning.operations import Blocks
from tools.planning.options import changed
from tools.planning.report import role_of, run_of
from tools.planning.weighing import Candidate, Layouts, Weighing, formats_of, may_fit, quick_sum
from torchsft.cli import (
    Values,
)
from torchsft.config import Config, InputError


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
