"""Training checkpoints: fp32 master weights, optimizer state, counters and random states, for any
layout.

    CHECKPOINTS/step-00000100/
        .metadata, __0_0.distcp, ...    DCP's format: `model.FQN`, `optimizer.state.FQN.NAME`,
                                        `rng.RANK.DEVICE`, tensors only
        trainer.json                    {"step", "extra", "score"}: counters and the data position
        config.json                     the run's resolved configuration
        checkpoint.json                 size and checksum of each file; written last

A local directory with such a name is complete: it is written aside and renamed when all ranks have
finished. A remote one is written in place and complete when it has its checkpoint.json.
"""

import itertools
import json
import math
import re
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from torchsft.checkpoint.boxes import Box, local_box, share_out
from torchsft.checkpoint.dcp_files import (
    MANIFEST,
    ChunkReader,
    ChunkWriter,
    Stored,
    incomplete,
    write_manifest,
    write_metadata,
)
from torchsft.checkpoint.hf_directory import mismatches
from torchsft.checkpoint.publish import (
    discard,
    publish,
    reading,
    remove_unread,
    staging_of,
)
from torchsft.checkpoint.storage import Folder, told
from torchsft.config import InputError
from torchsft.models.decoder import local
from torchsft.parallel.collectives import gather_objects, rank_and_size

_NAME = re.compile(r"step-(\d{8,})")
_LEFT = re.compile(r"\.step-\d+\.(incomplete|removed)")
# name -> global shape, box that this rank holds, its values
Held = Mapping[str, tuple[tuple[int, ...], Box, Tensor]]


@dataclass(frozen=True)
class Report:
    """How a save ended; the same on every rank."""

    step: int
    path: str
    stall_seconds: float  # how long training stood still on the slowest rank
    write_seconds: float  # from the copy to the end, beside training or not
    bytes: int  # of all files of all ranks
    # a sentence, if it could not be written; older checkpoints are untouched then
    error: str | None


@dataclass(frozen=True)
class _Job:
    step: int
    tensors: Held  # what this rank writes
    texts: Mapping[str, str]  # by file name
    began: float
    stall: float | None  # seconds that training stood still; None: until the job is done
    error: str | None  # of the copy on this rank


class Checkpointer:
    """Writes the checkpoints of a run; every rank has one, and writes its share. If `mode` is
    "async", a thread writes what `save` has copied to host memory, which is allocated once (pinned
    if there is CUDA); "sync": `save` returns when it is written, without a copy.
    """

    def __init__(
        self,
        directory: str | Path,  # of the checkpoints, a path or URL; made if it is not there
        *,
        mode: Literal["async", "sync"] = "async",
        # what `save` does while an older one is being written; skip: nothing
        if_busy: Literal["wait", "skip"] = "wait",
        keep: int = 0,  # how many of the newest checkpoints stay (0: all)
        keep_every: int = 0,  # those whose step this divides stay too
        keep_best: int = 0,  # as do so many with the lowest scores
        # gloo, of all ranks, that nothing else uses; None: one process
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.folder = Folder(directory)
        self._mode, self._if_busy = mode, if_busy
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._group = group
        self._rank, self._size = rank_and_size()
        assert group is not None or self._size == 1, (
            "several ranks need a group for the writing thread"
        )
        if self._rank == 0:
            self.folder.make()
        self._thread: threading.Thread | None = None
        self._ended: deque[Report] = deque()
        self._held: dict[str, Box] = {}  # what `_owned` was computed for
        self._owned: set[str] = set()
        self._host: dict[str, Tensor] = {}

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        # JSON-able counters and data position, equal on all ranks; `load` returns it
        extra: Mapping[str, Any],
        config: Mapping[str, Any],  # JSON-able resolved configuration
        score: float | None = None,  # for `keep_best`, the lower the better
        now: bool = False,  # wait for an older save and write before returning, whatever the mode
    ) -> bool:
        """Begin to write `directory/step-00000100` (for step 100; replaces an older one);
        collective. `reports` tells the end. The optimizer's options (learning rate, ...) are not
        saved: they follow from the configuration and the step. Returns False if it was skipped, on
        every rank.
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
        tensors = _tensors(model, optimizer if optimizer.state else None) | _random_states(
            self._rank
        )
        held = {name: local_box(tensor) for name, tensor in tensors.items()}
        flags = self._thread is not None and self._thread.is_alive(), held != self._held
        busy, changed = map(any, zip(*gather_objects(flags), strict=True))
        if busy and self._if_busy == "skip" and not now:
            return False
        self.wait()
        if changed:
            self._owned, self._held = _choose_owned(held, tensors, self._rank), held
        mine = {
            name: (tuple(tensors[name].shape), held[name], local(tensors[name]))
            for name in held
            if name in self._owned
        }
        if now or self._mode == "sync":
            self._ended.append(self._write(_Job(step, mine, texts, began, None, None)))
            return True
        try:
            mine, error = self._copied(mine), None
        # no host memory; the others learn it when all write
        except (RuntimeError, MemoryError) as failure:
            mine, error = {}, told(failure)
        job = _Job(step, mine, texts, began, time.perf_counter() - began, error)
        self._thread = threading.Thread(
            target=lambda: self._ended.append(self._write(job)), daemon=True
        )
        self._thread.start()
        return True

    def reports(self) -> list[Report]:
        """Of the saves that have ended on this rank since the last call. On other ranks it may be a
        moment sooner or later.
        """
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copied(self, tensors: Held) -> Held:
        """The same with values in host memory, which is reused from save to save."""
        host = {}
        for name, (_, _, values) in tensors.items():
            old = self._host.get(name)
            if old is None or (old.shape, old.dtype) != (values.shape, values.dtype):
                old = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            host[name] = old.copy_(values.detach(), non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._host = host
        return {name: (shape, box, host[name]) for name, (shape, box, _) in tensors.items()}

    def _write(self, job: _Job) -> Report:
        """All ranks together: every rank its file, then rank 0 the rest. A failure on one rank is
        learned by all of them.
        """
        target = self.folder.child(f"step-{job.step:08d}")
        staging, problem, written, size, crc32 = staging_of(target), job.error, [], 0, 0
        try:
            try:
                if self._rank == 0 and not problem:
                    self._prepare(staging)
            except Exception as failure:
                problem = told(failure)
            if not any(gather_objects(problem, self._group)):
                try:
                    with ChunkWriter(staging, f"__{self._rank}_0.distcp") as writer:
                        for name, (shape, box, values) in job.tensors.items():
                            writer.write(name, shape, box, values)
                    written, size, crc32 = writer.written, writer.size, writer.crc32
                except Exception as failure:
                    problem = told(failure)
            record = problem, written, size, crc32, job.stall
            records = [record] * self._size if self._rank == 0 else None
            if self._size > 1:
                dist.gather_object(record, records, 0, group=self._group)
            return gather_objects(
                records and self._finish(job, staging, target, records), self._group
            )[0]
        except Exception as failure:  # a rank has died: the collectives cannot go on
            error = f"checkpoint {target} could not be written ({told(failure)})"
            return Report(
                job.step, str(target), job.stall or 0.0, time.perf_counter() - job.began, 0, error
            )

    def _prepare(self, staging: Folder) -> None:
        """An empty staging folder, in a directory that must still be there; what killed runs left
        is removed.
        """
        discard(staging)
        if staging.remote:
            staging.make()
            return
        for name in filter(_LEFT.fullmatch, self.folder.names()):
            self.folder.child(name).remove()
        staging.path.mkdir()

    def _finish(self, job: _Job, staging: Folder, target: Folder, records: list[Any]) -> Report:
        """On rank 0: the other files, the publication and the removal of old checkpoints, or the
        end of a failed attempt.
        """
        error = next(
            (f"rank {rank}: {record[0]}" for rank, record in enumerate(records) if record[0]), None
        )
        files = {
            f"__{rank}_0.distcp": (size, crc32)
            for rank, (_, _, size, crc32, _) in enumerate(records)
        }
        if error is None:
            try:
                written = [entry for record in records for entry in record[1]]
                elements = Counter()
                for name, shape, _, chunk in written:
                    elements[name, shape] += math.prod(chunk.box.shape)
                for (name, shape), held in elements.items():
                    if held != math.prod(shape):
                        raise RuntimeError(
                            f"the ranks hold {held} of the {math.prod(shape)} elements of {name}"
                        )
                outputs = {name: staging.write_text(name, text) for name, text in job.texts.items()}
                outputs[".metadata"] = write_metadata(staging, written)
                files |= {name: (out.size, out.crc32) for name, out in outputs.items()}
                write_manifest(staging, files)
                publish(staging, target)
            except Exception as failure:
                error = f"rank 0: {told(failure)}"
        if error is None:
            self._remove_old(target)
        else:
            with suppress(Exception):
                discard(staging)
            error = f"checkpoint {target} could not be written ({error}); older ones are untouched"
        seconds = time.perf_counter() - job.began
        stall = seconds if job.stall is None else max(record[-1] for record in records)
        total = 0 if error else sum(size for size, _ in files.values())
        return Report(job.step, str(target), stall, seconds - (job.stall or 0.0), total, error)

    def _remove_old(self, newest: Folder) -> None:
        """Remove the complete checkpoints that no rule keeps; not `newest`, and none that is being
        read.
        """
        if not self._keep:
            return
        try:
            complete = {
                step: folder
                for step, folder in _by_step(self.folder).items()
                if not incomplete(folder)
            }
            kept = set(list(complete)[-self._keep :])
            if self._keep_every:
                kept |= {step for step in complete if step % self._keep_every == 0}
            if self._keep_best:
                scores = {
                    step: json.loads(folder.read("trainer.json")).get("score")
                    for step, folder in complete.items()
                }
                scored = sorted(
                    (score, -step) for step, score in scores.items() if score is not None
                )
                kept |= {-step for _, step in scored[: self._keep_best]}
            for step, folder in complete.items():
                if step not in kept and str(folder) != str(newest):
                    remove_unread(folder)
        except Exception as error:  # of whatever kind: the other ranks wait for this one
            warnings.warn(
                f"an old checkpoint in {self.folder} could not be removed ({error}); look at it",
                stacklevel=2,
            )


def _choose_owned(held: Mapping[str, Box], tensors: Mapping[str, Tensor], rank: int) -> set[str]:
    """The tensors of which this rank writes its box; collective. Replicas share the work."""
    sizes = {
        name: (box, math.prod(box.shape) * tensors[name].dtype.itemsize)
        for name, box in held.items()
    }
    # of equal values one object, which pickle stores once
    once = {value: value for value in sizes.values()}
    holders: dict[tuple[str, Box], tuple[int, list[int]]] = {}
    for holder, entries in enumerate(
        gather_objects({name: once[value] for name, value in sizes.items()})
    ):
        for name, (box, size) in entries.items():
            holders.setdefault((name, box), (size, []))[1].append(holder)
    owners = share_out({key: holders[key] for key in sorted(holders, key=lambda key: key[0])})
    return {
        name for (name, box), owner in owners.items() if owner == rank and held.get(name) == box
    }


def find_latest(directory: str | Path) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint in a directory or URL, by names and sizes of files, and a
    sentence for each newer one that
    is not complete. An InputError: there are only damaged ones. (Remote ones that were never
    completed do not count.)
    """
    passed, damaged = [], False
    for folder in reversed(_by_step(Folder(directory)).values()):
        if not (problems := incomplete(folder)):
            return str(folder), passed
        never_completed = folder.remote and not folder.has(MANIFEST)
        damaged |= not never_completed
        fault = "was never completed" if never_completed else "is damaged"
        passed.append(f"checkpoint {folder} {fault}: {'; '.join(problems[:5])}")
    if damaged:
        remedy = "delete it to start anew, or name another with --checkpoint.resume"
        raise InputError(f"{passed[0]}; there is no complete one before it: {remedy}")
    return None, passed


def saved_step(place: str | Path) -> int:
    """The step after which this checkpoint was written. Raises InputError where it is not
    complete.
    """
    return _read_json(Folder(place), "trainer.json")["step"]


def saved_config(place: str | Path) -> dict[str, Any]:
    """The resolved configuration of the run that wrote this checkpoint. Raises InputError where it
    is not complete.
    """
    return _read_json(Folder(place), "config.json")


def load(place: str | Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore `model`, `optimizer` and this rank's random states in place; collective. The sharding
    may differ from the saved; each rank reads only the bytes of its shards. Gradients are
    discarded. The optimizer keeps its options (learning rate, ...), and a rank that the saving run
    did not have its random states. Returns `extra` as given to `save`. An InputError, the same
    on every rank: not complete, damaged, or of another model or optimizer (what differs is
    named).
    """
    folder = Folder(place)
    with ExitStack() as stack:
        with _agreed():
            stack.enter_context(reading(folder))
            extra = _read_json(folder, "trainer.json")["extra"]
            reader = ChunkReader(folder)
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
        random_states = {
            name: s
            for name, s in _random_states(rank_and_size()[0]).items()
            if name in reader.tensors
        }
        with _agreed(), torch.no_grad():
            for name, tensor in (tensors | random_states).items():
                local(tensor).copy_(reader.read(name, local_box(tensor)))
    for name, values in random_states.items():
        (torch.cuda if name.endswith("cuda") else torch).set_rng_state(values)
    return extra


@contextmanager
def _agreed() -> Iterator[None]:
    """An InputError in here on one rank is raised on all of them; collective."""
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    if problem := next(filter(None, gather_objects(problem)), None):
        raise InputError(problem)


def _mismatches(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> str:
    """How the tensors of all ranks together differ from the stored ones, in words, the same on
    every rank; collective. Ranks of
    a pipeline hold different ones: they exchange a byte for each stored name, not V3's 3,000
    names.
    """
    shapes = {name: entry.shape for name, entry in stored.items() if not name.startswith("rng.")}
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
    """Parameters, persistent buffers and, per parameter name, the optimizer's state, as the tensors
    that the two hold (no copies), to be loaded in place: `load_state_dict` would convert moments of
    another dtype to the parameter's.
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
    """This rank's generator states, uint8; names differ per rank, so that each is kept."""
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
