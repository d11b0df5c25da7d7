"""Pipeline ranks that hold the same, of which one is planned for all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchsft.config import Config, Parallel
from torchsft.parallel.stages import ZERO_BUBBLE
from torchsft.planning.memory import planned_rank
from torchsft.planning.simulation import RANKS_PER_NODE


@dataclass(frozen=True)
class Parts:
    """Which pipeline ranks have equal layers.

    Attributes:
        parameters: of the whole model; and those of them that are trained.
        alike: pipeline ranks, those with most parameters first.
    """

    parameters: tuple[int, int]
    alike: list[list[int]]


def parts_of(
    config: Config,
    model_config: Mapping[str, Any],
    size: int,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Parts:
    """Look which pipeline ranks have equal layers: as many parameters, and as many of them trained.

    Args:
        config, model_config, size, ranks_per_node: see `planned_rank`.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    with planned_rank(config, model_config, size, 0, ranks_per_node) as (plan, _):
        layers = {int(name): _count(layer) for name, layer in plan.whole.model.layers.items()}
        ends, stages = _count(plan.whole.model.embed_tokens), plan.layers
        groups: dict[Any, list[int]] = {}
        for rank in range(config.parallel.pp):
            parts = [stages.part([stage]) for stage in stages.local(rank)]
            alike = tuple(
                (part["first"], part["last"], *(layers[layer] for layer in part["layers"]))
                for part in parts
            )
            groups.setdefault(alike, []).append(rank)
        parameters = _count(plan.whole)

    def size_of(alike: tuple) -> int:
        return sum(
            count
            for first, last, *counts in alike
            for count, _ in [*counts, *[ends] * (first + last)]
        )

    return Parts(parameters, [groups[alike] for alike in sorted(groups, key=size_of, reverse=True)])


def _count(module: nn.Module) -> tuple[int, int]:
    """Count a module's parameters, and those of them that are trained."""
    parameters = list(module.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def may_need_most(parallel: Parallel, pp_ranks: list[int]) -> list[int]:
    """Return those of several alike pipeline ranks of which one needs most.

    Where a schedule of torch's does backward passes whole, the first one has most microbatches in
    flight; the others let the last one wait longest for its weights' gradients, or all have about
    as many.
    """
    if parallel.pp_schedule in ZERO_BUBBLE:
        return sorted({pp_ranks[0], pp_ranks[-1]})
    return pp_ranks[:1]
