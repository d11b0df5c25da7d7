"""Which layers are where in a pipeline: stages, the ranks that hold them, and what schedules can
do.

A schedule is one of torch's, by its class name. Several stages on a rank lie as a loop (stage s on
rank s mod pp) or, where the schedule wants it, as a V (there and back, so that the first and the
last stage are neighbours).
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        """Stages of a pipeline rank, ascending."""
        return [stage for stage, rank in enumerate(self.ranks) if rank == pp_rank]

    def model_part(self, pp_rank: int) -> dict[str, Any]:
        """Keyword arguments of `LanguageModel` for all that a pipeline rank holds."""
        return self.part(self.local(pp_rank))

    def part(self, stages: list[int]) -> dict[str, Any]:
        """Keyword arguments of `LanguageModel` and `LanguageModel.part` for some stages."""
        layers = [layer for stage in stages for layer in self.layers[stage]]
        return {"layers": layers, "first": 0 in stages, "last": len(self.layers) - 1 in stages}


def plan_stages(parallel: Parallel, model_config: ModelConfig, microbatches: int) -> StagePlan:
    """Decide which layers go where; `dp_shard` is resolved, and `microbatches` are those of a step
    on each data rank.

    InputError where the schedule, the layers and the microbatches do not fit together.
    """
    stages, layers = _stage_count(parallel), model_config.num_hidden_layers
    if parallel.pp > 1:
        schedule_class(parallel.pp_schedule)
        if model_config.tie_word_embeddings:
            fault = (
                f"--parallel.pp is {parallel.pp}, but this model's output embedding is its input "
                f"embedding "
            )
            raise InputError(
                fault + "(tie_word_embeddings), which cannot be on two ranks; set --parallel.pp 1"
            )
    if stages > layers and not parallel.pp_layers:
        raise InputError(
            f"--parallel.pp-schedule {parallel.pp_schedule} over --parallel.pp {parallel.pp} has "
            f"{stages} stages, the model "
            f"{layers} layers; set --parallel.pp to at most "
            f"{max(layers * parallel.pp // stages, 1)}"
            + (" or --parallel.pp-schedule to 1F1B" if parallel.pp <= layers else "")
        )
    if stages <= layers:
        balanced = balance(
            model_config.layer_costs(), stages, model_config.embedding_cost, model_config.head_cost
        )
        remedy = f"give {stages}, such as {' '.join(map(str, balanced))}"
    else:
        balanced, remedy = (), "leave it out"
    counts = parallel.pp_layers or balanced
    if len(counts) != stages:
        raise InputError(
            f"--parallel.pp-layers has {len(counts)} number(s), but {parallel.pp_schedule} over "
            f"--parallel.pp {parallel.pp} "
            f"has {stages} stage(s); {remedy}"
        )
    if sum(counts) != layers or 0 in counts[1:-1]:
        raise InputError(
            f"--parallel.pp-layers is {' '.join(map(str, counts))}, together {sum(counts)}, but it "
            f"must place {layers} layers "
            f"and leave none of the middle stages empty; {remedy}"
        )
    if parallel.pp > 1:
        _check_microbatches(parallel, stages, microbatches)
    placed = tuple(
        tuple(range(end - n, end))
        for end, n in zip(itertools.accumulate(counts), counts, strict=True)
    )
    there_and_back = [*range(parallel.pp), *reversed(range(parallel.pp))]
    v = parallel.pp > 1 and parallel.pp_schedule in V_SHAPED
    return StagePlan(
        placed, tuple(there_and_back if v else (stage % parallel.pp for stage in range(stages)))
    )


def _stage_count(parallel: Parallel) -> int:
    if parallel.pp == 1:
        return 1
    if parallel.pp_schedule in ONE_STAGE:
        return parallel.pp
    if parallel.pp_schedule in V_SHAPED or not parallel.pp_layers:
        return 2 * parallel.pp
    return max(1, len(parallel.pp_layers) // parallel.pp) * parallel.pp


def balance(layers: Sequence[int], stages: int, first: int, last: int) -> tuple[int, ...]:
    """How many layers each stage gets, at least one, so that the costliest stage costs least, and
    then all as evenly as can be.

    `layers` are the costs of the layers, of which there are at least as many as stages; `first` and
    `last` what the first and the last stage cost besides their layers.
    """
    ends = [0, *itertools.accumulate(layers)]
    extra = [first, *[0] * (stages - 2), last] if stages > 1 else [first + last]

    def best(
        together: Callable[[Any, Any], Any], worth: Callable[[int], Any]
    ) -> tuple[Any, tuple[int, ...]]:
        # Best value, and layers of each stage, for the first `end` layers in the stages so far.
        found: dict[int, tuple[Any, tuple[int, ...]]] = {0: (0, ())}
        for stage in range(stages):
            found = {
                end: min(
                    (
                        together(value, worth(ends[end] - ends[start] + extra[stage])),
                        (*counts, end - start),
                    )
                    for start, (value, counts) in found.items()
                    if start < end
                )
                for end in range(stage + 1, len(layers) - (stages - stage - 1) + 1)
            }
        return found[len(layers)]

    limit, _ = best(max, lambda cost: cost)
    return best(operator.add, lambda cost: cost * cost if cost <= limit else math.inf)[1]


def schedule_class(name: str) -> type[PipelineScheduleSingle] | type[PipelineScheduleMulti]:
    """torch's schedule of that name; InputError where this torch has none."""
    try:
        return get_schedule_class(name)
    except ValueError:
        fault = (
            f"--parallel.pp-schedule {name} does not exist in torch {torch.__version__}; set it to "
            f"Interleaved1F1B"
        )
        raise InputError(fault) from None


def _check_microbatches(parallel: Parallel, stages: int, microbatches: int) -> None:
    pp, schedule = parallel.pp, parallel.pp_schedule

    def possible(n: int) -> bool:
        if schedule in ("1F1B", "DualPipeV"):
            return n >= stages
        # rounds of equal size
        return not schedule.startswith("Interleaved") or n % max(1, n // pp) == 0

    if possible(microbatches):
        return
    up = next(n for n in itertools.count(microbatches) if possible(n))
    data = parallel.dp_replicate * parallel.dp_shard
    raise InputError(
        f"--parallel.pp-schedule {schedule} with {stages} stages on --parallel.pp {pp} cannot do "
        f"{microbatches} microbatches a "
        f"step, but {up}; set --train.global-batch-size to {up * data} times "
        f"--train.micro-batch-size ({up} on each "
        f"of {data} data ranks)"
    )
