"""A run that is told to end (SIGTERM, SIGUSR1) saves and ends well; continued, it is the run that was never told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.kill import Phases, assert_same_run, attend, options, records, steps_in, until, write_inputs

STEPS = 14


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ranks):
    """Model, data, and the undisturbed run."""
    directory = write_inputs(tmp_path_factory.mktemp("preemption"))
    log = str(directory / "log.txt")
    ((codes, _),) = ranks(1, attend, size=2, argv=options(directory, directory / "undisturbed", STEPS), log=log)
    assert codes == [0, 0], Path(log).read_text()[-3000:]
    return directory


def send(pids: list[int], phases: Phases, output: str, number: int, to: list[int], phase: str) -> None:
    """A signal to some ranks within `phase`, after three steps."""
    until(lambda: steps_in(Path(output)) >= 3 and phase in phases.of(to[0]), pids)
    for rank in to:
        os.kill(pids[rank], number)


@pytest.mark.parametrize(
    ("number", "to", "phase", "every"),
    [
        (signal.SIGTERM, [0, 1], "step", 100),  # as torchrun passes it on; nothing has been saved before
        (signal.SIGUSR1, [1], "step", 2),  # one rank alone: all learn of it
        (signal.SIGTERM, [0], "evaluation", 2),
        (signal.SIGTERM, [0, 1], "writing", 2),  # a checkpoint is being written
    ],
)
def test_the_step_is_finished_and_saved_and_the_same_command_continues(inputs, ranks, tmp_path, number, to, phase, every):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {"size": 2, "argv": [*options(inputs, output, STEPS), "--checkpoint.every", str(every)], "log": str(log)}
    deed = {"output": str(output), "number": number, "to": to, "phase": phase}
    ((codes, seconds),) = ranks(1, attend, deed=send, **run, **deed)
    text = log.read_text()
    assert codes == [0, 0], text[-3000:]
    assert seconds < 25  # a step of a tenth of a second and its checkpoint; torchrun waits 30 s
    steps = steps_in(output)
    assert 3 <= steps < STEPS and not (output / "hf").exists()
    name = number.name if 0 in to else "a signal to another rank"
    assert text.count(f"{number.name}: this step is finished and saved, then the run ends") == (0 in to)
    assert f"ended by {name}" in text and f"after step {steps} of {STEPS} and its checkpoint" in text
    saved = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert saved[-1] == f"step-{steps:08d}"
    ((codes, _),) = ranks(1, attend, **run)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert f"step-{steps:08d} at step {steps} of {STEPS}" in log.read_text()
    assert_same_run(output, inputs / "undisturbed", STEPS, evaluations=False)


def send_again(pids: list[int], phases: Phases, output: str) -> None:
    """Rank 1 stands still, so rank 0 waits for it in a collective: the first signals change nothing, a later one ends it."""
    until(lambda: steps_in(Path(output)) >= 3, pids)
    os.kill(pids[1], signal.SIGSTOP)
    for _ in range(3):  # Slurm and torchrun tell the same at the same time
        os.kill(pids[0], signal.SIGTERM)
    time.sleep(2.5)
    assert not os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
    os.kill(pids[0], signal.SIGTERM)
    assert os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT).si_status == 128 + signal.SIGTERM
    os.kill(pids[1], signal.SIGCONT)


def test_a_second_signal_ends_a_rank_at_once_even_in_a_collective(inputs, ranks, tmp_path):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {"size": 2, "argv": options(inputs, output, STEPS), "log": str(log)}
    ((codes, _),) = ranks(1, attend, deed=send_again, output=str(output), **run)
    assert codes[0] == 128 + signal.SIGTERM and codes[1] != 0
    assert log.read_text().count("SIGTERM after SIGTERM: ended at once") >= 1
    ((codes, _),) = ranks(1, attend, **run)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert_same_run(output, inputs / "undisturbed", STEPS)


def test_an_evaluation_that_a_signal_meets_is_finished(inputs, ranks, tmp_path):
    """Its result is in metrics.jsonl, and the checkpoint of its step is there."""
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {"size": 2, "argv": options(inputs, output, STEPS), "log": str(log)}
    deed = {"output": str(output), "number": signal.SIGUSR1, "to": [1], "phase": "evaluation"}
    ((codes, _),) = ranks(1, attend, deed=send, **run, **deed)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert "eval_loss" in records(output)[-1]
