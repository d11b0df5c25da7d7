"""AdamW with moments and parameters of few bits, against fp32 and closed formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchsft
from tests.distributed.test_layouts import SilentTrainer, config_for, full
from tests.ops.passes import Operations
from tests.tiny import write_conversations, write_tiny_model
from torchsft.checkpoint.boxes import Box
from torchsft.config import Config, InputError, Optim
from torchsft.models.decoder import local
from torchsft.optim import low_precision
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.optim.low_precision import from_int8, hashed, levels, to_bf16, to_int8
from torchsft.parallel.memory import held_bytes
from torchsft.parallel.world import World

CPU = torch.device("cpu")


def bits(*shape: int, seed: int = 0) -> torch.Tensor:
    return hashed(seed, Box((0,) * len(shape), shape), shape, CPU)


def test_random_bits_depend_on_the_place_in_the_whole_tensor_alone():
    whole = bits(6, 7, 8)
    box = Box((2, 0, 3), (3, 7, 4))
    assert torch.equal(hashed(0, box, (6, 7, 8), CPU), whole[2:5, :, 3:7])
    assert not torch.equal(bits(6, 7, 8, seed=1), whole)
    # more elements than int32 has numbers, as V3's stacked experts
    far = hashed(0, Box((255, 0, 0), (1, 1, 4)), (256, 4096, 7168), CPU)
    assert len(set(far.flatten().tolist())) == 4


def test_random_bits_are_uniform_and_independent():
    """2^20 draws: a mean of 2^20 uniform numbers in [0, 1) errs by 1 / sqrt(12 * 2^20) = 2.8e-4, a
    product of two centred ones by 1 / (12 * 2^10) = 8e-5; five times that.
    """
    drawn = bits(2**10, 2**10)
    for part in (drawn & 0xFFFF, (drawn >> 16) & 0xFFFF):
        uniform = part.double() / 2**16
        assert abs(uniform.mean() - 0.5) < 1.4e-3
        centred = uniform - 0.5
        for other in (centred.roll(1, 1), centred.roll(1, 0)):
            assert abs((centred * other).mean()) < 4e-4
    # each of 2^16 numbers 16 times, +-4 (Poisson)
    assert (drawn & 0xFFFF).flatten().bincount(minlength=2**16).max() < 16 + 8 * 4


def test_rounding_chooses_a_neighbour_and_keeps_the_mean():
    """The mean of n roundings between neighbours at distance d errs by at most d / (2 sqrt(n));
    five times that.
    """
    value, n = 1 + 2**-8 / 3, 2**16
    rounded = to_bf16(torch.full((n,), value), bits(n))
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert abs(rounded.double().mean() - value) < 5 * 2**-7 / (2 * math.sqrt(n))
    assert to_bf16(torch.tensor([-1.5, 0.0, 448.0]), bits(3)).tolist() == [-1.5, 0.0, 448.0]

    row = torch.full((512, 128), 0.3)
    row[:, 0] = 2.0  # the largest of each block
    codes, scales = to_int8(row, bits(512, 128), signed=True)
    values = from_int8(codes, scales, signed=True)
    assert scales.unique().tolist() == [2.0] and (values[:, 0] == 2.0).all()
    table = 2 * levels(True, CPU)
    upper = int(torch.bucketize(0.3, table))
    assert values[:, 1:].unique().tolist() == table[upper - 1 : upper + 1].tolist()
    distance = (table[upper] - table[upper - 1]).item()
    count = 512 * 127
    assert abs(values[:, 1:].double().mean() - 0.3) < 5 * distance / (2 * math.sqrt(count))


def test_zeros_stay_and_a_second_moment_does_not_become_zero():
    row = torch.zeros(2, 130)
    row[1, 0], row[1, 1] = 1.0, 1e-12
    codes, scales = to_int8(row, bits(2, 130), signed=False)
    values = from_int8(codes, scales, signed=False)
    assert codes.shape == (2, 130) and scales.shape == (2, 2)
    assert (values[0] == 0).all() and values[1, 0] == 1 and values[1, 1] > 0
    assert (values[1, 2:] == 0).all()


class Matrices(nn.Module):
    """A matrix whose rows are no whole blocks, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(64, 200, generator=draw).to(dtype))
        self.norm = nn.Parameter(torch.randn(200, generator=draw).to(dtype))


def steps(optim: Optim, count: int, dtype: torch.dtype = torch.float32):
    """Model and optimizer after `count` steps of a noisy quadratic bowl around 0."""
    model = Matrices(dtype)
    optimizer = build_optimizer(model, optim)
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.grad = (parameter.detach().float() + noise).to(dtype)
        set_lr(optimizer, 1.0)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("signed", [True, False])
def test_codes_rounded_to_nearest_are_torchaos(signed):
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    x = torch.randn(4, 384).exp() * (torch.randn(4, 384).sign() if signed else 1)
    codes, scales = to_int8(x, torch.full(x.shape, 2**31 - 1, dtype=torch.int32), signed=signed)
    below = quantize_8bit_with_qmap(x / scales.repeat_interleave(128, 1), levels(signed, CPU))
    assert torch.equal(codes, below)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_the_second_moment_decays_as_beta2_says(moments, beta2):
    """Without gradients v falls by beta2 a step; to the nearest bf16 it would stay with 0.999. The
    mean over the matrix: 12,800 numbers, each off by up to 15 % and more where blocks are uneven.
    """
    optim = Optim(lr=0.0, beta2=beta2, moments=moments)
    model, optimizer = steps(optim, 3)
    names = {parameter: name for name, parameter in model.named_parameters()}

    def squares() -> float:
        state = optimizer.state[model.matrix]
        found = state["exp_avg_sq"]
        if moments == "int8":
            found = from_int8(found, state["exp_avg_sq_scale"], signed=False)
        return found.double().sum().item()

    before = squares()
    for parameter in names:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    assert squares() / before == pytest.approx(beta2**100, rel=0.01)


@pytest.mark.parametrize(("moments", "bound"), [("fp32", 1e-6), ("bf16", 3e-3), ("int8", 0.02)])
def test_steps_follow_those_of_fp32(moments, bound):
    """20 steps of 1e-2: the distance of the end points, as a share of the way. Rounding at random
    between numbers at distance d errs by 0.41 d (root mean square): of bf16 0.2 % of a moment.
    """
    start = Matrices().matrix.detach()
    exact, _ = steps(Optim(lr=1e-2), 20)
    # of fp32 moments alone it is torch's fused AdamW, so with bf16 parameters beside
    masters = "bf16" if moments == "fp32" else "fp32"
    found, optimizer = steps(Optim(lr=1e-2, moments=moments, masters=masters), 20)
    way = (exact.matrix - start).norm()
    assert (found.matrix - exact.matrix).norm() < bound * way
    assert optimizer.state[found.norm]["exp_avg"].dtype != torch.uint8


def test_bf16_parameters_see_a_learning_rate_far_below_their_resolution():
    """Each of 400 steps of 1e-4 moves a parameter near 1 by 1/78 of the distance to its next
    number: to the nearest none would move. Gradients of 1: Adam's step is the learning rate.
    """
    model = Matrices(torch.bfloat16)
    model.matrix.data.fill_(1.0)
    optimizer = build_optimizer(model, Optim(lr=1e-4, weight_decay=0.0, masters="bf16"))
    for _ in range(400):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_lr(optimizer, 1.0)
        optimizer.step()
    assert 1 - model.matrix.double().mean().item() == pytest.approx(0.04, rel=0.02)


class Vectors(nn.Module):
    """Some."""

    def __init__(self, count: int) -> None:
        super().__init__()
        rows = torch.randn(count, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.rows = nn.ParameterList(map(nn.Parameter, rows))


@pytest.mark.parametrize(
    ("moments", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.bfloat16), ("int8", None)]
)
def test_parameters_are_updated_together_as_each_alone_bit_by_bit(monkeypatch, moments, dtype):
    optim, dtype = Optim(lr=1e-2, moments=moments), dtype or torch.float32
    together, _ = steps(optim, 3, dtype)
    monkeypatch.setattr(low_precision, "CHUNK_ELEMENTS", 1)  # an entry of dim 0 at a time
    alone, _ = steps(optim, 3, dtype)
    for found, expected in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_further_parameter_takes_few_operations():
    """11 that compute, of a vector with bf16 moments: places of its entries (5), its share of seeds
    (3), storing (3).
    """
    counts = []
    for count in (2, 12):
        model = Vectors(count)
        optimizer = build_optimizer(model, Optim(moments="bf16", masters="bf16"))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.count)
    more = counts[1] - counts[0]
    for view in ("expand", "slice", "view", "detach"):
        del more[f"aten::{view}"]
    assert sum(more.values()) == 10 * 11, more


@pytest.mark.parametrize("options", [{"moments": "int8"}, {"masters": "bf16"}])
def test_muon_has_fp32_state(options):
    with pytest.raises(InputError, match=r"but --optim\.kind muon has fp32"):
        Config(optim=Optim(kind="muon", **options))


BF16 = {"masters": "bf16", "moments": "bf16"}
# In int8 a matrix's rows are not split within a block: no tensor parallelism at these sizes.
LAYOUTS: list[tuple[int, dict[str, int], dict[str, str]]] = [
    (2, {"dp_shard": 2, "ep": 2, "micro_batch_size": 4}, BF16),
    (2, {"dp_replicate": 2, "micro_batch_size": 4}, BF16),
    (2, {"tp": 2, "ep": 2, "micro_batch_size": 8}, BF16),
    (2, {"pp": 2, "pp_schedule": "1F1B"}, BF16),  # gradients are rounded behind all microbatches
    (4, {"dp_shard": 4, "ep": 2}, {"moments": "int8"}),
    (2, {"dp_replicate": 2}, {"moments": "int8"}),
]


def parameters_after_steps(config: Config) -> list[dict[str, torch.Tensor]]:
    """Every parameter on every rank, after each of three steps."""
    with World(config.parallel, config.train.seed) as world:
        trainer, kept = SilentTrainer(config, world), []
        for _ in range(3):
            trainer.train_step(next(trainer.loader))
            kept.append({name: full(p) for name, p in trainer.model.named_parameters()})
        state = trainer.optimizer.state
        found = sum(local(t).nbytes for s in state.values() for t in s.values() if t.ndim)
        held, _ = held_bytes(trainer.model, torch.float32, True, config.optim)
        weights = sum(local(p).nbytes for p in trainer.model.parameters())
        assert abs(held - found - 2 * weights) < 0.01 * held
        return kept


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    base = tmp_path_factory.mktemp("low-precision")
    write_tiny_model(base / "model", hidden_size=128, moe_intermediate_size=128)
    write_conversations(base / "train.jsonl", 10)
    return base


@pytest.mark.parametrize(("size", "layout", "formats"), LAYOUTS)
def test_a_layout_changes_a_random_choice_here_and_there_alone(
    ranks, directory, size, layout, formats
):
    """Sums differ between layouts in their last bits, so that few of a step's random choices do: a
    parameter may be the other neighbour in bf16. Copies of a parameter never differ.

    A data rank has its rows in one microbatch: gradients of bf16 parameters are rounded to bf16
    behind each, and so differ more where they are added up in another order.
    """

    def run(n: int, options: dict[str, int]) -> list[list[dict[str, torch.Tensor]]]:
        config = config_for(str(directory), **options, **formats)
        return ranks(n, parameters_after_steps, config=config)

    (alone,), found = run(1, {"micro_batch_size": 8}), run(size, layout)
    for step, expected in enumerate(alone):
        for name, values in expected.items():
            parts = [steps[step][name] for steps in found if name in steps[step]]
            assert all(torch.equal(part, parts[0]) for part in parts), name
            if step == 0:
                difference = (parts[0].double() - values.double()).abs()
                assert (difference > 1e-5).double().mean() < 1e-3, name
                assert difference.max() <= 2**-7 * values.abs().max(), name


def everything(trainer: SilentTrainer) -> dict[str, torch.Tensor]:
    """Parameters and all that the optimizer keeps of them."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state.get(parameter, {})
        found |= {f"{name} {key}": full(value) for key, value in state.items()}
        found[name] = full(parameter)
    return found


def leg(
    directory: str, output: str, stop: int, **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a run begins with, from its newest checkpoint, and what it has after step `stop`, where
    it is saved.
    """
    config = config_for(directory, output=output, moments="int8", masters="bf16", **options)
    config.checkpoint.mode, config.data.workers = "sync", 0
    with World(config.parallel, config.train.seed) as world:
        trainer = SilentTrainer(config, world)
        world.barrier()
        before = everything(trainer)
        while trainer.counters.step < stop:
            trainer.train_step(next(trainer.loader))
        trainer.save()
        trainer.output.checkpointer.wait()
        return before, everything(trainer)


def test_a_checkpoint_continues_exactly_also_on_another_layout(ranks, directory, tmp_path):
    """On the same layout bit by bit; on others it begins with the very bytes."""
    whole, legs = str(tmp_path / "whole"), str(tmp_path / "legs")

    def run(n: int, output: str, stop: int, **options: Any) -> list[Any]:
        return ranks(n, leg, directory=str(directory), output=output, stop=stop, **options)

    ((_, expected),) = run(1, whole, 2)
    ((_, first),) = run(1, legs, 1)
    ((_, second),) = run(1, legs, 2)
    assert expected.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in expected.items())
    assert any(not torch.equal(first[name], value) for name, value in expected.items())
    for before, _ in run(4, legs, 2, dp_shard=4, ep=2):
        assert all(torch.equal(before[name], value) for name, value in expected.items())
    with pytest.raises(AssertionError, match=r"differs in optim\.moments: 'int8' -> 'bf16'"):
        ranks(1, other_moments, directory=str(directory), output=legs)


def other_moments(directory: str, output: str) -> None:
    """Continue the run with moments of another format."""
    config = config_for(directory, output=output, moments="bf16", masters="bf16")
    config.checkpoint.resume = output + "/checkpoints/step-00000002"
    with World(config.parallel, config.train.seed) as world:
        SilentTrainer(config, world)


TABLE = re.compile(r"^\| (fp32|bf16) \| (fp32|bf16|int8) \|(?: [\d.]+ \|){3} ([\d.]+) \|$", re.M)


@pytest.mark.parametrize(
    ("masters", "moments", "each"),
    TABLE.findall((Path(torchsft.__file__).parent / "README.md").read_text()),
)
def test_bytes_per_parameter_are_those_of_the_readme(masters, moments, each):
    model = nn.Module()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[masters]
    model.weight = nn.Parameter(torch.randn(8, 256, dtype=dtype))
    optim = Optim(masters=masters, moments=moments)
    optimizer = build_optimizer(model, optim)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    kept = [model.weight, model.weight.grad]
    kept += [value for key, value in optimizer.state[model.weight].items() if key != "step"]
    total = sum(tensor.nbytes for tensor in kept)
    assert total == float(each) * model.weight.numel()
    assert held_bytes(model, torch.bfloat16, True, optim) == (total, 0)
