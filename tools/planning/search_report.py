"""What a search was asked and what it found: options that are given, command lines to paste, text,
a table of the page, JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.planning.candidates import AXES, CHECKPOINTING, OPTIMIZERS, PRECISIONS, Task
from tools.planning.options import option, written
from tools.planning.page import Table
from tools.planning.search import Found
from tools.planning.weighing import Candidate
from torchsft.cli import (
    CONFIG_FILE,
    options_of,
    read_arguments,
    read_file,
)
from torchsft.config import Config


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
