"""Ranks that are killed at any moment: the run that continues is the run that was never
disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.kill import (
    assert_same_run,
    attend,
    options,
    steps_in,
    supervise,
    write_inputs,
)

ROOT = Path(__file__).parents[2]

# What a rank is doing when it is killed. "any" is a moment of the first seconds: loading, starting,
# anything.
PLAN = (
    ["step"] * 6
    + ["evaluation"] * 4
    + ["save"] * 3
    + ["writing"] * 4
    + ["publishing"] * 3
    + ["any"] * 3
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("kill"))


def test_a_run_whose_ranks_are_killed_more_than_twenty_times_ends_as_if_undisturbed(
    inputs, ranks, tmp_path
):
    """SIGKILL of a random rank at random moments of steps, evaluations, saves, writing beside
    training, and the export.
    """
    steps, log = 90, tmp_path / "log.txt"
    supervised = {"size": 2, "log": str(log)}
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    ((none, calls),) = ranks(
        1, supervise, argv=options(inputs, undisturbed, steps), plan=[], **supervised
    )
    assert none == []
    plan = [*random.Random(0).sample(PLAN, len(PLAN)), "export"]
    ((kills, _),) = ranks(
        1, supervise, argv=options(inputs, output, steps), plan=plan, calls=calls, **supervised
    )
    assert len(kills) == len(plan) > 20 and {kill.rank for kill in kills} == {0, 1}
    for phase in ("step", "evaluation", "save", "export"):
        assert phase in {kill.main for kill in kills}
    for phase in ("writing", "publishing"):  # beside training
        beside = [
            kill
            for kill in kills
            if kill.mode == "async" and kill.main in ("step", "between", "evaluation")
        ]
        assert phase in {kill.writer for kill in beside}
    assert "damaged" not in log.read_text()
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    # and nothing of the unfinished ones
    assert left == [f"step-{steps - 2:08d}", f"step-{steps:08d}"]
    assert_same_run(output, undisturbed, steps)


def test_torchrun_starts_a_killed_rank_again_and_the_run_continues_by_itself(
    inputs, ranks, tmp_path
):
    """`torchrun --max-restarts`: nobody intervenes, and the weights are those of the undisturbed
    run.
    """
    steps, output = 14, tmp_path / "run"
    run = {
        "argv": options(inputs, tmp_path / "undisturbed", steps),
        "log": str(tmp_path / "log.txt"),
    }
    assert ranks(1, attend, size=2, **run)[0][0] == [0, 0]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
    ]
    command += [str(ROOT / "recipes" / "deepseek_v3_sft.py"), *options(inputs, output, steps)]
    with open(tmp_path / "torchrun.txt", "w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 240
            while steps_in(output) < 5:
                assert process.poll() is None and time.monotonic() < deadline, (
                    tmp_path / "torchrun.txt"
                ).read_text()[-3000:]
                time.sleep(0.005)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            victim = next(
                pid
                for pid in children
                if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
            )
            os.kill(int(victim), signal.SIGKILL)
            process.wait(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "torchrun.txt").read_text()
    assert process.returncode == 0, text[-3000:]
    assert text.count("continuing from") == 1
    assert_same_run(output, tmp_path / "undisturbed", steps)
