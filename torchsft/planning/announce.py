"""What a run says of its memory: `--dry-run`, in one line when it starts, and at its end what was
really used beside it.
"""

import os
import pickle
import resource
import select
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from torchsft.config import Config, InputError
from torchsft.data.stream import microbatches_of
from torchsft.models.decoder import local
from torchsft.models.families import read_model_config
from torchsft.models.language_model import trained_mtp_layers
from torchsft.parallel.collectives import gather_objects
from torchsft.parallel.memory import device_bytes
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.world import World
from torchsft.planning.memory import (
    CONTEXT,
    FRAGMENTS,
    IMBALANCE,
    RESERVE,
    Memory,
    microbatches_run,
    predict,
)
from torchsft.planning.roles import may_need_most, parts_of
from torchsft.planning.simulation import MOMENTS, PARAMETERS

# Passes of a microbatch through a layer that a run simulates before it starts: some 30 ms each.
MOST_PASSES = 250
LONGEST_WAIT = 60.0  # seconds for it, behind what it took to load the weights


def gigabytes(size: float) -> str:
    """Return bytes in GB (10^9), with two digits or more."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2g} GB"


def describe(memory: Memory, parts: int = 99) -> str:
    """Say what a rank holds at its peak, and its largest parts."""
    held = sorted(memory.held.items(), key=lambda item: -item[1])
    largest = [f"{purpose} {gigabytes(size)}" for purpose, size in held if size][:parts]
    host = f"; on its host {gigabytes(memory.host)}" if memory.host else ""
    return f"{gigabytes(memory.allocated)} ({', '.join(largest)}){host}"


# --dry-run


def dry_run(config: Config, model_config: Mapping[str, Any], size: int) -> None:
    """Print what the GPU of each kind of pipeline rank holds.

    Args:
        config: resolved, see `on_gpus`.
        model_config: config.json of the model.
        size: ranks.

    Raises:
        InputError: options, model and ranks do not fit together, or not into the GPU that is there.
    """
    print(
        f"memory planned for {size} rank{'s' * (size > 1)}, of a GPU when it holds most; a rank's "
        f"experts receive {IMBALANCE} x the mean"
    )
    most = 0
    for ranks in sorted(parts_of(config, model_config, size).alike):
        some = may_need_most(config.parallel, ranks)
        memories = [predict(config, model_config, size, rank) for rank in some]
        fullest = max(memories, key=lambda memory: memory.needed)
        most = max(most, fullest.needed)
        who = ", ".join(map(str, ranks))
        print(f"pipeline rank{'s' * (len(ranks) > 1)} {who}: {describe(fullest)}", flush=True)
    available = device_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    reserve = f"{gigabytes(CONTEXT)} for CUDA and NCCL and {gigabytes(FRAGMENTS)} of gaps"
    needed = f"needed: {gigabytes(most)} with the assumed {reserve}"
    if available is None:
        print(f"{needed}; there is no GPU here to compare with")
    elif most > available:
        raise InputError(
            f"{needed}, but the GPU has {gigabytes(available)}; raise --parallel.pp, "
            "--parallel.ep or --parallel.dp-shard, checkpoint activations, or lower "
            "--optim.moments and --optim.masters"
        )
    else:
        print(f"{needed}; the GPU has {gigabytes(available)}: it fits")


# At the start and at the end of a run


class Planned:
    """What rank 0 is planned to hold; in a process of its own, while the run is built: torch keeps
    what it has learnt of simulated groups of ranks.

    Args:
        config: of the run; resolved.
        model_config: returns config.json of the model.
        size: ranks.
    """

    def __init__(
        self, config: Config, model_config: Callable[[], Mapping[str, Any]], size: int
    ) -> None:
        reading, writing = os.pipe()
        self.child = os.fork()
        if self.child:
            os.close(writing)
            self.reading = reading
            return
        os.close(reading)  # so that writing fails where the run has ended
        code = 1
        try:
            with os.fdopen(writing, "wb") as file:
                pickle.dump(_quietly(config, model_config, size), file)
            code = 0
        finally:
            os._exit(code)

    def result(self) -> Memory | str:
        """Wait for it; a sentence: why there is none."""
        in_time, _, _ = select.select([self.reading], [], [], LONGEST_WAIT)
        if not in_time:
            os.kill(self.child, signal.SIGKILL)
        with os.fdopen(self.reading, "rb") as file:
            found = file.read()
        _, status = os.waitpid(self.child, 0)
        # it may have been killed while it wrote
        return "its process was ended or took long" if status else pickle.loads(found)


def _quietly(
    config: Config, model_config: Callable[[], Mapping[str, Any]], size: int
) -> Memory | str:
    """Predict it beside the run, which knows and says better what may be wrong with its options."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.nice(10)
    torch.set_num_threads(1)
    try:
        return _own(config, model_config(), size)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def _own(config: Config, model_config: Mapping[str, Any], size: int) -> Memory | str:
    """Predict rank 0's memory, unless that takes long."""
    sizes, microbatches = read_model_config(model_config), microbatches_of(config)
    mtp_layers = trained_mtp_layers(config.model.mtp, sizes)
    stages = plan_stages(config.parallel, sizes, microbatches, mtp_layers)
    layers = sum(len(stages.layers[stage]) for stage in stages.local(0))
    train = config.train
    passes = layers * microbatches_run(config.parallel, microbatches)
    if train.activation_checkpointing == "stream":
        passes *= train.stream_pieces
    if passes > MOST_PASSES:
        return f"{passes} passes through layers, more than {MOST_PASSES}, take long"
    return predict(config, model_config, size)


def describe_planned(planned: Memory | str) -> str:
    """Say at the start of a run what is planned."""
    if isinstance(planned, str):
        return f"memory of rank 0: not planned ({planned}); --dry-run plans it"
    reserve = f"{gigabytes(RESERVE)} beside them assumed"
    return f"memory planned for rank 0: tensors of {describe(planned, 4)}, {reserve}"


def describe_used(
    planned: Memory | str | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> str:
    """Say at the end of a run what was really used; collective.

    Args:
        planned: of rank 0, on which it is there.
        model: this rank's part.
        optimizer: of the run.
        world: the ranks.
    """
    expected = planned if isinstance(planned, Memory) else None
    if world.device.type == "cuda":
        mine = (
            world.dense.get_local_rank("pp"),
            torch.cuda.max_memory_allocated(world.device),
            torch.cuda.max_memory_reserved(world.device),
        )
        of_ranks = gather_objects(mine)
        alike = max(allocated for pp_rank, allocated, _ in of_ranks if pp_rank == 0)
        _, allocated, reserved = map(max, zip(*of_ranks, strict=True))
        beside = f" ({gigabytes(expected.allocated)} planned)" if expected else ""
        return (
            f"memory used, at most: {gigabytes(alike)} allocated on pipeline rank 0{beside}, "
            f"{gigabytes(allocated)} on any rank; {gigabytes(reserved)} reserved on any"
        )
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    held = sum(local(tensor.detach()).nbytes for tensor in tensors)
    beside = ""
    if expected and not expected.host:
        kept = expected.held[PARAMETERS] + expected.held.get(MOMENTS, 0)
        beside = f" ({gigabytes(kept)} planned)"
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"memory used by rank 0: parameters and moments {gigabytes(held)}{beside}; torch counts no "
        f"peak of tensors on a CPU, the process had {gigabytes(peak)} at most (resident, with "
        "Python and libraries)"
    )
