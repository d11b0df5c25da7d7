"""Checkpoints and export at a URL: the run is the one that writes to a directory, killed and
continued too.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import fsspec
import pytest
import torch

from recipes import deepseek_v3_sft
from tests.distributed.kill import (
    assert_same_run,
    attend,
    options,
    steps_in,
    supervise,
    write_inputs,
)
from torchsft.config import InputError
from torchsft.trainer import Trainer

STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, ranks):
    """Model, data, and the run that writes to a directory."""
    directory = write_inputs(tmp_path_factory.mktemp("remote"))
    log = str(directory / "log.txt")
    ((codes, _),) = ranks(
        1, attend, size=2, argv=options(directory, directory / "undisturbed", STEPS), log=log
    )
    assert codes == [0, 0], Path(log).read_text()[-3000:]
    return directory


def test_file_urls_on_two_ranks_with_kills_while_saving(inputs, ranks, tmp_path):
    output, remote = tmp_path / "run", tmp_path / "bucket"
    argv = [
        *options(inputs, output, STEPS),
        "--checkpoint.remote",
        f"file://{remote}",
        "--checkpoint.keep",
        "1",
    ]
    # about; the killed one is in the first half
    calls = {"save": 500, "writing": 1000, "publishing": 1000}
    log = tmp_path / "log.txt"
    plan = ["writing", "publishing", "save", "publishing"]
    ((kills, _),) = ranks(1, supervise, size=2, argv=argv, log=str(log), plan=plan, calls=calls)
    assert len(kills) == len(plan)
    assert sorted(path.name for path in (remote / "checkpoints").iterdir()) == [f"step-{STEPS:08d}"]
    assert not (output / "checkpoints").exists() and not (output / "hf").exists()
    assert_same_run(output, inputs / "undisturbed", STEPS, remote=remote)


def in_memory(argv: list[str], output: str, copy: str) -> None:
    """On one rank: train to step 5, continue from memory:// to the end, and copy what is there to
    `copy`.
    """
    begin_step = Trainer.begin_step

    def step_and_signal(self, *arguments):
        if self.counters.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return begin_step(self, *arguments)

    sys.argv = ["deepseek_v3_sft.py", *argv]
    Trainer.begin_step = step_and_signal
    deepseek_v3_sft.main()
    assert steps_in(Path(output)) in (5, 6)  # the listening thread may hear of it a moment later
    Trainer.begin_step = begin_step
    for other, found in (
        (argv[: argv.index("--checkpoint.remote")], "memory://bucket/run/checkpoints"),
        (argv, None),
    ):
        sys.argv = ["deepseek_v3_sft.py", *other]
        if found:
            with pytest.raises(
                InputError,
                match=f"has checkpoints in {found}, but none in .*--checkpoint.resume "
                f"{found}/step-",
            ):
                deepseek_v3_sft.main()
            torch.distributed.destroy_process_group()
        else:
            deepseek_v3_sft.main()
    memory = fsspec.filesystem("memory")
    memory.get("/bucket/run/", copy, recursive=True)


def test_memory_urls_on_one_rank(inputs, ranks, tmp_path):
    output, copy = tmp_path / "run", tmp_path / "copy"
    base = [*options(inputs, tmp_path / "undisturbed", STEPS), "--train.micro-batch-size", "2"]
    base[base.index("--parallel.ep") + 1] = "1"
    assert ranks(1, attend, size=1, argv=base, log=str(tmp_path / "log.txt"))[0][0] == [0]
    argv = [*base, "--checkpoint.remote", "memory://bucket/run"]
    argv[argv.index("--output") + 1] = str(output)
    ranks(1, in_memory, argv=argv, output=str(output), copy=str(copy))
    assert_same_run(output, tmp_path / "undisturbed", STEPS, evaluations=False, remote=copy)
