"""Where the host of a rank waits for the device in a training step: once per MoE layer and
microbatch in the forward pass, and nowhere else.
"""

import gc
import itertools
import json
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import SilentTrainer, config_for
from tests.tiny import write_conversations, write_tiny_model
from tools.benchmark_waits import Waits
from torchsft.config import Config
from torchsft.garbage import Collector
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

MOE_LAYERS = 2  # of the tiny model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("waits")
    write_tiny_model(directory / "model")
    write_conversations(directory / "train.jsonl", 40)
    return directory


def test_the_counter_sees_whatever_reads_a_tensor():
    x = torch.arange(4.0)
    mask = x > 1

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * grad.item()

    def write(target: torch.Tensor) -> None:
        target[mask] = torch.ones(2)

    waits = [
        lambda: x[0].item(),
        lambda: float(x[0]),
        lambda: int(x[0]),
        lambda: bool(x[0] > 0),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: write(x.clone()),
        lambda: x.unique(),
        lambda: x.long().bincount(),
        lambda: torch.equal(x, x),
        lambda: x.repeat_interleave(mask.long()),
        lambda: torch.tensor([1.0], device=x.device),
        lambda: x.new_tensor([1.0]),
        lambda: Backward.apply(torch.ones((), requires_grad=True)).backward(),
    ]
    others = [
        lambda: x.repeat_interleave(mask.long(), output_size=2),
        lambda: x.to("cpu", non_blocking=True),
        lambda: x[x.long()],
        lambda: torch.where(mask, x, 0).sum(),
        lambda: torch.zeros(3, device=x.device),
    ]
    for calls, expected in ((waits, 1), (others, 0)):
        for number, call in enumerate(calls):
            with Waits() as found:
                call()
            assert found.found.total() == expected, number


def waits_of_a_step(config: Config) -> dict[tuple[str, str], int]:
    """The waits of a step, and whether it leaves tensors that only the garbage collector frees:
    between its runs they would fill the device.
    """
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        trainer.train_step(next(trainer.loader))
        step = next(trainer.loader)
        gc.collect()
        gc.disable()
        with Waits() as waits:
            trainer.train_step(step)
        del step
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, torch.Tensor)]
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left, [tuple(tensor.shape) for tensor in left]
    return dict(waits.of_device())


def sizes(**changes: Any) -> dict[str, Any]:
    return {"micro_batch_size": 2, "seq_len": 128, "activation_checkpointing": "full"} | changes


def test_one_rank_waits_for_nothing(inputs):
    """With the bias of routers moving, and both losses of routing."""
    config = config_for(str(inputs), ep=1, **sizes())
    config.router.bias_update_rate, config.router.aux_loss, config.router.z_loss = 0.01, 0.1, 0.1
    assert waits_of_a_step(config) == {}


@pytest.mark.parametrize("layout", [{"ep": 2}, {"pp": 2, "pp_schedule": "1F1B"}], ids=str)
def test_the_host_waits_once_per_moe_layer_and_microbatch(inputs, ranks, layout):
    """For the sizes of the all-to-all; with 2 ranks, each of which has 4 rows of a step."""
    config = config_for(str(inputs), global_batch_size=8, **sizes(**layout))
    expected = {("forward", "parallel/expert.py told"): MOE_LAYERS * 2} if "ep" in layout else {}
    assert ranks(2, waits_of_a_step, config=config) == [expected] * 2


@pytest.mark.parametrize("evaluate_every", [0, 2])
def test_results_are_read_behind_the_next_backward_pass_or_where_an_evaluation_is_due(
    inputs, tmp_path, evaluate_every
):
    config = config_for(str(inputs), ep=1, output=str(tmp_path / "run"), **sizes())
    config.train.steps, config.eval.every = 4, evaluate_every
    config.data.eval = (str(inputs / "train.jsonl"),) if evaluate_every else ()
    order: list[str] = []
    with World(config.parallel, 0) as world:
        trainer = Trainer(config, world)

        def noting(owner: Any, name: str) -> None:
            function = getattr(owner, name)

            def noted(*arguments: Any) -> Any:
                order.append(name)
                return function(*arguments)

            setattr(owner, name, noted)

        noting(trainer.pipeline, "step")
        noting(trainer, "update_weights")
        noting(trainer, "read_step")
        trainer.run()
        counters = trainer.counters
    first, later = ["step", "update_weights"], ["step", "read_step", "update_weights"]
    if evaluate_every:
        expected = [first, later, ["read_step"], first, later, ["read_step"]]
    else:
        expected = [first, later, later, later, ["read_step"]]
    assert order == [*itertools.chain(*expected)]
    assert (counters.step, counters.updates, counters.skipped) == (4, 4, 0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    evaluated = [record["step"] for record in records if "eval_loss" in record]
    assert evaluated == ([2, 4] if evaluate_every else [])
    assert gc.isenabled()


def test_garbage_is_collected_at_chosen_steps_alone_and_as_before_afterwards(monkeypatch):
    collected = []
    with Collector(3) as collector:
        assert not gc.isenabled()
        monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
        for step in range(1, 8):
            collector.behind_step(step, pause=step == 5)
    assert collected == [3, 5, 6]
    assert gc.isenabled() and not gc.get_freeze_count()
    with Collector(0) as collector:
        collector.behind_step(3, pause=True)
        assert gc.isenabled() and collected == [3, 5, 6]
    gc.disable()
    with Collector(3):
        pass
    assert not gc.isenabled()
    gc.enable()


@pytest.mark.gpu
def test_on_a_gpu_no_call_of_a_step_synchronises(inputs):
    """torch raises where one would. Never run so far."""
    config = config_for(str(inputs), ep=1, compute="bf16", **sizes())
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        trainer.train_step(next(trainer.loader))
        for _ in range(2):
            step = next(trainer.loader)
            batch = trainer.count(step)
            torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.begin_step(step, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        record, _ = trainer.read_step(trainer.taken)
    assert record["step_seconds"] > 0
