"""What `plan.py --search` may choose, but for what the command line fixes: every layout, schedule
and microbatch of so many GPUs, and modes of checkpointing, optimizer and number formats.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_type_hints

from tools.planning.gpus import Gpu
from tools.planning.options import option
from torchsft.cli import (
    Values,
)
from torchsft.config import Config, Parallel
from torchsft.models.families import read_model_config
from torchsft.models.language_model import ModelConfig

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
