"""Which layers are where in a pipeline: stages, the ranks that hold them, and what schedules can
do.

A schedule is one of torch's, by its class name. Several stages on a rank lie as a loop (stage s on
rank s mod pp) or, where the schedule wants it, as a V (there and back, so that the first and the
last stage are neighbours).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from torchsft.config import InputError, Parallel
from torchsft.models.language_model import ModelConfig

ONE_STAGE = ("GPipe", "1F1B")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
ZERO_BUBBLE = ("InterleavedZeroBubble", *V_SHAPED)


@dataclass(frozen=True)
class StagePlan:
    """Which layers each stage has and on which pipeline rank each stage is."""

    layers: tuple[tuple[int, ...], ...]  # of each stage, by number in the whole model
    ranks: tuple[int, ...]  # pipeline rank of each stage

    def local(self, pp_rank: int) -> list[int]:
        """Return the stages of a pipeline rank, ascending."""
        return [stage for stage, rank in enumerate(self.ranks) if rank == pp_rank]

    def model_part(self, pp_rank: int) -> dict[str, Any]:
        """Return keyword arguments of `LanguageModel` for all that a pipeline rank holds."""
        return self.part(self.local(pp_rank))

    def part(self, stages: list[int]) -> dict[str, Any]:
        """Return keyword arguments of `LanguageModel` and `LanguageModel.part` for some stages."""
        layers = [layer for stage in stages for layer in self.layers[stage]]
        return {"layers": layers, "first": 0 in stages, "last": len(self.layers) - 1 in stages}


def plan_stages(
    parallel: Parallel, model_config: ModelConfig, microbatches: int, mtp_layers: int = 0
) -> StagePlan:
    """Decide which layers go where.

    Args:
        parallel: with `dp_shard` resolved.
        model_config: of the whole model.
        microbatches: of a step on each data rank.
        mtp_layers: that are trained, in the last stage.

    Raises:
        InputError: the schedule, the layers and the microbatches do not fit together.
    """
    stages = _stage_count(parallel)
    if parallel.pp > 1:
        schedule_class(parallel.pp_schedule)
        _check_tied_embeddings(parallel, model_config)
    if mtp_layers and parallel.pp_schedule in V_SHAPED and parallel.pp > 1:
        raise InputError(
            f"--parallel.pp-schedule {parallel.pp_schedule} has the first and the last stage on "
            "one rank, but --model.mtp train needs the embedding in both; set it to Interleaved1F1B"
        )
    last = model_config.head_cost
    last += mtp_layers * (model_config.layer_costs()[-1] + 2 * model_config.hidden_size**2 + last)
    counts = _layer_counts(parallel, model_config, stages, last)
    if parallel.pp > 1:
        _check_microbatches(parallel, stages, microbatches)
    ends = list(itertools.accumulate(counts))
    layers = tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True))
    return StagePlan(layers, _stage_ranks(parallel, stages))


def microbatches_in_flight(parallel: Parallel, pp_rank: int, microbatches: int) -> int:
    """Return how many microbatches a pipeline rank keeps activations of at least, at one time."""
    schedule = parallel.pp_schedule if parallel.pp > 1 else "1F1B"
    if schedule == "GPipe":
        return microbatches
    if schedule in V_SHAPED:
        microbatches = max(1, microbatches // 2)
    return min(microbatches, parallel.pp - pp_rank)


def _stage_count(parallel: Parallel) -> int:
    """Return the number of stages of all pipeline ranks."""
    if parallel.pp == 1:
        return 1
    if parallel.pp_schedule in ONE_STAGE:
        return parallel.pp
    if parallel.pp_schedule in V_SHAPED or not parallel.pp_layers:
        return 2 * parallel.pp
    return max(1, len(parallel.pp_layers) // parallel.pp) * parallel.pp


def _stage_ranks(parallel: Parallel, stages: int) -> tuple[int, ...]:
    """Return the pipeline rank of each stage."""
    if parallel.pp > 1 and parallel.pp_schedule in V_SHAPED:
        there = range(parallel.pp)
        return (*there, *reversed(there))
    return tuple(stage % parallel.pp for stage in range(stages))


def _layer_counts(
    parallel: Parallel, model_config: ModelConfig, stages: int, last: int
) -> tuple[int, ...]:
    """Return how many layers each stage has: what --parallel.pp-layers says, else balanced; `last`
    is what the last one costs besides.
    """
    layers, counts = model_config.num_hidden_layers, parallel.pp_layers
    if not counts:
        _check_stage_count(parallel, stages, layers)
        return _balanced(model_config, stages, last)
    if len(counts) != stages:
        raise InputError(
            f"--parallel.pp-layers has {len(counts)} number(s), but {parallel.pp_schedule} over "
            f"--parallel.pp {parallel.pp} has {stages} stage(s); "
            f"{_layers_remedy(model_config, stages, last)}"
        )
    if sum(counts) != layers or 0 in counts[1:-1]:
        raise InputError(
            f"--parallel.pp-layers is {' '.join(map(str, counts))}, together {sum(counts)}, but it "
            f"must place {layers} layers and leave none of the middle stages empty; "
            f"{_layers_remedy(model_config, stages, last)}"
        )
    return tuple(counts)


def _balanced(model_config: ModelConfig, stages: int, last: int) -> tuple[int, ...]:
    """Return layer counts that balance the stages' costs."""
    return balance(tuple(model_config.layer_costs()), stages, model_config.embedding_cost, last)


def _layers_remedy(model_config: ModelConfig, stages: int, last: int) -> str:
    """Say what --parallel.pp-layers should be."""
    if stages > model_config.num_hidden_layers:
        return "leave it out"
    return f"give {stages}, such as {' '.join(map(str, _balanced(model_config, stages, last)))}"


def _check_tied_embeddings(parallel: Parallel, model_config: ModelConfig) -> None:
    if model_config.tie_word_embeddings:
        raise InputError(
            f"--parallel.pp is {parallel.pp}, but this model's output embedding is its input "
            "embedding (tie_word_embeddings), which cannot be on two ranks; set --parallel.pp 1"
        )


def _check_stage_count(parallel: Parallel, stages: int, layers: int) -> None:
    if stages <= layers:
        return
    most = max(layers * parallel.pp // stages, 1)
    remedy = f"set --parallel.pp to at most {most}"
    if parallel.pp <= layers:
        remedy += " or --parallel.pp-schedule to 1F1B"
    raise InputError(
        f"--parallel.pp-schedule {parallel.pp_schedule} over --parallel.pp {parallel.pp} has "
        f"{stages} stages, the model {layers} layers; {remedy}"
    )


def _check_microbatches(parallel: Parallel, stages: int, microbatches: int) -> None:
    pp, schedule = parallel.pp, parallel.pp_schedule

    # What the schedules check themselves (torch.distributed.pipelining.schedules, 2.11 to 2.13).
    def possible(count: int) -> bool:
        if schedule in ("1F1B", "DualPipeV"):
            return count >= stages
        if schedule.startswith("Interleaved"):
            rounds = max(1, count // pp)  # of equal size
            return count % rounds == 0
        return True

    if possible(microbatches):
        return
    more = next(count for count in itertools.count(microbatches) if possible(count))
    data_ranks = parallel.dp_replicate * parallel.dp_shard
    raise InputError(
        f"--parallel.pp-schedule {schedule} with {stages} stages on --parallel.pp {pp} cannot do "
        f"{microbatches} microbatches a step, but {more}; set --train.global-batch-size to "
        f"{more * data_ranks} times --train.micro-batch-size ({more} on each of {data_ranks} data "
        "ranks)"
    )


@cache
def balance(layer_costs: tuple[int, ...], stages: int, first: int, last: int) -> tuple[int, ...]:
    """Divide layers over stages so that the costliest stage costs least, and then all as evenly as
    can be.

    Args:
        layer_costs: of each layer; at least as many as stages.
        stages: how many there are.
        first: what the first stage costs besides its layers.
        last: what the last stage costs besides its layers.

    Returns:
        How many layers each stage gets, at least one.
    """
    # The least that the costliest stage can cost, then the least sum of squares below that.
    limit, _ = _best_division(layer_costs, stages, first, last, combine=max, penalty=float)

    def squared(cost: float) -> float:
        return cost * cost if cost <= limit else math.inf

    _, counts = _best_division(
        layer_costs, stages, first, last, combine=lambda a, b: a + b, penalty=squared
    )
    return counts


def _best_division(
    layer_costs: Sequence[int],
    stages: int,
    first: int,
    last: int,
    *,
    combine: Callable[[float, float], float],
    penalty: Callable[[float], float],
) -> tuple[float, tuple[int, ...]]:
    """Find the layer counts whose stages' penalties, combined, are least (dynamic programming over
    the stages).

    Args: as in `balance`, and
        combine: makes one penalty of those of two parts of the pipeline.
        penalty: of a stage's cost.

    Returns:
        The combined penalty, and the layer counts; of equally good ones the first in order.
    """
    cost_before = [0, *itertools.accumulate(layer_costs)]
    extra = [0] * stages
    extra[0] += first
    extra[-1] += last
    # Number of layers in the stages so far -> their best penalty and layer counts.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(stages):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        stages_left = stages - stage - 1
        for end in range(stage + 1, len(layer_costs) - stages_left + 1):
            candidates = []
            for begin, (value, counts) in best.items():
                if begin < end:
                    cost = cost_before[end] - cost_before[begin] + extra[stage]
                    candidates.append((combine(value, penalty(cost)), (*counts, end - begin)))
            longer[end] = min(candidates)
        best = longer
    return best[len(layer_costs)]


def schedule_class(name: str) -> type[PipelineScheduleSingle] | type[PipelineScheduleMulti]:
    """Return torch's schedule of that name.

    Raises:
        InputError: this torch has none.
    """
    try:
        return get_schedule_class(name)
    except ValueError:
        raise InputError(
            f"--parallel.pp-schedule {name} does not exist in torch {torch.__version__}; set it to "
            "Interleaved1F1B"
        ) from None
