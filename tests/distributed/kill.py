"""Plays torchrun for a run of the recipe, and kills: starts the ranks, SIGKILLs one at a random
moment, starts them again.

The ranks are forks of a process that has imported everything, so that a start costs a second
instead of ten. They publish what they are doing in shared memory. Long phases are hit at a random
time: the rank is stopped (SIGSTOP) before it is killed, so that what it was doing is known for
certain. Short ones are hit at a random Python call in them, however fast the machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from recipes import deepseek_v3_sft
from tests.tiny import write_conversations, write_tiny_model
from torchsft import evaluation, trainer
from torchsft.checkpoint import huggingface, state
from torchsft.interruption import run_main

# What the main thread of a rank does, and what the thread that writes checkpoints does ("sync": the
# main thread is that one).
MAIN = ("starting", "between", "step", "evaluation", "save", "export")
WRITER = ("idle", "writing", "publishing")
SHORT = ("save", "export", "writing", "publishing")


def write_inputs(directory: Path) -> Path:
    """A tiny model of two layers and few conversations: a step takes a tenth of a second."""
    write_tiny_model(directory / "model", num_hidden_layers=2)
    write_conversations(directory / "train.jsonl", 40)
    write_conversations(directory / "eval.jsonl", 6, seed=1)
    return directory


def options(inputs: Path, output: Path, steps: int, *more: str) -> list[str]:
    """Of a run that evaluates and saves every second step; `more` replaces what is said here."""
    own = [
        *("--model.path", str(inputs / "model"), "--data.train", str(inputs / "train.jsonl")),
        *(
            "--data.eval",
            str(inputs / "eval.jsonl"),
            "--data.seq-len",
            "192",
            "--train.steps",
            str(steps),
        ),
        *("--train.global-batch-size", "2", "--optim.lr", "1e-3", "--parallel.ep", "2"),
        *(
            "--checkpoint.every",
            "2",
            "--eval.every",
            "2",
            "--checkpoint.export",
            "fp32",
            "--metrics.no-tensorboard",
        ),
        *("--metrics.no-progress", "--output", str(output)),
    ]
    for name in set(more) & {option for option in own if option.startswith("--")}:
        at = own.index(name)
        del own[at : at + 2]
    return [*own, *more]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as torch's own reader gives them."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return tensors


def assert_same_run(
    output: Path,
    undisturbed: Path,
    steps: int,
    evaluations: bool = True,
    remote: Path | None = None,
) -> None:
    """Bit-identical weights and moments, the same export, and every step once in metrics.jsonl with
    the same numbers.

    Args:
        evaluations: whether the same steps were evaluated.
        remote: where `output`'s checkpoints and export are, if they are elsewhere.
    """
    name, saved = f"checkpoints/step-{steps:08d}", remote or output
    tensors, expected = stored(saved / name), stored(undisturbed / name)
    assert tensors.keys() == expected.keys() and any(
        name.startswith("optimizer.") for name in tensors
    )
    assert not [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    for file in (undisturbed / "hf").iterdir():
        assert (saved / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
    lines, wanted = (records(directory) for directory in (output, undisturbed))
    if not evaluations:
        lines, wanted = (
            [{k: v for k, v in line.items() if "eval" not in k} for line in all_]
            for all_ in (lines, wanted)
        )
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines == wanted


def records(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if "second" not in key and key != "data_wait_share"
        }
        for line in lines
    ]


@dataclass
class Kill:
    """A rank that was killed, and what it was doing."""

    rank: int
    main: str
    writer: str
    mode: str  # of the checkpoints: async or sync


class Phases:
    """What each rank is doing, and how many Python calls the short phases of rank 0 take; shared
    with forks.
    """

    def __init__(self, ranks: int) -> None:
        self._now = RawArray("q", 2 * ranks)
        self._calls = RawArray("q", len(SHORT))

    def of(self, rank: int) -> tuple[str, str]:
        return MAIN[self._now[2 * rank]], WRITER[self._now[2 * rank + 1]]

    @property
    def calls(self) -> dict[str, int]:
        return dict(zip(SHORT, self._calls, strict=True))

    def reset(self) -> None:
        self._now[:] = [0] * len(self._now)

    def around(
        self, rank: int, phase: str, function: Callable[..., Any], at: int
    ) -> Callable[..., Any]:
        """`function`, which publishes that this is `phase` and, at its `at`-th Python call (0:
        never), kills its process.
        """
        names, place = (MAIN, 2 * rank) if phase in MAIN else (WRITER, 2 * rank + 1)

        def phased(*args: Any, **kwargs: Any) -> Any:
            before, self._now[place] = self._now[place], names.index(phase)
            try:
                if phase not in SHORT:
                    return function(*args, **kwargs)
                with _counted(at) as calls:
                    result = function(*args, **kwargs)
                if rank == 0:  # the shortest pass
                    index = SHORT.index(phase)
                    self._calls[index] = min(self._calls[index] or calls[0], calls[0])
                return result
            finally:
                self._now[place] = before

        return phased


@contextmanager
def _counted(at: int) -> Iterator[list[int]]:
    calls, before = [0], sys.getprofile()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if before:  # a phase within a phase
            before(frame, event, argument)
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _rank(
    rank: int,
    size: int,
    port: int,
    argv: Sequence[str],
    log: Path,
    phases: Phases,
    trap: tuple[str, int],
) -> None:
    """Become a rank of the recipe; `trap` names a short phase (or none) and the call in it at which
    to die.
    """
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for owner, name, phase in (
        (trainer.Trainer, "train", "between"),
        (trainer.Trainer, "begin_step", "step"),
        (evaluation, "evaluate_loss", "evaluation"),
        (huggingface, "export", "export"),
        (state.Checkpointer, "save", "save"),
        (dcp, "save", "writing"),  # of this thread
        (dcp.state_dict_saver, "save", "writing"),  # of the thread that `async_save` starts
        (state.Checkpointer, "_end", "writing"),
        (state.PublishingWriter, "finish", "publishing"),  # rank 0 only
    ):
        at = trap[1] if trap[0] == phase else 0
        setattr(owner, name, phases.around(rank, phase, getattr(owner, name), at))
    sys.argv = ["deepseek_v3_sft.py", *argv]
    code = 1
    try:
        run_main(deepseek_v3_sft.main)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(
    size: int,
    argv: Sequence[str],
    log: Path,
    phases: Phases,
    traps: Mapping[int, tuple[str, int]] | None = None,
) -> list[int]:
    """Fork the ranks; their process ids."""
    phases.reset()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _rank(rank, size, port, argv, log, phases, (traps or {}).get(rank, ("", 0)))
        pids.append(pid)
    return pids


def end(pids: Sequence[int], grace: float = 5.0) -> list[int]:
    """Exit codes of the ranks; as soon as one is not 0, the others get SIGTERM and, after `grace`
    seconds, SIGKILL.
    """
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        alive = set(pids) - codes.keys()
        if any(codes.values()) and deadline is None:
            deadline = time.monotonic() + grace
            for pid in alive:
                os.kill(pid, signal.SIGTERM)
        elif deadline and time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def _ended(pids: Sequence[int]) -> bool:
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)


def _kill_in(
    phase: str, rank: int, draw: random.Random, pids: Sequence[int], phases: Phases
) -> tuple[str, str] | None:
    """Kill `rank` at a random moment of its next or second pass through `phase`, or ("any") of the
    next seconds.

    Returns:
        What it was doing; None where a rank ended before.
    """
    passes, inside = draw.randrange(1, 3), False
    while not _ended(pids):
        if phase == "any":
            time.sleep(draw.uniform(0.0, 1.5))
        else:
            before, inside = inside, phase in phases.of(rank)
            passes -= inside and not before
            if not inside or passes > 0:
                time.sleep(0.0002)
                continue
            time.sleep(draw.uniform(0.0, 0.02))
        os.kill(pids[rank], signal.SIGSTOP)
        change = os.waitid(os.P_PID, pids[rank], os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        doing = phases.of(rank)
        if change and change.si_code == os.CLD_STOPPED and (phase == "any" or phase in doing):
            os.kill(pids[rank], signal.SIGKILL)
            return doing
        os.kill(pids[rank], signal.SIGCONT)
    return None


def supervise(
    size: int,
    argv: Sequence[str],
    log: str,
    plan: Sequence[str],
    calls: Mapping[str, int] | None = None,
    seed: int = 0,
) -> tuple[list[Kill], dict[str, int]]:
    """Start the recipe again and again until it ends well; the first `len(plan)` times a rank is
    killed in that phase.

    Args:
        argv: of the recipe.
        log: file that receives what the ranks print.
        plan: names of phases, or "any" for any moment of the first seconds.
        calls: how many Python calls the short phases take, with asynchronous checkpoints; as an
            earlier run returned it.
        seed: of the kills.

    Raises:
        AssertionError: a rank ended with an error that is not a kill's.
    """
    draw, phases, kills = random.Random(seed), Phases(size), []
    for phase in [*plan, None]:
        mode = draw.choice(["async", "sync"]) if phase in ("step", "save", "any") else "async"
        rank, traps = draw.randrange(size) if phase != "publishing" else 0, {}
        if phase in SHORT:
            length = calls["save"] + calls["writing"] if mode == "sync" else calls[phase]
            traps[rank] = phase, draw.randrange(1, int(0.9 * length))
        pids = start(size, [*argv, "--checkpoint.mode", mode], Path(log), phases, traps)
        doing = None
        if traps:
            while not _ended(pids):
                time.sleep(0.002)
            trapped = os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOWAIT)
            doing = phases.of(rank) if trapped and trapped.si_code == os.CLD_KILLED else None
        elif phase:
            doing = _kill_in(phase, rank, draw, pids, phases)
        codes = end(pids)
        if doing is None:
            assert not any(codes), (
                f"ranks ended with {codes}, but none was killed:\n{Path(log).read_text()[-5000:]}"
            )
            break
        kills.append(Kill(rank, *doing, mode))
    assert doing is None, "the plan ended, but not the run"
    return kills, phases.calls


def attend(
    size: int,
    argv: Sequence[str],
    log: str,
    deed: Callable[..., Any] | None = None,
    **arguments: Any,
) -> tuple[list[int], float]:
    """Start the recipe once and call `deed(pids, phases, **arguments)` beside it.

    Returns:
        Exit codes of the ranks (minus the signal for a rank that was killed), and how long they
        went on after the deed.
    """
    phases = Phases(size)
    pids = start(size, argv, Path(log), phases)
    try:
        if deed:
            deed(pids, phases, **arguments)
    except BaseException:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    began = time.monotonic()
    return end(pids), time.monotonic() - began


def until(condition: Callable[[], bool], pids: Sequence[int]) -> None:
    """Wait for something while the ranks run."""
    while not condition():
        assert not _ended(pids), "a rank ended before"
        time.sleep(0.001)


def steps_in(output: Path) -> int:
    """Lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
