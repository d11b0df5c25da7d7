"""The schedules against closed formulas, torch's schedulers and those of transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from torchsft.config import InputError, Optim
from torchsft.optim.schedule import lr_factor


def learning_rate(step, optim, total_steps):
    return optim.lr * lr_factor(step, optim, total_steps)


def test_warm_up_is_linear_from_the_first_step():
    optim = Optim(lr=0.5, warmup_steps=4, schedule="constant")
    assert [learning_rate(step, optim, 8) for step in range(8)] == [
        0.125,
        0.25,
        0.375,
        0.5,
        0.5,
        0.5,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_decay_equals_torchs_schedulers(schedule, warmup):
    """It starts at the peak after the warm-up and would reach the floor one update after the
    last.
    """
    optim = Optim(lr=0.3, warmup_steps=warmup, schedule=schedule, min_lr_ratio=0.25)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedulers = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=20, eta_min=0.075),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(
            sgd, start_factor=1.0, end_factor=0.25, total_iters=20
        ),
    }
    scheduler = schedulers[schedule]()
    for step in range(20):
        expected = scheduler.get_last_lr()[0]
        assert learning_rate(warmup + step, optim, warmup + 20) == pytest.approx(
            expected, rel=1e-12
        )
        sgd.step()
        scheduler.step()


def test_a_run_that_is_all_warm_up_is_allowed_and_a_longer_warm_up_refused():
    assert learning_rate(3, Optim(lr=1.0, warmup_steps=4), 4) == 1.0
    with pytest.raises(InputError, match=r"warmup-steps is 5, but the run has only 4 steps"):
        learning_rate(0, Optim(warmup_steps=5), 4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_moves(schedule):
    assert learning_rate(0, Optim(lr=1.0, schedule=schedule), 1) == 1.0


def rates(optim, total):
    return [learning_rate(step, optim, total) for step in range(total)]


def test_wsd_is_flat_and_then_falls_to_its_floor():
    """By hand: 2 warm-up steps, 4 stable ones (the last of which begins the decay), then 1/4 of the
    way down each step.
    """
    optim = Optim(lr=8.0, schedule="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.5)
    assert rates(optim, 9) == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 7.0, 6.0, 5.0]


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd_behind_its_warm_up_equals_transformers(shape):
    """Its warm-up begins with 0 (or the floor) in place of the first step's share, so it is left
    out.
    """
    optim = Optim(
        lr=0.3, schedule="wsd", warmup_steps=4, decay_steps=7, decay_shape=shape, min_lr_ratio=0.1
    )
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    sizes = dict(num_warmup_steps=4, num_decay_steps=7, num_training_steps=20)
    scheduler = transformers.get_wsd_schedule(sgd, **sizes, decay_type=shape, min_lr_ratio=0.1)
    for step in range(20):
        if step >= 4:
            assert learning_rate(step, optim, 20) == pytest.approx(
                scheduler.get_last_lr()[0], rel=1e-12
            )
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_decay_behind_a_warm_up_equals_transformers(schedule):
    optim = Optim(
        lr=0.3,
        schedule=schedule,
        warmup_steps=0.15,
        min_lr_ratio=0.25 if schedule == "cosine" else 0.0,
    )
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    sizes = dict(num_warmup_steps=3, num_training_steps=20)
    if schedule == "cosine":
        scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            sgd, **sizes, min_lr_rate=0.25
        )
    else:
        scheduler = transformers.get_linear_schedule_with_warmup(sgd, **sizes)
    for step in range(20):
        if step >= 3:
            assert learning_rate(step, optim, 20) == pytest.approx(
                scheduler.get_last_lr()[0], rel=1e-12
            )
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("share", "total", "steps"),
    [(0.1, 30, 3), (0.03, 100, 3), (0.03, 101, 4), (0.5, 1, 1), (0.0, 9, 0)],
)
def test_a_share_is_the_decimal_number_of_steps_rounded_up(share, total, steps):
    """0.1 * 30 is above 3 in floating point. For the others transformers says the same."""
    by_share = rates(Optim(lr=0.3, warmup_steps=share), total)
    assert by_share == rates(Optim(lr=0.3, warmup_steps=steps), total)
    if (share, total) != (0.1, 30):
        # The method alone: to build TrainingArguments needs accelerate, which torchsft does not
        # install.
        given = SimpleNamespace(warmup_steps=share)
        assert transformers.TrainingArguments.get_warmup_steps(given, total) == steps
    if share:
        wsd = Optim(schedule="wsd", decay_steps=share)
        assert rates(wsd, total) == rates(Optim(schedule="wsd", decay_steps=steps), total)


def test_wsd_without_a_number_decays_over_the_last_tenth_linearly():
    optim = Optim(lr=1.0, schedule="wsd")
    assert rates(optim, 40) == [1.0] * 37 + [0.75, 0.5, 0.25]
    assert rates(Optim(lr=1.0, schedule="wsd", decay_steps=0), 4) == [1.0] * 4


def test_a_decay_longer_than_what_the_warm_up_leaves_is_refused():
    optim = Optim(schedule="wsd", warmup_steps=4, decay_steps=0.7)
    with pytest.raises(
        InputError,
        match=r"decay-steps is 0.7 \(7 steps\), but the warm-up leaves only 6 of the "
        r"run's 10 steps;",
    ):
        learning_rate(0, optim, 10)
    assert math.isclose(
        learning_rate(4, Optim(lr=1.0, schedule="wsd", warmup_steps=4, decay_steps=6), 10), 1.0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decay_steps": 5},
            "decay-steps is 5, but --optim.schedule cosine has no decay of its "
            "own; set --optim.schedule wsd",
        ),
        (
            {"decay_shape": "cosine", "schedule": "linear"},
            "decay-shape is cosine, but --optim.schedule linear",
        ),
        (
            {"warmup_steps": 2.5},
            "warmup-steps is 2.5, but from 1 on it must be a whole number of steps",
        ),
        ({"warmup_steps": math.inf}, "warmup-steps is inf"),
        ({"warmup_steps": -0.1}, "warmup-steps is -0.1, but it must be at least 0"),
        ({"decay_steps": math.nan, "schedule": "wsd"}, "decay-steps is nan"),
        ({"min_lr_ratio": 1.5}, "min-lr-ratio is 1.5"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Optim(**options)
