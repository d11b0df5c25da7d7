"""AdamW in host memory: every number is that of a run that keeps all on its CPU, bit by bit."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import SilentTrainer, config_for
from tests.tiny import write_conversations, write_tiny_model
from torchsft.config import InputError, Train
from torchsft.models.decoder import local
from torchsft.parallel import memory
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

STEPS = 4  # the third of them has a gradient that is not finite
WHOLE = [("resident", False, STEPS), ("offloaded", True, STEPS)]
LEGS = [("legs", False, 1), ("legs", True, 3), ("legs", False, STEPS)]


def train(
    directory: str,
    runs: list[tuple[str, bool, int]],
    export: str,
    resume: str = "auto",
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Runs on the calling ranks, one after the other: microbatches, clipping, frozen parameters, a
    group, an evaluation behind the first step, with an `export` a checkpoint too.

    Args:
        runs: of each: its output, whether it is offloaded, and the step at which it stops.
        export: "none" or a dtype.
        resume: checkpoint with which they begin.

    Returns:
        Of each: numbers of its steps, and this rank's parts of weights and moments.
    """
    evaluated = (str(Path(directory) / "train.jsonl"),)
    sizes |= {"seq_len": 128, "global_batch_size": 4, "eval": evaluated}
    base = config_for(directory, **sizes)
    base.train.steps, base.train.freeze = STEPS, ("layers.1", "*.q_b_proj")
    base.optim.groups = ("experts:lr=2e-2,weight_decay=0",)
    base.data.workers, base.checkpoint.mode = 0, "sync"
    base.checkpoint.export, base.checkpoint.resume, base.checkpoint.keep = export, resume, 0
    results = []
    with World(base.parallel, 0) as world:
        for output, offload, stop in runs:
            config = copy.deepcopy(base)
            config.output, config.optim.offload = str(Path(directory) / output), offload
            results.append(run(Trainer(config, world), stop))
            world.barrier()
    return results


def run(trainer: Trainer, stop: int) -> dict[str, Any]:
    records = []
    while trainer.counters.step < stop:
        if trainer.counters.step == 2 and trainer.model.last:  # one rank's: all skip the step
            spoil(trainer.model.model.norm)
        records.append(trainer.train_step(next(trainer.loader))[0])
        if trainer.counters.step == 1:
            trainer.evaluate()
    if trainer.config.checkpoint.export != "none":
        trainer.save()
        trainer.export("hf")
        trainer.output.checkpointer.wait()
    if trainer.output.log:
        trainer.output.log.close()
    state = {name: local(t).detach().clone() for name, t in trainer.model.state_dict().items()}
    moved = 0
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            state[f"{name} {key}"] = local(value).clone()
            moved += key == "step"
    numbers = [(r["loss"], r["grad_norm"], r["lr"]) for r in records]
    counters = (trainer.counters.updates, trainer.counters.skipped, moved)
    return {"numbers": numbers, "state": state, "counters": counters}


def spoil(norm: torch.nn.Module) -> None:
    """Make the next gradient behind a norm infinite."""

    def once(_: Any, inputs: Any, __: Any) -> tuple[torch.Tensor]:
        handle.remove()
        return (inputs[0] * torch.inf,)

    handle = norm.register_full_backward_hook(once)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("offload")
    write_tiny_model(directory / "model", num_hidden_layers=4)
    write_conversations(directory / "train.jsonl", 20)
    return directory


def check(a: list[dict], b: list[dict]) -> None:
    """Two runs, as all ranks see them, are equal: numbers as text, since one is nan."""
    for one, other in zip(a, b, strict=True):
        assert str(one["numbers"]) == str(other["numbers"])
        assert "nan" in str(one["numbers"])
        assert one["counters"] == other["counters"] and one["counters"][:2] == (3, 1)
        assert one["state"].keys() == other["state"].keys()
        assert any(name.endswith("exp_avg_sq") for name in one["state"])
        for name, values in one["state"].items():
            assert values.dtype == torch.float32
            assert torch.equal(values, other["state"][name]), name


def check_exports(inputs: Path, *exports: str) -> None:
    one, other = (sorted((inputs / name / "hf").glob("*.safetensors")) for name in exports)
    assert one and [f.read_bytes() for f in one] == [f.read_bytes() for f in other]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (1, {"compute": "bf16"}),
        (2, {"dp_replicate": 2, "dp_shard": 1}),
        (2, {"pp": 2, "pp_schedule": "Interleaved1F1B"}),
        (2, {"tp": 2}),
    ],
    ids=str,
)
def test_an_offloaded_run_is_the_resident_one(inputs, ranks, n, sizes):
    runs = [(f"{output} {n} {sizes}", *others) for output, *others in WHOLE]
    results = ranks(n, train, directory=str(inputs), runs=runs, export="none", **sizes)
    check(*zip(*results, strict=True))


def test_a_run_continues_offloaded_and_resident_on_this_layout_and_another(inputs, ranks):
    """From ranks that share experts to ones that share rows."""
    sizes = {"dp_shard": 2, "ep": 2}
    results = ranks(2, train, directory=str(inputs), runs=WHOLE + LEGS, export="fp32", **sizes)
    resident, offloaded, *legs = map(list, zip(*results, strict=True))
    check(resident, offloaded)
    check_exports(inputs, "resident", "offloaded")
    for rank, last in enumerate(legs[-1]):
        last["numbers"] = [step for leg in legs for step in leg[rank]["numbers"]]
    check(resident, legs[-1])
    check_exports(inputs, "resident", "legs")
    sizes = {"cp": 2, "activation_checkpointing": "full"}
    runs = [(f"{output} cp", *others) for output, *others in WHOLE]
    begin = str(inputs / "legs" / "checkpoints" / "step-00000001")
    sizes |= {"export": "none", "resume": begin}
    results = ranks(2, train, directory=str(inputs), runs=runs, **sizes)
    check(*zip(*results, strict=True))


def test_a_layer_waits_for_its_update_and_the_next_ones_and_for_no_other(inputs):
    """The update of a unit waits here for the forward pass two units before it: would that wait for
    all updates, neither could go on.
    """
    config = config_for(str(inputs), seq_len=128)
    config.optim.offload, config.data.workers = True, 0
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        units, order = trainer.optimizer.units, []
        assert len(units) == 1 + len(trainer.model.model.layers)
        trainer.train_step(next(trainer.loader))
        began = [threading.Event() for _ in units]
        update, numbers = trainer.optimizer._update, {id(u): n for n, u in enumerate(units)}

        def update_late(unit: Any, copies: bool) -> None:
            number = numbers[id(unit)]
            assert number < 3 or began[number - 2].wait(60)
            update(unit, copies)
            order.append(("updated", number))

        trainer.optimizer._update = update_late
        trainer.train_step(next(trainer.loader))
        for number, unit in enumerate(units):

            def begin(*_: Any, number: int = number) -> None:
                began[number].set()
                order.append(("forward", number))

            unit.module.register_forward_pre_hook(begin)
        order_of_the_first = order.copy()
        trainer.train_step(next(trainer.loader))
        trainer.optimizer.wait()
        copies = trainer.optimizer.copies
        for part in units[1].parts:  # what FSDP gathers of the first layer
            masters, copy = copies[part]
            assert masters.data_ptr() == part.sharded_param.to_local().data_ptr()
            assert part.all_gather_inputs[0].data_ptr() == copy.data_ptr() != masters.data_ptr()
            assert copy.dtype == torch.float32 and torch.equal(copy, masters)
        trainer.model.state_dict()  # who has the masters may change them
        assert all(part.all_gather_inputs[0] is copies[part][0] for part in units[1].parts)
    assert ("updated", len(units) - 1) not in order_of_the_first
    last = len(units) - 1
    for number in range(last + 1):
        needed = number if number in (0, last) else number + 1
        assert order.index(("updated", needed)) < order.index(("forward", number))


def test_a_model_that_cannot_fit_the_host_is_refused_before_weights_are_loaded(inputs, monkeypatch):
    """16 bytes for each parameter; on the device what is computed with: 2 in bf16."""
    config = config_for(str(inputs), compute="bf16")
    config.optim.offload = True
    monkeypatch.setattr(memory, "check_host_memory", lambda *_: None)
    with World(config.parallel, 0) as world:
        model = SilentTrainer(config, world).model
        numbers = sum(p.numel() for p in model.parameters())
        assert memory.held_bytes(model, torch.bfloat16, True, config.optim) == (2 * numbers, 0)
        assert memory.host_bytes(model, is_pinned=False) == 16 * numbers
        pinned = sum(2 ** (4 * p.numel() - 1).bit_length() for p in model.parameters())
        assert memory.host_bytes(model, is_pinned=True) == 8 * numbers + 2 * pinned
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 16 * numbers - 1)
    monkeypatch.setattr(
        "torchsft.checkpoint.huggingface.load_weights",
        lambda *_: pytest.fail("weights were loaded"),
    )
    sentence = r"would keep at least 0\.0 GB .* \(ranks there: 1\), but it has 0\.0 GB free; start"
    activations = Train(activation_checkpointing="full", activation_offload=True)
    for train, options in (
        (config.train, "--optim.offload"),
        (activations, "--optim.offload and --train.activation-offload"),
    ):
        config.train = train
        refused = pytest.raises(InputError, match=f"^{options} {sentence}")
        with World(config.parallel, 0) as world, refused:
            SilentTrainer(config, world)


def test_free_host_memory_is_what_linux_or_the_control_group_has_less_of(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 900 kB\nMemAvailable:    800 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "300000\n",
        "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 1000\n",
    }

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert memory.free_host_bytes() == 800 * 1024
    files["/sys/fs/cgroup/memory.max"] = "500000\n"
    assert memory.free_host_bytes() == 500_000 - 300_000 + 1000
