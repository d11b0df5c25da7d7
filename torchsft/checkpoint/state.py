"""Training checkpoints with DCP: fp32 master weights, optimizer state, counters and random states, for any layout.

    CHECKPOINTS/step-00000100/
        .metadata, __0_0.distcp, ...    DCP: `model.FQN`, `optimizer.state.FQN.NAME`, `rng.RANK.DEVICE`, tensors only
        trainer.json                    {"step", "extra"}: counters and the data position
        config.json                     the run's resolved configuration

A directory with such a name is complete: it is written aside and renamed when all ranks have finished. The only pickle
is DCP's own `.metadata`; tensors are read with `weights_only`.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from torchsft.checkpoint.huggingface import mismatches
from torchsft.checkpoint.publish import barrier, gather_objects, published, rank_and_size, write_text
from torchsft.config import InputError

_NAME = re.compile(r"step-(\d{8,})")
_FILES = (".metadata", "trainer.json", "config.json")


def save(
    directory: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    extra: Mapping[str, Any],
    config: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `directory/step-00000100` (for step 100); collective, each rank writes its share. A checkpoint of the same step is
    replaced.

    The optimizer's options (learning rate, betas, ...) are not saved: they follow from the configuration and the step.

    Args:
        extra: JSON-able counters and data position, equal on all ranks; `load` returns it.
        config: JSON-able resolved configuration.
        keep: how many of the newest checkpoints stay (this one always does); 0 keeps all.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: it could not be written; older checkpoints are untouched.
    """
    target = Path(directory) / f"step-{step:08d}"
    texts = {
        "trainer.json": json.dumps({"step": step, "extra": dict(extra)}, indent=2),
        "config.json": json.dumps(dict(config), indent=2),
    }
    # An optimizer that has not stepped yet has nothing to save; asking for its state would create one that has stepped
    # once.
    tensors = _model_tensors(model) | (_optimizer_tensors(model, optimizer) if optimizer.state else {})
    rank, _ = rank_and_size()
    with published(target) as staging:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, no group: fine
                dcp.save(tensors | _random_states(rank), storage_writer=dcp.FileSystemWriter(staging))
        except CheckpointException as error:
            raise OSError(f"checkpoint {target} could not be written: {_cause(error)}") from error
        if rank == 0:
            for name, text in texts.items():
                write_text(staging / name, text)
    if rank == 0 and keep:
        complete = [path for path in _by_step(Path(directory)) if not _absent(path)]
        for old in complete[:-keep]:
            if old != target:
                shutil.rmtree(old)
    barrier()
    return target


def find_latest(directory: str | Path) -> Path | None:
    """The checkpoint of the highest step in `directory`; None where there is none.

    Raises:
        InputError: that checkpoint lacks a file. It was complete when it got its name, so it has been damaged since.
    """
    named = _by_step(Path(directory))
    if not named:
        return None
    if absent := _absent(named[-1]):
        raise InputError(
            f"checkpoint {named[-1]} is damaged: it has no {', '.join(absent)}; delete it to continue from the one before, or "
            "name another with --checkpoint.resume"
        )
    return named[-1]


def saved_step(path: str | Path) -> int:
    """The step after which this checkpoint was written.

    Raises:
        InputError: not a complete checkpoint.
    """
    return _read_json(Path(path), "trainer.json")["step"]


def saved_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run that wrote this checkpoint.

    Raises:
        InputError: not a complete checkpoint.
    """
    return _read_json(Path(path), "config.json")


def load(path: str | Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore `model`, `optimizer` and this rank's random states in place; collective. The sharding may differ from the
    saved.

    Gradients are discarded. The optimizer keeps its options (learning rate, ...). A rank that the saving run did not
    have keeps its random states.

    Returns:
        `extra` as given to `save`.

    Raises:
        InputError: no complete checkpoint at `path`, a damaged one, or one of another model or optimizer (what differs
        is named).
    """
    path = Path(path)
    extra = _read_json(path, "trainer.json")["extra"]
    rank, _ = rank_and_size()
    try:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling a damaged file can raise anything
        raise InputError(f"checkpoint {path} is damaged: unreadable .metadata ({error!r}); use an older one") from error
    optimizer.zero_grad(set_to_none=True)
    tensors = _model_tensors(model)
    if any(name.startswith("optimizer.") for name in stored):
        # Creates zero state where there is none, by a step with zero gradients and learning rate.
        tensors |= _optimizer_tensors(model, optimizer)
    else:  # saved before the first step
        optimizer.state.clear()
    if problem := _mismatches(tensors, stored):
        raise InputError(f"checkpoint {path} is of another model: {problem}; use the options that it was made with")
    random_states = {name: state for name, state in _random_states(rank).items() if name in stored}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors | random_states, storage_reader=dcp.FileSystemReader(path))  # in place
    except CheckpointException as error:
        raise InputError(f"checkpoint {path} is damaged: {_cause(error)}; use an older one") from error
    _set_random_states(rank, random_states)
    return extra


def _mismatches(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> str:
    """How the tensors of all ranks together differ from the stored ones, in words, the same on every rank; collective.

    Ranks of a pipeline hold different ones. They exchange a bit for each stored name, not V3's 3,000 names.
    """
    shapes = {
        name: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in stored.items()
        if not name.startswith("rng.")
    }
    held = torch.tensor([name in tensors for name in shapes], dtype=torch.uint8)
    if dist.is_initialized():
        dist.all_reduce(held, dist.ReduceOp.MAX)  # over gloo: the host has the bits and needs them
    expected = dict(itertools.compress(shapes.items(), held.tolist()))
    for odd in gather_objects({name: tuple(t.shape) for name, t in tensors.items() if shapes.get(name) != tuple(t.shape)}):
        expected |= odd
    return mismatches(expected, shapes)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, as the tensors that the model holds (no copies)."""
    return {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """State per parameter name, as the tensors that the optimizer holds (no copies).

    They are loaded in place: `load_state_dict` would convert moments of another dtype to the parameter's.
    """
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    tensors = {f"optimizer.{name}": value for name, value in flat.items() if name.startswith("state.")}
    for name, value in tensors.items():
        assert isinstance(value, Tensor), f"{name} is a {type(value).__name__}; DCP would pickle it"
    return tensors


def _random_states(rank: int) -> dict[str, Tensor]:
    """This rank's generator states, uint8; names differ per rank, so that DCP keeps each."""
    states = {f"rng.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(rank: int, states: Mapping[str, Tensor]) -> None:
    if f"rng.{rank}.cpu" in states:
        torch.set_rng_state(states[f"rng.{rank}.cpu"])
    if f"rng.{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"rng.{rank}.cuda"])


def _by_step(directory: Path) -> list[Path]:
    """Directories named as checkpoints, by rising step."""
    if not directory.is_dir():
        return []
    steps = {int(match[1]): path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def _absent(path: Path) -> list[str]:
    """The files that a checkpoint lacks."""
    return [name for name in _FILES if not (path / name).is_file()]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"checkpoint {path} does not exist; give a directory such as CHECKPOINTS/step-00000100")
    if absent := _absent(path):
        raise InputError(f"{path} is not a complete checkpoint: it has no {', '.join(absent)}; use another one")
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"checkpoint {path} is damaged: {name} is not JSON ({error}); use an older one") from error


def _cause(error: CheckpointException) -> str:
    """The failing rank with the lowest number and what happened there, in one line."""
    rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(failure).__name__}: {failure}".splitlines()[0].removesuffix(": ")
