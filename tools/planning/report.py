"""The plan of a run: what its GPUs, hosts and disks hold, from execution on the meta device, and
the text that is printed of it.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tools.planning.gpus import Gpu
from tools.planning.storage import (
    checkpoint_bytes,
    checkpoints_kept,
    copied_bytes,
    export_bytes,
)
from torchsft.config import Config, to_dict
from torchsft.data.stream import microbatches_of
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.apply import compute_dtype
from torchsft.parallel.blockwise import check_device as check_blockwise
from torchsft.parallel.expert_float8 import check_device as check_expert_float8
from torchsft.parallel.float8 import check_device as check_float8
from torchsft.parallel.world import mesh_sizes
from torchsft.planning import simulation
from torchsft.planning.memory import (
    CONTEXT,
    FRAGMENTS,
    Memory,
    memory_of,
    on_gpus,
    planned_rank,
)
from torchsft.planning.roles import may_need_most, parts_of

# Bytes of a rank's process on its host: Python, torch, CUDA's libraries, a part of the data.
PROCESS = 4_000_000_000
# Bytes of a GPU that are no tensors (memory.py).
RESERVE = {
    "CUDA context, kernels and communicators": CONTEXT,
    "gaps between tensors": FRAGMENTS,
}
# What memory is for, in the order of the report.
PURPOSES = (
    simulation.PARAMETERS,
    simulation.GATHERED,
    simulation.GRADIENTS,
    simulation.MOMENTS,
    simulation.RECEIVED,
    simulation.IN_FLIGHT,
    simulation.LAYER,
    simulation.LOSS,
    simulation.EXCHANGE,
)


@dataclass(frozen=True)
class Run:
    """What is planned.

    Attributes:
        config: with `auto` as on GPUs, and `dp_shard` as for `size` ranks.
        model_config: config.json of the model.
        size: ranks, one on each GPU.
        imbalance: rows that a rank's experts receive, over the mean.
    """

    config: Config
    model_config: Mapping[str, Any]
    size: int
    gpu: Gpu
    imbalance: float


def run_of(
    config: Config, model_config: Mapping[str, Any], size: int, gpu: Gpu, imbalance: float
) -> Run:
    """Return what is planned, with what is automatic made definite.

    Raises:
        InputError: the layout does not have that many ranks, or the GPU lacks what a mode needs.
    """
    config = on_gpus(config)
    shard = mesh_sizes(config.parallel, size)["dense"]["dp_shard"]
    parallel = dataclasses.replace(config.parallel, dp_shard=shard)
    config = dataclasses.replace(config, parallel=parallel)
    check_gpu(config, gpu)
    return Run(config, model_config, size, gpu, imbalance)


def check_gpu(config: Config, gpu: Gpu) -> None:
    """Refuse what a kind of GPU cannot compute, as a run on it would."""
    precision, capability = config.precision, gpu.capability
    if precision.compute == "blockwise":
        check_blockwise(capability)
    if precision.compute == "float8":
        check_float8(capability)
    if precision.experts != "same":
        compute = compute_dtype(precision.compute, simulation.META)
        check_expert_float8(precision.experts, capability, compute, version("torchao"))


@dataclass(frozen=True)
class Role:
    """Pipeline ranks with equal layers, by the one that needs most.

    Attributes:
        pp_ranks: which they are.
        layers: what each has, in words.
        memory: of that one's GPU.
        host: bytes of a GPU's share of its host, by what they are for.
        state: bytes of a checkpoint that all ranks of one of `pp_ranks` write together.
    """

    pp_ranks: list[int]
    layers: str
    memory: Memory
    host: Mapping[str, int]
    state: int


def describe_part(model: LanguageModel) -> str:
    """Say what a pipeline rank has."""
    layers, moes = len(model.model.layers), len(model.moe_layers())
    dense = [f"{layers - moes} dense"] if layers > moes else []
    words = [f"{moes} MoE", *dense] if moes else [f"{layers} layers"]
    return ", ".join(words + ["embedding"] * model.first + ["head"] * model.last)


def role_of(run: Run, pp_ranks: list[int]) -> Role:
    """Run a step of the ranks of which one needs most."""
    ranks = may_need_most(run.config.parallel, pp_ranks)
    return max(
        (_role_by(run, pp_ranks, rank) for rank in ranks),
        key=lambda role: role.memory.needed,
    )


def _role_by(run: Run, pp_ranks: list[int], rank: int) -> Role:
    config, node = run.config, run.gpu.ranks_per_node
    with planned_rank(config, run.model_config, run.size, rank, node) as (plan, world):
        layers = describe_part(plan.model)
        state = checkpoint_bytes(plan.model, config.optim)
        sharing = run.size // config.parallel.pp
        copied = copied_bytes(plan.model, config.optim, sharing)
        memory = memory_of(plan, config, world, run.imbalance)
    host = {"processes (assumed)": PROCESS}
    if memory.host:
        host["optimizer and activations offloaded"] = memory.host
    if config.checkpoint.mode == "async":
        host["copy of a checkpoint"] = copied
    return Role(pp_ranks, layers, memory, host, state)


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what it has.

    Attributes:
        run: what is planned.
        parameters: of the model; and those of them that are trained.
        roles: pipeline ranks.
        host: bytes of the fullest node, by what they are for.
        checkpoint: bytes of one.
        kept: how many there are at most; None: unknown.
        export: bytes of one.
        seconds: that planning took.
        estimate: of time and money (estimate.py); None: not asked for.
    """

    run: Run
    parameters: tuple[int, int]
    roles: list[Role]
    host: Mapping[str, int]
    checkpoint: int
    kept: int | None
    export: int
    seconds: float
    estimate: Any = None

    @property
    def fullest(self) -> Role:
        """The pipeline ranks whose GPUs need most."""
        return max(self.roles, key=lambda role: role.memory.needed)

    @property
    def lacking(self) -> int:
        """Bytes that the fullest GPU has too few; below 0: that it has left."""
        return self.fullest.memory.needed - self.run.gpu.memory

    @property
    def lacking_on_host(self) -> int:
        """The same of the fullest node's host."""
        return sum(self.host.values()) - self.run.gpu.host_memory

    @property
    def fits(self) -> bool:
        """Whether all fits."""
        return self.lacking <= 0 and self.lacking_on_host <= 0


def fullest_node(run: Run, roles: list[Role]) -> dict[str, int]:
    """Return what the host of the node holds whose ranks together hold most there."""
    role_of_rank = {rank: role for role in roles for rank in role.pp_ranks}
    sharing, node = run.size // run.config.parallel.pp, run.gpu.ranks_per_node
    nodes = []
    for first in range(0, run.size, node):
        held = Counter()
        for rank in range(first, min(first + node, run.size)):
            held.update(role_of_rank[rank // sharing].host)
        nodes.append(dict(held))
    return max(nodes, key=lambda held: sum(held.values()))


def make_plan(run: Run, *, whole: bool = True) -> Plan:
    """Plan all but time.

    Args:
        whole: False: without exports, and without pipeline ranks behind those that do not fit.

    Raises:
        InputError: options, model and ranks do not fit together.
    """
    began = time.perf_counter()
    export = export_bytes(run.config, run.model_config) if whole else 0
    node = run.gpu.ranks_per_node
    parts, roles = parts_of(run.config, run.model_config, run.size, node), []
    for ranks in parts.alike:
        roles.append(role_of(run, ranks))
        if not whole and roles[-1].memory.needed > run.gpu.memory:
            break
    roles.sort(key=lambda role: role.pp_ranks)
    complete = len(roles) == len(parts.alike)
    state = sum(len(role.pp_ranks) * role.state for role in roles)
    return Plan(
        run,
        parts.parameters,
        roles,
        fullest_node(run, roles) if complete else {},
        checkpoint=state,
        kept=checkpoints_kept(run.config.checkpoint, run.config.train.steps),
        export=export,
        seconds=time.perf_counter() - began,
    )


# What is printed


def gigabytes(size: float) -> str:
    """Return bytes in GB (10^9)."""
    return f"{size / 1e9:,.1f}"


def many(count: int) -> str:
    """Return a number of parameters in words."""
    if count >= 1e8:
        return f"{count / 1e9:,.1f} billion"
    return f"{count / 1e6:,.2f} million"


def memory_lines(plan: Plan) -> list[str]:
    """Return a table of what a GPU of each role holds, in GB."""
    roles, gpu = plan.roles, plan.run.gpu
    rows = [("", *(_ranks(role.pp_ranks) for role in roles))]
    rows.append(("", *(role.layers for role in roles)))
    for purpose in PURPOSES:
        sizes = [role.memory.held.get(purpose, 0) for role in roles]
        if any(sizes):
            rows.append((purpose, *map(gigabytes, sizes)))
    allocated = [gigabytes(role.memory.allocated) for role in roles]
    rows.append(("together: torch's tensors", *allocated))
    for words, size in RESERVE.items():
        rows.append((f"{words} (assumed)", *[gigabytes(size)] * len(roles)))
    rows.append(("needed", *(gigabytes(role.memory.needed) for role in roles)))
    left = [gpu.memory - role.memory.needed for role in roles]
    rows.append((f"left of {gigabytes(gpu.memory)}", *map(gigabytes, left)))
    rows.append(("", *("fits" if rest >= 0 else "DOES NOT FIT" for rest in left)))
    return _aligned(rows)


def _ranks(ranks: list[int]) -> str:
    """Name pipeline ranks: 0, 2 to 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"pp {', '.join(words)}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines


def storage_lines(plan: Plan) -> list[str]:
    """Say what hosts and disks hold, in GB."""
    run, options = plan.run, plan.run.config.checkpoint
    host = sum(plan.host.values())
    parts = ", ".join(f"{words} {gigabytes(size)}" for words, size in plan.host.items())
    state = "fits" if plan.lacking_on_host <= 0 else "DOES NOT FIT"
    lines = [
        f"host memory of a node: {gigabytes(host)} of {gigabytes(run.gpu.host_memory)} "
        f"({parts}); {state}"
    ]
    kept = "as many are kept as there are steps for"
    if plan.kept is not None:
        total = gigabytes(plan.kept * plan.checkpoint)
        kept = f"at most {plan.kept} at a time, the one being written among them: {total}"
    lines.append(f"disk: a checkpoint {gigabytes(plan.checkpoint)}; {kept}")
    if options.export != "none":
        each = f"; one every {options.export_every} steps, all kept" if options.export_every else ""
        lines.append(f"      an export in {options.export} {gigabytes(plan.export)}{each}")
    return lines


def lines_of(plan: Plan) -> list[str]:
    """Return the plan as text."""
    run, config = plan.run, plan.run.config
    parallel, train, microbatches = config.parallel, config.train, microbatches_of(config)
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    sizes = [f"{axis} {getattr(parallel, axis)}" for axis in axes if getattr(parallel, axis) > 1]
    count, trained = plan.parameters
    rows = f"{train.micro_batch_size} x {config.data.seq_len:,} tokens"
    schedule = f", {parallel.pp_schedule}" if parallel.pp > 1 else ""
    return [
        f"{many(count)} parameters, {many(trained)} trained; {run.size} x "
        f"{run.gpu.name}: {' x '.join(sizes) or 'one rank'}{schedule}; a step of each data rank is "
        f"{microbatches} microbatch{'es' * (microbatches > 1)} of {rows}",
        "",
        f"Memory of a GPU when it holds most, in GB (10^9 bytes); a rank's experts receive "
        f"{run.imbalance:g} x the mean",
        *memory_lines(plan),
        "",
        *storage_lines(plan),
        "",
        f"planned in {plan.seconds:.0f} s",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-able nested dictionaries; sizes are bytes."""
    run, parameters = plan.run, plan.parameters
    roles = []
    for role in plan.roles:
        memory = role.memory
        held = {purpose: size for purpose, size in memory.held.items() if size}
        left = run.gpu.memory - memory.needed
        roles.append(
            {"pp_ranks": role.pp_ranks, "layers": role.layers, "held": held}
            | {"allocated": memory.allocated, "needed": memory.needed, "left": left}
        )
    return {
        "config": to_dict(run.config),
        "gpu": dataclasses.asdict(run.gpu),
        "world_size": run.size,
        "imbalance": run.imbalance,
        "parameters": parameters[0],
        "trained_parameters": parameters[1],
        "reserve": RESERVE,
        "roles": roles,
        "host": dict(plan.host),
        "checkpoint": plan.checkpoint,
        "checkpoints_kept": plan.kept,
        "export": plan.export,
        "fits": plan.fits,
        "lacking": max(0, plan.lacking),
        "lacking_on_host": max(0, plan.lacking_on_host),
        "seconds": plan.seconds,
    }
