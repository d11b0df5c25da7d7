"""Options of --optim."""

import math
from dataclasses import dataclass
from typing import Literal

from torchsft.config.errors import InputError, at_least


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with optimizer options of their own, as --optim.groups says them; None: as all
    others.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None


BLOCK = 128  # entries of a row whose moments share a scale, with --optim.moments int8


@dataclass(kw_only=True)
class Optim:
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: momentum (0.95), orthogonalised, for every matrix of the layers as the files hold it
    (of each expert gate, up and down; attention, shared experts and routers), AdamW for embeddings,
    head, norms and biases. An update has the size of AdamW's, whose learning rate so carries over;
    best for models that Muon has pre-trained (Moonlight, Kimi-K2).
    """
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """Both moments of AdamW: 8, 4 or 2.06 bytes a parameter. What is not fp32 is rounded at random,
    so that the second one decays with any beta2; int8 has a scale for 128 entries of a row.
    """
    masters: Literal["fp32", "bf16"] = "fp32"
    """bf16: parameters and their gradients have 2 bytes, in place of 4; updates are rounded at
    random, so that small learning rates count in the mean, gradients to the nearest behind each
    microbatch (with pp, and over tp where it splits nothing, behind the last). Routers stay fp32.
    """
    offload: bool = False
    """Keep fp32 parameters, gradients and moments in host memory (16 bytes a parameter), and on the
    device only what it computes with: 2 bytes. AdamW runs on the CPU, layer by layer, beside the
    next forward pass; the numbers are those of a run that keeps all on its CPU.
    """
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd: stable, then decay at the end."""
    warmup_steps: int | float = 0
    """Steps of linear warm-up; below 1: their share of the run's steps, rounded up."""
    decay_steps: int | float | None = None
    """Steps at the end over which wsd decays; below 1: their share of the run's steps, rounded up.
    Absent: 0.1.
    """
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = None
    """How wsd decays; absent: linear."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay (the floor of cosine, linear and wsd), as a share of
    the peak.
    """
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; applied to matrices only (parameters of two or more dims), not to norms and
    biases.
    """
    clip_norm: float | None = 1.0
    """Largest global gradient norm (over what is trained); None leaves gradients as they are."""
    groups: tuple[str, ...] = ()
    """PATTERN:lr=1e-6,weight_decay=0 (or one of the two): another peak learning rate, on the same
    schedule, or weight decay for some parameters. Patterns as for --train.freeze; the first one
    that matches a parameter decides.
    """

    def __post_init__(self) -> None:
        for name, plain in {"kind": "adamw", "moments": "fp32", "masters": "fp32"}.items():
            given = getattr(self, name)
            if given == plain:
                continue
            if self.offload:
                raise InputError(
                    "--optim.offload keeps fp32 masters and moments of AdamW on the host, but "
                    f"--optim.{name} is {given}; leave one of the two out"
                )
            if self.kind == "muon" and name != "kind":
                raise InputError(
                    f"--optim.{name} is {given}, but --optim.kind muon has fp32; leave one of the "
                    "two out"
                )
        at_least(self, lr=0, min_lr_ratio=0, eps=0, weight_decay=0, warmup_steps=0, decay_steps=0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"--optim.{name} is {getattr(self, name)}, but it must be in [0, 1)"
                )
        if not self.min_lr_ratio <= 1:
            raise InputError(
                f"--optim.min-lr-ratio is {self.min_lr_ratio}, but it must be at most 1"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(
                f"--optim.clip-norm is {self.clip_norm}, but it must be above 0 (or "
                f"None for no clipping)"
            )
        for name in ("warmup_steps", "decay_steps"):
            number = getattr(self, name)
            if number is not None and number >= 1 and number != int(min(number, 1e18)):
                raise InputError(
                    f"--optim.{name.replace('_', '-')} is {number}, but from 1 on it must be a "
                    "whole number of steps"
                )
        for name in ("decay_steps", "decay_shape"):
            if getattr(self, name) is not None and self.schedule != "wsd":
                raise InputError(
                    f"--optim.{name.replace('_', '-')} is {getattr(self, name)}, but "
                    f"--optim.schedule {self.schedule} has no decay of its own; set "
                    "--optim.schedule wsd or leave it out"
                )
        self.parameter_groups()

    def parameter_groups(self) -> list[ParameterGroup]:
        """`groups`, parsed.

        Raises:
            InputError: one is not understood.
        """
        return [_parameter_group(text) for text in self.groups]


def _parameter_group(text: str) -> ParameterGroup:
    """Read `PATTERN:lr=...,weight_decay=...`."""
    known = ("lr", "weight_decay")
    refused = f"--optim.groups has {text!r}, "
    pattern, _, said = text.rpartition(":")
    if not pattern or not said:
        raise InputError(
            f"{refused}but it must be PATTERN:lr=NUMBER,weight_decay=NUMBER (or one of the two)"
        )
    values: dict[str, float] = {}
    for part in said.split(","):
        key, _, number = part.partition("=")
        name = key.strip().replace("-", "_")
        if name not in known:
            raise InputError(
                f"{refused}but a group has no {key.strip()!r}; it can have {' and '.join(known)}"
            )
        if name in values:
            raise InputError(f"{refused}which gives {name} twice; give it once")
        try:
            values[name] = float(number)
        except ValueError:
            raise InputError(f"{refused}but {name} = {number!r} is not a number") from None
        if not 0 <= values[name] < math.inf:
            raise InputError(
                f"{refused}but {name} is {values[name]}; it must be a finite number of at least 0"
            )
    return ParameterGroup(pattern.strip(), **values)
