"""What a run says of its memory."""

import json
import os
import signal
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from recipes import deepseek_v3_sft
from tests.tiny import tiny_config
from tools.published import model_config
from torchsft.config import InputError
from torchsft.planning import announce
from torchsft.planning.announce import (
    MOST_PASSES,
    Planned,
    _own,
    describe_planned,
    describe_used,
)
from torchsft.planning.memory import Memory


def said_by_dry_run(options, available, environment):
    """What --dry-run prints and how it ends, on a GPU of so many bytes."""
    printed = []
    with (
        patch("sys.argv", ["recipe", *options, "--dry-run"]),
        patch.dict("os.environ", environment),
        patch.object(announce, "device_bytes", lambda _: available),
        patch.object(announce, "print", lambda text, **_: printed.append(text), create=True),
    ):
        for name in () if environment else ("WORLD_SIZE",):
            del announce.os.environ[name]
        try:
            deepseek_v3_sft.main()
        except InputError as error:
            return printed, str(error)
    return printed, None


@pytest.fixture
def model(tmp_path):
    """A directory with nothing but config.json."""
    config = tiny_config().to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_dry_run_says_what_each_kind_of_pipeline_rank_holds(ranks, model, tmp_path):
    """Of a directory with config.json alone; nothing is written."""
    options = ["--model.path", model, "--parallel.pp", "3", "--parallel.pp-schedule", "1F1B"]
    options += ["--train.global-batch-size", "12", "--output", str(tmp_path / "run")]
    arguments = {"options": options, "environment": {}}
    ((printed, refused),) = ranks(1, said_by_dry_run, **arguments, available=None)
    assert refused is None and printed[0].startswith("memory planned for 3 ranks")
    assert [line.split(":")[0] for line in printed[1:4]] == [f"pipeline rank {n}" for n in range(3)]
    assert printed[4].endswith("there is no GPU here to compare with")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_more_ranks_compares_with_the_gpu(ranks, model):
    arguments = {"options": ["--model.path", model], "environment": {"WORLD_SIZE": "8"}}
    ((printed, refused),) = ranks(1, said_by_dry_run, **arguments, available=84_900_000_000)
    assert refused is None and printed[0].startswith("memory planned for 8 ranks")
    assert printed[-1].endswith("the GPU has 84.9 GB: it fits")
    ((_, refused),) = ranks(1, said_by_dry_run, **arguments, available=10**9)
    assert "needed: 5.5 GB" in refused and "but the GPU has 1.0 GB; raise" in refused


def test_a_dry_run_needs_a_config(ranks):
    arguments = {"options": ["v3_256"], "environment": {}}
    ((_, refused),) = ranks(1, said_by_dry_run, **arguments, available=None)
    assert refused.startswith("--dry-run reads the model's config.json: give --model.path")


def test_what_takes_long_is_not_planned_when_a_run_starts():
    config = deepseek_v3_sft.v3_64()
    config.train.activation_checkpointing = "stream"
    said = describe_planned(_own(config, model_config("v3_64"), 64))
    assert f"more than {MOST_PASSES}, take long); --dry-run plans it" in said


def test_planning_ends_where_the_run_has(monkeypatch):
    """Also with more to say than a pipe holds."""
    monkeypatch.setattr(announce, "_own", lambda *_: "x" * 10**6)
    child = Planned(None, dict, 1)
    os.close(child.reading)
    for _ in range(100):
        if os.waitpid(child.child, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.kill(child.child, signal.SIGKILL)
    os.waitpid(child.child, 0)
    raise AssertionError("it waits for a run that has ended")


def test_a_plan_that_is_cut_off_ends_no_run(monkeypatch):
    """A child that dies while it writes, for lack of memory say."""

    class DiesInTheMiddle:
        def __reduce__(self):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(announce, "_quietly", lambda *_: ["x" * 10**6, DiesInTheMiddle()])
    assert Planned(None, dict, 1).result() == "its process was ended or took long"


def test_what_a_gpu_has_held_stands_beside_what_was_planned():
    """The most over the ranks, of which only those of pipeline rank 0 have been planned."""
    of_ranks = [(0, 50e9, 52e9), (0, 51e9, 53e9), (1, 60e9, 65e9)]
    world = SimpleNamespace(
        device=torch.device("cuda"), dense=SimpleNamespace(get_local_rank=lambda _: 0)
    )
    planned = Memory(0, {"gradients": 20_000_000_000, "optimizer": 29_500_000_000}, 0, [])
    with (
        patch.object(announce, "gather_objects", lambda _: of_ranks),
        patch.object(torch.cuda, "max_memory_allocated", lambda _: 0),
        patch.object(torch.cuda, "max_memory_reserved", lambda _: 0),
    ):
        said = describe_used(planned, None, None, world)
    assert said == (
        "memory used, at most: 51.0 GB allocated on pipeline rank 0 (49.5 GB planned), 60.0 GB on "
        "any rank; 65.0 GB reserved on any"
    )
