"""An output that can no longer be written is told at once; the run stops or goes on, and the last
good checkpoint stays.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.distributed.kill import (
    Phases,
    assert_same_run,
    attend,
    options,
    steps_in,
    until,
    write_inputs,
)
from torchsft.checkpoint import state, writer
from torchsft.config import Config
from torchsft.output import RunOutput

STEPS = 14


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ranks):
    """Model, data, and the undisturbed run."""
    directory = write_inputs(tmp_path_factory.mktemp("faults"))
    log = str(directory / "log.txt")
    ((codes, _),) = ranks(
        1, attend, size=2, argv=options(directory, directory / "undisturbed", STEPS), log=log
    )
    assert codes == [0, 0], Path(log).read_text()[-3000:]
    return directory


def after_first_checkpoint(pids: list[int], phases: Phases, output: str, fault: str) -> None:
    """When a checkpoint is there and nothing is being written: the fault."""
    checkpoints = Path(output) / "checkpoints"

    def saved() -> bool:
        return (
            any(path.name.startswith("step-") for path in checkpoints.glob("*"))
            and phases.of(0)[1] == "idle"
        )

    until(saved, pids)
    if fault == "full":  # for rank 1 alone: no file longer than this
        resource.prlimit(pids[1], resource.RLIMIT_FSIZE, (50_000, 50_000))
    elif fault == "vanished":
        os.rename(output, output + "-elsewhere")
    else:  # vanished for a while
        os.rename(checkpoints, output + "-elsewhere")
        before = steps_in(Path(output))
        until(lambda: steps_in(Path(output)) >= before + 4, pids)
        os.rename(output + "-elsewhere", checkpoints)


@pytest.mark.parametrize(
    ("fault", "mode", "told"),
    [
        (
            "full",
            "async",
            "step-{step:08d} could not be written (rank 1: OSError: [Errno 27] File too large",
        ),
        (
            "full",
            "sync",
            "step-{step:08d} could not be written (rank 1: OSError: [Errno 27] File too large",
        ),
        ("vanished", "async", "metrics.jsonl cannot be written or has vanished"),
    ],
)
def test_stop_ends_the_run_within_a_step_and_keeps_the_last_checkpoint(
    inputs, ranks, tmp_path, fault, mode, told
):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {
        "size": 2,
        "argv": [*options(inputs, output, STEPS), "--checkpoint.mode", mode],
        "log": str(log),
    }
    ((codes, _),) = ranks(
        1, attend, deed=after_first_checkpoint, output=str(output), fault=fault, **run
    )
    if fault == "vanished":
        assert not output.exists()  # nothing has been made in its place
        os.rename(str(output) + "-elsewhere", output)
    assert codes[0] == 1 and codes[1] != 0, log.read_text()[-3000:]
    latest, passed_over = state.find_latest(output / "checkpoints")
    step = state.saved_step(latest)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert errors and told.format(step=step + 2) in errors[0]
    # The next save waits for the one that fails, and the step after it tells.
    assert passed_over == [] and step % 2 == 0 and steps_in(output) <= step + 5
    assert not [
        path.name
        for path in (output / "checkpoints").iterdir()
        if not path.name.startswith("step-")
    ]
    ((codes, _),) = ranks(1, attend, **run)  # mended
    assert codes == [0, 0], log.read_text()[-3000:]
    assert_same_run(output, inputs / "undisturbed", STEPS)


def test_continue_trains_on_with_warnings_and_fails_only_without_a_last_checkpoint(
    inputs, ranks, tmp_path
):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {
        "size": 2,
        "argv": [*options(inputs, output, STEPS), "--checkpoint.on-error", "continue"],
        "log": str(log),
    }
    ((codes, _),) = ranks(
        1, attend, deed=after_first_checkpoint, output=str(output), fault="full", **run
    )
    text = log.read_text()
    assert all(codes)  # the export fails on rank 1
    assert steps_in(output) == STEPS
    step = state.saved_step(state.find_latest(output / "checkpoints")[0])
    warned = [
        line
        for line in text.splitlines()
        if line.startswith("warning: ") and "could not be written" in line
    ]
    assert len(warned) == (STEPS - step) // 2  # each failed one, once
    assert f"(fault {len(warned)} of the output)" in warned[-1]
    # the export's error too, which met the same
    assert f"step-{STEPS:08d} could not be written" in text.split("error: ")[1]
    ((codes, _),) = ranks(1, attend, **run)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert_same_run(output, inputs / "undisturbed", STEPS)


def test_a_last_checkpoint_that_failed_is_an_error_even_if_all_else_is_well(
    inputs, ranks, tmp_path
):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    argv = options(
        inputs, output, STEPS, "--checkpoint.on-error", "continue", "--checkpoint.export", "none"
    )
    run = {"size": 2, "argv": argv, "log": str(log)}
    ((codes, _),) = ranks(
        1, attend, deed=after_first_checkpoint, output=str(output), fault="full", **run
    )
    assert codes[0] == 1 and codes[1] != 0
    assert f"step-{STEPS:08d} could not be written" in (text := log.read_text().split("error: ")[1])
    assert "it was the last one: mend that and run the same command again" in text


def test_continue_recovers_when_the_directory_comes_back(inputs, ranks, tmp_path):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {
        "size": 2,
        "argv": [*options(inputs, output, STEPS), "--checkpoint.on-error", "continue"],
        "log": str(log),
    }
    ((codes, _),) = ranks(
        1, attend, deed=after_first_checkpoint, output=str(output), fault="away", **run
    )
    assert codes == [0, 0], log.read_text()[-3000:]
    assert "warning: checkpoint" in log.read_text()
    assert_same_run(output, inputs / "undisturbed", STEPS)


def test_a_save_that_began_before_the_fault_was_told_ends_with_the_run(tmp_path, monkeypatch):
    """One process; the second save is still writing when the first one's failure is reported."""

    def full_disk(*_):
        time.sleep(0.3 * saves.index(checkpointer._current.step))
        raise OSError("disk full")

    saves = [2, 4]
    monkeypatch.setattr(writer, "write_archive", full_disk)
    alone = SimpleNamespace(writers=None, is_main=True)
    output = RunOutput(Config(output=str(tmp_path)), alone)
    checkpointer = output.checkpointer
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    for step in saves:
        output.save(step, model, optimizer, extra={}, score=None, last=False)
        output.collect_reports()
    output.save_failed = True
    with pytest.raises(OSError, match="step-00000002 could not be written"):
        output.report_saves()
    assert list((tmp_path / "checkpoints").iterdir()) == []
