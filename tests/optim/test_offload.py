"""AdamW in host memory: every number is that of a run that keeps all on its CPU, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import config_for, full
from tests.tiny import write_conversations, write_tiny_model
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

STEPS = 4  # the third of them has a gradient that is not finite


def train(
    directory: str, output: str, offload: bool, start: int = 0, stop: int = STEPS, **sizes: Any
) -> dict[str, Any]:
    """Steps `start` + 1 to `stop` of 4, an evaluation between the first two, and a checkpoint.

    Returns:
        Numbers, and the whole weights and moments as far as this rank has the layers.
    """
    evaluated = (str(Path(directory) / "train.jsonl"),)
    config = config_for(directory, output=output, seq_len=128, eval=evaluated, **sizes)
    config.train.steps, config.train.freeze = STEPS, ("layers.1", "*.q_b_proj")
    config.optim.groups = ("experts:lr=2e-2,weight_decay=0",)
    config.optim.offload, config.data.workers = offload, 0
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)
        world.barrier()
        assert trainer.counters.step == start
        records = []
        for number in range(start, stop):
            if number == 2:  # of one rank; all skip the step
                spoil(trainer.model)
            records.append(trainer.train_step(next(trainer.loader))[0])
            if number == 0:
                trainer.evaluate()
        trainer.save()
        trainer.output.checkpointer.wait()
        if trainer.output.log:
            trainer.output.log.close()
        state = {name: full(t) for name, t in trainer.model.state_dict().items()}
        for name, parameter in trainer.model.named_parameters():
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                state[f"{name} {key}"] = full(value)
    numbers = [(r["loss"], r["grad_norm"], r["lr"]) for r in records]
    return {"numbers": numbers, "state": state, "skipped": trainer.counters.skipped}


def spoil(model: torch.nn.Module) -> None:
    """Let the next gradient of the last norm be infinite."""
    norm = model.model.norm if model.last else None
    if norm is not None:
        handle = norm.register_full_backward_hook(
            lambda *_: (handle.remove(), (_[1][0] * float("inf"),))[1]
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("offload")
    write_tiny_model(directory / "model")
    write_conversations(directory / "train.jsonl", 20)
    return directory
