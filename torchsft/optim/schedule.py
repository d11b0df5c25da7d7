"""The learning rate of each step."""

import math
from fractions import Fraction

from torchsft.config import InputError, Optim

WSD_DECAY = 0.1  # share of the steps over which wsd decays, unless --optim.decay-steps says another


def steps_of(number: float, total_steps: int) -> int:
    """Return steps that an option means: `number` of them or, below 1, this share of `total_steps`,
    rounded up.

    The share is the decimal number that was written: 0.1 of 30 steps is 3, although 0.1 * 30 > 3 in
    floating point.
    """
    if number >= 1:
        return int(number)
    return math.ceil(Fraction(str(number)) * total_steps)


def lr_factor(step: int, optim: Optim, total_steps: int) -> float:
    """Return what the peak learning rate is multiplied with in update number `step` (0 is the
    first), a function of its arguments.

    With w warm-up steps, d decay steps (of wsd; else d = n - w), n = total_steps, and floor =
    min_lr_ratio:

        step < w        (step + 1) / w                    linear warm-up; the first update moves too
        step < n - d    1                                 wsd's stable part, and constant
        else            floor + (1 - floor) * shape(t)    t = (step - (n - d)) / d

    where shape(t) is (1 + cos(pi t)) / 2 for cosine, 1 - t for linear, 1 - sqrt(t) for 1-sqrt.

    The decay is that of transformers' schedules: the floor would be reached at update n, so that
    the last one still moves.

    Raises:
        InputError: warm-up and decay are longer than the run.
    """
    warmup, decay = warmup_steps(optim, total_steps), decay_steps(optim, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    begin = total_steps - decay
    if optim.schedule == "constant" or step < begin:
        return 1.0
    t = (step - begin) / decay
    shape = optim.schedule
    if shape == "wsd":
        shape = optim.decay_shape or "linear"
    if shape == "cosine":
        share = (1 + math.cos(math.pi * t)) / 2
    elif shape == "linear":
        share = 1 - t
    else:
        share = 1 - math.sqrt(t)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share


def describe_rest(step: int, updates: int, optim: Optim, total_steps: int) -> str:
    """Say where the learning rate stands and ends, of a run that is longer or shorter than before.

    Args:
        step: steps taken.
        updates: those of them that counted.
        optim: of the run.
        total_steps: of the run.
    """
    last_update = updates + total_steps - step - 1
    now, end = (
        optim.lr * lr_factor(update, optim, total_steps) for update in (updates, last_update)
    )
    return (
        f"its {optim.schedule} schedule now ends at step {total_steps}; the learning rate goes on "
        f"at {now:.3g} and ends at {end:.3g}"
    )


def warmup_steps(optim: Optim, total_steps: int) -> int:
    """Return steps of the warm-up.

    Raises:
        InputError: the run has fewer.
    """
    steps = steps_of(optim.warmup_steps, total_steps)
    if steps > total_steps:
        raise InputError(
            f"--optim.warmup-steps is {optim.warmup_steps}, but the run has only {total_steps} "
            "steps; lower it or train longer"
        )
    return steps


def decay_steps(optim: Optim, total_steps: int) -> int:
    """Return steps at the end over which the learning rate falls.

    Raises:
        InputError: the warm-up leaves fewer.
    """
    left = total_steps - warmup_steps(optim, total_steps)
    if optim.schedule != "wsd":
        return left
    number = WSD_DECAY if optim.decay_steps is None else optim.decay_steps
    steps = steps_of(number, total_steps)
    if steps > left:
        share = f" ({steps} steps)" if number < 1 else ""
        raise InputError(
            f"--optim.decay-steps is {number}{share}, but the warm-up leaves only {left} of the "
            f"run's {total_steps} steps; lower it or train longer"
        )
    return steps
