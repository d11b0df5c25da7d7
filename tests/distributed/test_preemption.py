"""A run that is told to end (SIGTERM, SIGUSR1) saves and ends well; continued, it is the run that
was never told.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.kill import (
    Phases,
    assert_same_run,
    attend,
    options,
    records,
    steps_in,
    until,
    write_inputs,
)

ROOT = Path(__file__).parents[2]
STEPS = 14


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ranks):
    """Model, data, and the undisturbed run."""
    directory = write_inputs(tmp_path_factory.mktemp("preemption"))
    log = str(directory / "log.txt")
    ((codes, _),) = ranks(
        1, attend, size=2, argv=options(directory, directory / "undisturbed", STEPS), log=log
    )
    assert codes == [0, 0], Path(log).read_text()[-3000:]
    return directory


def send(
    pids: list[int], phases: Phases, output: str, number: int, to: list[int], phase: str
) -> None:
    """A signal to some ranks within `phase`, after three steps."""
    until(lambda: steps_in(Path(output)) >= 3 and phase in phases.of(to[0]), pids)
    for rank in to:
        os.kill(pids[rank], number)


@pytest.mark.parametrize(
    ("number", "to", "phase", "every"),
    [
        # as torchrun passes it on; nothing has been saved before
        (signal.SIGTERM, [0, 1], "step", 100),
        (signal.SIGINT, [0, 1], "step", 100),  # Ctrl-C
        (signal.SIGUSR1, [1], "step", 2),  # one rank alone: all learn of it
        (signal.SIGTERM, [0], "evaluation", 2),
        (signal.SIGTERM, [0, 1], "writing", 2),  # a checkpoint is being written
    ],
)
def test_the_step_is_finished_and_saved_and_the_same_command_continues(
    inputs, ranks, tmp_path, number, to, phase, every
):
    log, output = tmp_path / "log.txt", tmp_path / "run"
    run = {
        "size": 2,
        "argv": options(inputs, output, STEPS, "--checkpoint.every", str(every)),
        "log": str(log),
    }
    deed = {"output": str(output), "number": number, "to": to, "phase": phase}
    ((codes, seconds),) = ranks(1, attend, deed=send, **run, **deed)
    text = log.read_text()
    assert codes == [0, 0], text[-3000:]
    assert seconds < 25  # a step of a tenth of a second and its checkpoint; torchrun waits 30 s
    steps = steps_in(output)
    assert 3 <= steps < STEPS and not (output / "hf").exists()
    name = number.name if 0 in to else "a signal to another rank"
    assert text.count(f"{number.name}: this step is finished and saved, then the run ends") == (
        0 in to
    )
    assert (
        f"ended by {name}" in text and f"after step {steps} of {STEPS} and its checkpoint" in text
    )
    saved = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert saved[-1] == f"step-{steps:08d}"
    ((codes, _),) = ranks(1, attend, **run)
    assert codes == [0, 0], log.read_text()[-3000:]
    assert f"step-{steps:08d} at step {steps} of {STEPS}" in log.read_text()
    assert_same_run(output, inputs / "undisturbed", STEPS, evaluations=False)


def send_again(pids: list[int], phases: Phases, output: str) -> None:
    """Rank 1 stands still, so rank 0 waits for it in a collective: the first signals change
    nothing, a later one ends it.
    """
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


def send_at_once(pids: list[int], phases: Phases) -> None:
    """Ctrl-C while rank 0 tokenises and the others wait for it, or while they load; then they are
    alive for some seconds. Each is left to end by itself: `end` would send SIGTERM to the slower
    one, which on a busy machine has not yet heard its SIGINT.
    """
    time.sleep(1.0)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_ctrl_c_before_training_is_one_line(inputs, ranks, tmp_path):
    """Whatever the ranks are doing, in collectives too: no traceback of any."""
    log, output = tmp_path / "log.txt", tmp_path / "run"
    # So many rows that they are still being tokenised when the signal comes.
    message = {"role": "user", "content": "one two three"}
    rows = [{"messages": [message, {"role": "assistant", "content": str(n)}]} for n in range(30000)]
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps(row) for row in rows))
    more = ["--data.train", str(many), "--data.cache", str(tmp_path / "cache")]
    run = {
        "size": 2,
        "argv": [*options(inputs, output, STEPS), *more],
        "log": str(log),
    }
    ((codes, _),) = ranks(1, attend, deed=send_at_once, **run)
    text = log.read_text()
    assert codes == [130, 130], text[-3000:]
    assert text.count("interrupted; ") == 1 and "Traceback" not in text and "step" not in text


def test_ctrl_c_under_torchrun_saves_and_leaves_only_torchruns_own_traceback(inputs, tmp_path):
    """To the whole group of processes, as a terminal sends it."""
    output = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        str(ROOT / "recipes" / "deepseek_v3_sft.py"),
        *options(inputs, output, 5000, "--checkpoint.every", "5000"),
    ]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while steps_in(output) < 3:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[
                    -3000:
                ]
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text, steps = log.read_text(), steps_in(output)
    assert (
        f"after step {steps} of 5000 and its checkpoint; the same command continues from there"
        in text
    )
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert text.count("SIGINT: this step is finished and saved") == 1
    assert text.count("Traceback") == 1 and text.rstrip().endswith("got signal: 2")  # torchrun's
