"""A run that stopped and continued is the run that did not stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import config_for, full
from tests.tiny import write_conversations, write_tiny_model
from torchsft.parallel.world import World
from torchsft.trainer import Trainer


def train(directory: str, output: str, start: int, stop: int, **sizes: Any) -> dict[str, Any]:
    """Steps `start` + 1 to `stop` of 6 through the public pieces, with a checkpoint at `stop`."""
    config = config_for(directory, output=output, **sizes)
    config.train.steps = 6
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        world.barrier()
        assert trainer.step == start
        records, ids = [], []
        while trainer.step < stop:
            step = next(trainer.loader)
            ids += step.sample_ids if world.is_reader else []
            record, scalars = trainer.train_step(step)
            records.append(record)
            if trainer.log:
                trainer.log.step(trainer.step, record, scalars)
        trainer.save()
        if trainer.log:
            trainer.log.close()
        state = {name: full(t) for name, t in trainer.model.state_dict().items()}
    return {"losses": [r["loss"] for r in records], "norms": [r["grad_norm"] for r in records], "ids": ids, "state": state}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """40 conversations, 3 steps an epoch: the 6 steps cross an epoch boundary."""
    directory = tmp_path_factory.mktemp("resume")
    write_tiny_model(directory / "model")
    write_conversations(directory / "train.jsonl", 40)
    return directory


@pytest.fixture(scope="module")
def undisturbed(inputs, ranks):
    return ranks(4, train, directory=str(inputs), output=str(inputs / "whole"), ep=2, start=0, stop=6)


# (ranks, layout)
FSDP = (4, {"ep": 2})
PIPELINE = (4, {"pp": 2, "ep": 2, "pp_schedule": "1F1B"})


@pytest.mark.parametrize(
    ("before", "after", "exact"),
    [
        (FSDP, FSDP, True),
        (FSDP, (2, {"ep": 1}), False),
        ((1, {}), (4, {"ep": 4}), False),
        (PIPELINE, FSDP, False),
        ((4, {"tp": 2, "ep": 4}), PIPELINE, False),
        (
            (4, {"dp_replicate": 2, "cp": 2, "ep": 2}),
            (4, {"pp": 2, "tp": 2, "pp_layers": (2, 1), "pp_schedule": "GPipe"}),
            False,
        ),
    ],
)
def test_resume_continues_the_same_curve(inputs, ranks, undisturbed, tmp_path, before, after, exact):
    """Bit-identical on the same layout; on another one equal up to the order of fp32 sums."""
    run = {"directory": str(inputs), "output": str(tmp_path / "run")}
    first = ranks(before[0], train, **run, **before[1], start=0, stop=2)
    second = ranks(after[0], train, **run, **after[1], start=2, stop=6)
    losses = first[0]["losses"] + second[0]["losses"]
    norms = first[0]["norms"] + second[0]["norms"]
    if exact:
        assert losses == undisturbed[0]["losses"] and norms == undisturbed[0]["norms"]
    else:
        assert losses == pytest.approx(undisturbed[0]["losses"], rel=1e-5)
        assert norms == pytest.approx(undisturbed[0]["norms"], rel=1e-5)
    state = {name: tensor for r in second for name, tensor in r["state"].items()}
    for name, expected in undisturbed[0]["state"].items():
        torch.testing.assert_close(state[name], expected, rtol=0, atol=0 if exact else 2e-5, msg=name)
    assert sorted(i for r in first + second for i in r["ids"]) == sorted(i for r in undisturbed for i in r["ids"])
    lines = [json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
