"""A run that stopped and continued, on whatever ranks, is the run that did not stop."""

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

STEPS = 6


def train(
    directory: str, output: str, start: int, stop: int, mode: str = "sync", **sizes: Any
) -> dict[str, Any]:
    """Steps `start` + 1 to `stop` of 6 through the public pieces, with a checkpoint at `stop`.

    Where that is written beside training, a further step is trained meanwhile, as in a run that is
    killed there.
    """
    config = config_for(directory, output=output, **sizes)
    config.train.steps, config.checkpoint.mode = STEPS, mode
    # legs of one run prepare their data in different ways
    config.data.workers = {"sync": 0, "async": 3}[mode]
    config.router.bias_update_rate = 0.02
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        world.barrier()
        assert trainer.counters.step == start
        records, ids = [], []

        def take_step() -> None:
            step = next(trainer.loader)
            ids.append(step.sample_ids)
            record, scalars = trainer.train_step(step)
            records.append(record)
            if trainer.output.log:
                trainer.output.log.step(trainer.counters.step, record, scalars)

        while trainer.counters.step < stop:
            take_step()
        trainer.save()
        if mode == "async" and stop < STEPS:
            take_step()
        trainer.output.checkpointer.wait()
        if trainer.output.log:
            trainer.output.log.close()
        state = {name: full(t) for name, t in trainer.model.state_dict().items()}
        place = (world.data_rank, world.is_reader)
    numbers = [(r["loss"], r["grad_norm"], r["lr"]) for r in records[: stop - start]]
    return {"place": place, "numbers": numbers, "ids": ids[: stop - start], "state": state}


def stream(results: list[dict[str, Any]]) -> list[list[str]]:
    """The samples of each global batch, in order; peers that share rows read the same ones."""
    by_data_rank = {}
    for result in results:
        assert by_data_rank.setdefault(result["place"][0], result["ids"]) == result["ids"]
    parts = [by_data_rank[rank] for rank in sorted(by_data_rank)]
    return [[i for part in step for i in part] for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """40 conversations, 3 steps an epoch: the 6 steps cross an epoch boundary."""
    directory = tmp_path_factory.mktemp("resume")
    write_tiny_model(directory / "model")
    write_conversations(directory / "train.jsonl", 40)
    return directory


@pytest.fixture(scope="module")
def undisturbed(inputs, ranks):
    return ranks(
        4, train, directory=str(inputs), output=str(inputs / "whole"), ep=2, start=0, stop=STEPS
    )


# (ranks, layout)
ONE = (1, {})
DP2 = (2, {})
DP4 = (4, {})
DP4_EP2 = (4, {"ep": 2})
DP2_EP2 = (2, {"ep": 2})
DP4_EP4 = (4, {"ep": 4})
PP2_EP2 = (4, {"pp": 2, "ep": 2, "pp_schedule": "1F1B"})
PP2_TP2 = (4, {"pp": 2, "tp": 2, "pp_layers": (2, 1), "pp_schedule": "GPipe"})
HSDP_CP2 = (4, {"dp_replicate": 2, "cp": 2, "ep": 2})
TP2_EP4 = (4, {"tp": 2, "ep": 4})


@pytest.mark.parametrize(
    "legs",
    [
        # Each leg: the step at which it stops, its layout, its way of saving. An epoch ends at
        # steps 3 and 6.
        [(2, DP4_EP2, "async"), (STEPS, DP4_EP2, "sync")],
        [(3, DP4_EP2, "sync"), (4, DP4_EP2, "async"), (STEPS, DP4_EP2, "async")],
        [(2, DP4, "async"), (STEPS, DP2, "async")],
        [(2, PP2_EP2, "async"), (STEPS, DP4_EP4, "sync")],
        [(3, DP2_EP2, "async"), (5, TP2_EP4, "async"), (STEPS, PP2_EP2, "sync")],
        [(1, ONE, "async"), (4, HSDP_CP2, "sync"), (STEPS, PP2_TP2, "async")],
        [(4, PP2_TP2, "async"), (STEPS, ONE, "sync")],
    ],
    ids=lambda legs: " -> ".join(
        f"{stop}:{layout[0]}{layout[1]}" for stop, layout, _ in legs
    ).replace("'", ""),
)
def test_a_run_in_legs_is_the_run_in_one(inputs, ranks, undisturbed, tmp_path, legs):
    """The same samples in the same order; numbers and weights bit-identical on one layout, else to
    the order of fp32 sums.
    """
    run = {"directory": str(inputs), "output": str(tmp_path / "run")}
    start, numbers, ids = 0, [], []
    for stop, (size, layout), mode in legs:
        results = ranks(size, train, **run, **layout, start=start, stop=stop, mode=mode)
        numbers += results[0]["numbers"]
        ids += stream(results)
        start = stop
    assert ids == stream(undisturbed)
    exact = all(layout == DP4_EP2 for _, layout, _ in legs)
    expected = undisturbed[0]["numbers"]
    assert numbers == (expected if exact else [pytest.approx(step, rel=1e-5) for step in expected])
    state = {name: tensor for result in results for name, tensor in result["state"].items()}
    assert state.keys() == undisturbed[0]["state"].keys()
    for name, expected in undisturbed[0]["state"].items():
        torch.testing.assert_close(
            state[name], expected, rtol=0, atol=0 if exact else 2e-5, msg=name
        )
    lines = [
        json.loads(line) for line in Path(tmp_path, "run", "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_an_epoch_is_every_sample_once_whatever_happens(undisturbed):
    """What the streams above are compared with: 3 steps hold each of the 40 conversations once."""
    steps = stream(undisturbed)
    for epoch in (steps[:3], steps[3:]):
        ids = [i for step in epoch for i in step]
        assert len(ids) == len(set(ids)) == 40
    assert steps[:3] != steps[3:]
