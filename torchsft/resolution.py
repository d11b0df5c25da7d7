"""What is automatic in a configuration, made definite by this machine and number of ranks."""

import dataclasses
import datetime
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchsft.checkpoint import state
from torchsft.checkpoint.weight_files import read_json_object
from torchsft.config import Config, InputError, Parallel
from torchsft.parallel.world import mesh_sizes


def resolve(config: Config) -> Config:
    """Replace what is automatic: the result is what runs, and what is saved.

    Raises:
        InputError: the mesh sizes do not fit the number of ranks.
    """
    sizes = mesh_sizes(config.parallel, number_of_ranks(config))
    parallel = dataclasses.replace(config.parallel, dp_shard=sizes["dense"]["dp_shard"])
    precision, train = config.precision, config.train
    if precision.compute == "auto":
        compute = "bf16" if torch.cuda.is_available() else "fp32"
        precision = dataclasses.replace(precision, compute=compute)
    if train.steps is None and train.epochs is None:
        train = dataclasses.replace(train, epochs=1)
    date = config.data.template_date or first_day(config)
    data = dataclasses.replace(config.data, template_date=date)
    return dataclasses.replace(
        config, parallel=parallel, precision=precision, train=train, data=data
    )


def number_of_ranks(config: Config) -> int:
    """Return the number of ranks that were started, or with --print-config or --dry-run of one
    process the smallest number that the layout can have.
    """
    if not (config.print_config or config.dry_run) or "WORLD_SIZE" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return smallest_number_of_ranks(config.parallel)


def smallest_number_of_ranks(parallel: Parallel) -> int:
    """Return the product of the mesh sizes, with the smallest dp_shard that ep allows where
    dp_shard is automatic.
    """
    sequence = parallel.cp * parallel.tp
    shard = parallel.dp_shard
    if shard == -1:
        shard = parallel.ep // math.gcd(parallel.ep, sequence)
    return parallel.pp * parallel.dp_replicate * shard * sequence


def first_day(config: Config) -> str:
    """Return the day (YYYY-MM-DD) on which this run started first: that of the run which it
    continues, else today.
    """
    data = _earlier_config(config).get("data")
    day = data.get("template_date") if isinstance(data, Mapping) else None
    return day or datetime.date.today().isoformat()


def _earlier_config(config: Config) -> Mapping[str, Any]:
    """Return the configuration of the run that this one continues; empty where there is none."""
    resume, saved = config.checkpoint.resume, Path(config.output) / "config.json"
    try:
        if resume not in ("auto", "never"):
            return state.saved_config(resume)
        if saved.exists():
            return read_json_object(saved)
    except InputError:  # `find_start` raises it again, with its remedy
        pass
    return {}
