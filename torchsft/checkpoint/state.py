"""Training checkpoints: fp32 master weights, optimizer state, counters and random states, for any
layout.

    CHECKPOINTS/step-00000100/
        .metadata, __0_0.distcp, ...    DCP's format: `model.FQN`, `optimizer.state.FQN.NAME`,
                                        `rng.RANK.DEVICE`, tensors only
        trainer.json                    {"step", "extra", "score"}: counters and the data position
        config.json                     the run's resolved configuration
        checkpoint.json                 size and checksum of each file; written last

`torch.distributed.checkpoint` saves and loads them, with the planners, the stager, the writer and
the reader of this folder. A local directory with such a name is complete: it is written aside and
renamed when all ranks have finished. A remote one is written in place and complete when it has its
checkpoint.json.
"""

import itertools
import json
import math
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from torchsft.checkpoint.boxes import Box, local_box
from torchsft.checkpoint.hf_directory import mismatches
from torchsft.checkpoint.manifest import MANIFEST, incomplete
from torchsft.checkpoint.planning import (
    HostStager,
    OwnedPlanner,
    owned_items,
)
from torchsft.checkpoint.publish import (
    discard,
    read_lock,
    remove_unread,
)
from torchsft.checkpoint.reader import RangeReader
from torchsft.checkpoint.storage import Folder, in_one_line
from torchsft.checkpoint.writer import PublishingWriter, WriteError
from torchsft.config import InputError
from torchsft.models.decoder import local
from torchsft.parallel.collectives import gather_objects, patient, rank_and_size

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Report:
    """How a save ended; the same on every rank.

    Attributes:
        path: the checkpoint's.
        stall_seconds: how long training stood still on the slowest rank.
        write_seconds: from the copy to the end, beside training or not.
        bytes: of all files of all ranks.
        error: a sentence, if it could not be written; older checkpoints are untouched then.
    """

    step: int
    path: str
    stall_seconds: float
    write_seconds: float
    bytes: int
    error: str | None


@dataclass(frozen=True)
class _Save:
    """A save that goes on.

    Attributes:
        began: `time.perf_counter()` when training stopped for it.
        asynchronous: whether training went on when the copy was done.
    """

    step: int
    writer: PublishingWriter
    began: float
    asynchronous: bool
    ended: threading.Event = field(default_factory=threading.Event)


class Checkpointer:
    """Writes the checkpoints of a run; every rank has one, and writes its share.

    Args:
        directory: of the checkpoints, a path or URL; made if it is not there.
        mode: "async": a thread writes what `save` has copied to host memory, which is allocated
            once (pinned if there is CUDA); "sync": `save` returns when it is written, without a
            copy.
        if_busy: what `save` does while an older one is being written; skip: nothing.
        keep: how many of the newest checkpoints stay (0: all).
        keep_every: those whose step this divides stay too.
        keep_best: as do so many with the lowest scores.
        group: gloo, of all ranks, that nothing else uses; None: one process.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        mode: Literal["async", "sync"] = "async",
        if_busy: Literal["wait", "skip"] = "wait",
        keep: int = 0,
        keep_every: int = 0,
        keep_best: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.folder = Folder(directory)
        self._mode, self._if_busy = mode, if_busy
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._group = group
        self._rank, size = rank_and_size()
        assert group is not None or size == 1, "several ranks need a group for the writing thread"
        if self._rank == 0:
            self.folder.make()
        self._stager = HostStager()
        self._current: _Save | None = None
        self._reports: deque[Report] = deque()
        # of what this rank held when `_items` were computed
        self._held: dict[str, tuple[Box, torch.dtype]] = {}
        self._items: list[WriteItem] = []

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        extra: Mapping[str, Any],
        config: Mapping[str, Any],
        score: float | None = None,
        now: bool = False,
    ) -> bool:
        """Begin to write `directory/step-00000100` (for step 100; replaces an older one);
        collective. See `reports` for how it ends. The optimizer's options (learning rate, ...) are
        not saved: they follow from the configuration and the step.

        Args:
            extra: JSON-able counters and data position, equal on all ranks; `load` returns it.
            config: JSON-able resolved configuration.
            score: for `keep_best`, the lower the better.
            now: wait for an older save and write before returning, whatever the mode.

        Returns:
            False if it was skipped, on every rank.
        """
        began = time.perf_counter()
        score = None if score is None or math.isnan(score) else score
        trainer = {"step": step, "extra": dict(extra), "score": score}
        texts = {
            "trainer.json": json.dumps(trainer, indent=2),
            "config.json": json.dumps(dict(config), indent=2),
        }
        # An optimizer that has not stepped has nothing to save; asking for its state would create
        # one that has stepped.
        tensors = _tensors(model, optimizer if optimizer.state else None)
        tensors |= _random_states(self._rank)
        held = {name: (local_box(tensor), tensor.dtype) for name, tensor in tensors.items()}
        is_busy = self._current is not None and not self._current.ended.is_set()
        flags = gather_objects((is_busy, held != self._held))
        any_busy, any_changed = map(any, zip(*flags, strict=True))
        if any_busy and self._if_busy == "skip" and not now:
            return False
        self.wait()
        if any_changed:
            self._items, self._held = owned_items(tensors), held
        names = [item.index.fqn for item in self._items]
        owned = {name: local(tensors[name]).detach() for name in names}
        writer = PublishingWriter(self.folder.child(f"step-{step:08d}"), self._rank, texts)
        asynchronous = self._mode == "async" and not now
        self._write(_Save(step, writer, began, asynchronous), owned)
        return True

    def reports(self) -> list[Report]:
        """Return the reports of the saves that have ended on this rank since the last call. On
        other ranks that may be a moment sooner or later.
        """
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._current is not None:
            self._current.ended.wait()
            self._current = None

    def _write(self, save: _Save, owned: dict[str, Tensor]) -> None:
        """Let DCP write what this rank owns, or begin to."""
        _ignore_warning_of_one_process()
        arguments = {
            "storage_writer": save.writer,
            "planner": OwnedPlanner(self._items),
            "process_group": self._group,
        }
        if save.asynchronous:
            self._current = save
            future = dcp.async_save(owned, async_stager=self._stager, **arguments)
            future.add_done_callback(lambda future: self._end(save, future.exception()))
            return
        failure = None
        try:
            dcp.save(owned, **arguments)
        except (Exception, CheckpointException) as error:
            failure = error
        self._end(save, failure)

    def _end(self, save: _Save, failure: BaseException | None) -> None:
        """Note how a save ended, in the thread that wrote it."""
        try:
            if failure is not None and not isinstance(failure, CheckpointException):
                raise failure
            report = self._report(save, failure)
        except Exception as error:  # a rank has died: the collectives cannot go on
            report = self._own_report(save, f"{_unwritten(save)} ({in_one_line(error)})")
        self._reports.append(report)
        save.ended.set()

    def _report(self, save: _Save, failure: CheckpointException | None) -> Report:
        """Return the report of a save that has ended on all ranks; collective. Rank 0 first removes
        old checkpoints, or what a failed attempt left.
        """
        error = None
        if failure is not None:
            reason = _first_failure(failure)
            error = f"{_unwritten(save)} ({reason}); older ones are untouched"
        if self._rank == 0 and error is None:
            self._remove_old(save.writer.target)
        elif self._rank == 0:
            with suppress(Exception):
                discard(save.writer.folder)
        reports = gather_objects(self._own_report(save, error), self._group)
        stall = max(report.stall_seconds for report in reports)
        return replace(reports[0], stall_seconds=stall)

    def _own_report(self, save: _Save, error: str | None) -> Report:
        seconds = time.perf_counter() - save.began
        stall = self._stager.ended - save.began if save.asynchronous else seconds
        writing = seconds - stall if save.asynchronous else seconds
        size = 0 if error else save.writer.bytes
        return Report(save.step, str(save.writer.target), stall, writing, size, error)

    def _remove_old(self, newest: Folder) -> None:
        """Remove the complete checkpoints that no rule keeps; not `newest`, and none that is being
        read.
        """
        if not self._keep:
            return
        try:
            folders = _by_step(self.folder)
            complete = {step: folders[step] for step in folders if not incomplete(folders[step])}
            kept = self._kept_steps(complete)
            for step, folder in complete.items():
                if step not in kept and str(folder) != str(newest):
                    remove_unread(folder)
        except Exception as error:  # of whatever kind: the other ranks wait for this one
            warnings.warn(
                f"an old checkpoint in {self.folder} could not be removed ({error}); look at it",
                stacklevel=2,
            )

    def _kept_steps(self, complete: Mapping[int, Folder]) -> set[int]:
        """Return which steps stay of complete checkpoints by rising step."""
        kept = set(list(complete)[-self._keep :])
        if self._keep_every:
            kept |= {step for step in complete if step % self._keep_every == 0}
        if self._keep_best:
            scores = {
                step: json.loads(folder.read("trainer.json")).get("score")
                for step, folder in complete.items()
            }
            scored = sorted((score, -step) for step, score in scores.items() if score is not None)
            kept |= {-step for _, step in scored[: self._keep_best]}
        return kept


def _unwritten(save: _Save) -> str:
    return f"checkpoint {save.writer.target} could not be written"


def _first_failure(failure: CheckpointException) -> str:
    """Return what happened on the first rank that failed, in one line."""
    rank = min(failure.failures)
    error, _ = failure.failures[rank]
    return f"rank {rank}: {error if isinstance(error, WriteError) else in_one_line(error)}"


def _ignore_warning_of_one_process() -> None:
    """DCP warns of a save or load without a process group, which is as it should be here."""
    if not dist.is_initialized():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def find_latest(directory: str | Path) -> tuple[str | None, list[str]]:
    """Find the newest complete checkpoint in a directory or URL, by names and sizes of files.

    Returns:
        Its path, None where there is none, and a sentence for each newer one that is not complete.

    Raises:
        InputError: there are only damaged ones. (Remote ones that were never completed do not
            count.)
    """
    passed, damaged = [], False
    folders = _by_step(Folder(directory))
    for folder in reversed(folders.values()):
        problems = incomplete(folder)
        if not problems:
            return str(folder), passed
        never_completed = folder.remote and not folder.has(MANIFEST)
        damaged |= not never_completed
        fault = "was never completed" if never_completed else "is damaged"
        passed.append(f"checkpoint {folder} {fault}: {'; '.join(problems[:5])}")
    if damaged and _by_step(Folder(directory)).keys() != folders.keys():
        return find_latest(directory)  # another process has saved and removed meanwhile
    if damaged:
        raise InputError(
            f"{passed[0]}; there is no complete one before it: delete it to start anew, or name "
            "another with --checkpoint.resume"
        )
    return None, passed


def saved_step(place: str | Path) -> int:
    """Return the step after which a checkpoint was written.

    Raises:
        InputError: it is not complete.
    """
    return _read_json(Folder(place), "trainer.json")["step"]


def saved_config(place: str | Path) -> dict[str, Any]:
    """Return the resolved configuration of the run that wrote a checkpoint.

    Raises:
        InputError: it is not complete.
    """
    return _read_json(Folder(place), "config.json")


def load(place: str | Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore `model`, `optimizer` and this rank's random states in place; collective. The sharding
    may differ from the saved; each rank reads only the bytes of its shards. Gradients are
    discarded. The optimizer keeps its options (learning rate, ...), and a rank that the saving run
    did not have its random states.

    Returns:
        `extra` as given to `save`.

    Raises:
        InputError: the same on every rank: not complete, damaged, or of another model or optimizer
            (what differs is named).
    """
    folder = Folder(place)
    with ExitStack() as stack:
        with _raised_on_all_ranks():
            stack.enter_context(read_lock(folder))
            extra = _read_json(folder, "trainer.json")["extra"]
            reader = RangeReader(folder)
        optimizer.zero_grad(set_to_none=True)
        stepped = any(name.startswith("optimizer.") for name in reader.tensors)
        if not stepped:  # saved before the first step
            optimizer.state.clear()
        # Creates zero optimizer state where there is none, by a step with zero gradients and
        # learning rate.
        tensors = _tensors(model, optimizer if stepped else None)
        if problem := _mismatches(tensors, reader.tensors):
            raise InputError(
                f"checkpoint {folder} is of another model: {problem}; use the options "
                f"that it was made with"
            )
        random_states = _random_states(rank_and_size()[0])
        random_states = {name: s for name, s in random_states.items() if name in reader.tensors}
        _load_tensors(tensors | random_states, reader)
    for name, values in random_states.items():
        (torch.cuda if name.endswith("cuda") else torch).set_rng_state(values)
    return extra


def _load_tensors(tensors: dict[str, Tensor], reader: RangeReader) -> None:
    """Fill tensors and DTensors in place; collective. An InputError of one rank is raised on all of
    them.
    """
    _ignore_warning_of_one_process()
    for tensor in tensors.values():
        local_box(tensor)  # a TypeError: this rank's part is not one box
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with torch.no_grad(), patient():  # for those that read longest
            dcp.load(tensors, storage_reader=reader, planner=planner)
    except CheckpointException as failure:
        error, _ = failure.failures[min(failure.failures)]
        if isinstance(error, InputError):
            raise InputError(str(error)) from failure
        raise


@contextmanager
def _raised_on_all_ranks() -> Iterator[None]:
    """An InputError in here on one rank is raised on all of them; collective."""
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    if problem := next(filter(None, gather_objects(problem)), None):
        raise InputError(problem)


def _mismatches(tensors: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]) -> str:
    """Describe how the tensors of all ranks together differ from the stored ones, the same on
    every rank; collective. Ranks of a pipeline hold different ones: they exchange a byte for each
    stored name, not V3's 3,000 names.
    """
    shapes = {
        name: tuple(entry.size) for name, entry in stored.items() if not name.startswith("rng.")
    }
    odd = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if shapes.get(name) != tuple(tensor.shape)
    }
    expected = {}
    for held, more in gather_objects((bytes(name in tensors for name in shapes), odd)):
        expected |= dict(itertools.compress(shapes.items(), held)) | more
    return mismatches(expected, shapes)


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return parameters, persistent buffers and, per parameter name, the optimizer's state, as the
    tensors that the two hold (no copies), to be loaded in place: `load_state_dict` would convert
    moments of another dtype to the parameter's.
    """
    tensors = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    # All of a pipeline rank's part may be frozen: it has no moments, for which torch would raise.
    if optimizer is not None and any(group["params"] for group in optimizer.param_groups):
        flat = get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
        )
        tensors |= {
            f"optimizer.{name}": value for name, value in flat.items() if name.startswith("state.")
        }
    assert all(isinstance(value, Tensor) for value in tensors.values()), (
        "an optimizer whose state is not all tensors"
    )
    return tensors


def _random_states(rank: int) -> dict[str, Tensor]:
    """Return this rank's generator states, uint8; names differ per rank, so that each is kept."""
    states = {f"rng.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    return states


def _by_step(directory: Folder) -> dict[int, Folder]:
    """Folders named as checkpoints, by rising step."""
    found = {
        int(match[1]): directory.child(name)
        for name in directory.names()
        if (match := _NAME.fullmatch(name))
    }
    return dict(sorted(found.items()))


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    if not folder.names():
        raise InputError(
            f"checkpoint {folder} does not exist; give a directory such as "
            f"CHECKPOINTS/step-00000100"
        )
    if problems := incomplete(folder):
        raise InputError(
            f"{folder} is not a complete checkpoint: {'; '.join(problems[:5])}; use another one"
        )
    try:
        return json.loads(folder.read(name))
    except ValueError as error:
        raise InputError(
            f"checkpoint {folder} is damaged: {name} is not JSON ({error}); use an older one"
        ) from error
