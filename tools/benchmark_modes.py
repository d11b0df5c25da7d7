"""The modes of memory and precision: a model in each of them, for `tools/benchmark.py step`, which
measures them here on a small one beside the plain mode, `tools/benchmark.py gpu`, and tests/gpu.

In `benchmark.py step` tokens/s are medians of steps that the modes take in turns. Memory is what
torch's CPU allocator holds at most during a step above what it held before it; bytes per parameter
are those of the weights and the optimizer's tensors after a step, and of the gradients before it.
On a CPU fp8 is emulated, and the host is the device: what offloading saves shows on a GPU alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchsft.config import Optim, Precision, Train
from torchsft.models.decoder import local
from torchsft.models.families import build_model
from torchsft.models.loss import IGNORE, Objective
from torchsft.optim.adamw import build_optimizer, set_lr
from torchsft.parallel.apply import parallelize
from torchsft.parallel.fsdp import allocate
from torchsft.parallel.world import World, deterministic

LEARNING_RATE = 1e-4


@dataclass
class Mode:
    """Options that differ from the plain step's."""

    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)


FULL, SELECTIVE = ({"activation_checkpointing": mode} for mode in ("full", "selective"))
MODES = {
    "plain": Mode(),
    "--optim.moments bf16": Mode({"moments": "bf16"}),
    "--optim.moments int8": Mode({"moments": "int8"}),
    "--optim.masters bf16": Mode({"masters": "bf16"}),
    "--optim.masters bf16 --optim.moments int8": Mode({"masters": "bf16", "moments": "int8"}),
    "--optim.offload": Mode({"offload": True}),
    "--optim.kind muon": Mode({"kind": "muon"}),
    "--train.activation-checkpointing selective": Mode(train=SELECTIVE),
    "... --train.selective-products": Mode(train=SELECTIVE | {"selective_products": True}),
    "--train.activation-checkpointing full": Mode(train=FULL),
    "... --train.activation-checkpointing-every 2": Mode(
        train=FULL | {"activation_checkpointing_every": 2}
    ),
    "... --train.activation-offload": Mode(train=FULL | {"activation_offload": True}),
    "--train.deterministic": Mode(train={"deterministic": True}),
    "--train.label-smoothing 0.1 --train.z-loss 1e-4": Mode(
        train={"label_smoothing": 0.1, "z_loss": 1e-4}
    ),
    "--precision.compute float8": Mode(precision={"compute": "float8"}),
    "--precision.float8-recipe tensorwise": Mode(
        precision={"compute": "float8", "float8_recipe": "tensorwise"}
    ),
    "--precision.float8-recipe rowwise_with_gw_hp": Mode(
        precision={"compute": "float8", "float8_recipe": "rowwise_with_gw_hp"}
    ),
    "--precision.compute blockwise": Mode(precision={"compute": "blockwise"}),
    "--precision.experts float8": Mode(precision={"experts": "float8"}),
    "--precision.experts mxfp8": Mode(precision={"experts": "mxfp8"}),
}


def documents(tokens: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """Return what a model is called with, on the device of `tokens`, int64 [T].

    Args:
        tokens: each is predicted from those before it in its document.
        lengths: of the documents, which fill `tokens`.
    """
    bounds = torch.tensor([0, *lengths], device=tokens.device).cumsum(0)
    labels = tokens.roll(-1)
    labels[bounds[1:] - 1] = IGNORE
    return {
        "tokens": tokens,
        "positions": torch.cat([torch.arange(n) for n in lengths]).to(tokens.device),
        "cu_seqlens": bounds.to(torch.int32),
        "labels": labels,
        "max_seqlen": max(lengths),
    }


class Side:
    """A model in one mode.

    Args:
        mode: its options; the others are those of a plain step.
        world: one rank.
        config: as config.json has it.
        weights: to begin with, by name; None: random ones.
        compute: dtype of the forward and backward pass.
    """

    def __init__(
        self,
        mode: Mode,
        world: World,
        config: dict[str, Any],
        weights: dict[str, Tensor] | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        plain = {"lr": LEARNING_RATE, "weight_decay": 0.01, "beta2": 0.999}
        optim, self.train = Optim(**plain | mode.optim), Train(**mode.train)
        with torch.device("meta"):
            self.model = build_model(config)
        parallelize(
            [self.model],
            world,
            compute,
            masters=torch.bfloat16 if optim.masters == "bf16" else torch.float32,
            activations=self.train,
            precision=Precision(**mode.precision),
            offload=optim.offload,
        )
        allocate([self.model], world.device, optim.offload)
        with torch.no_grad():
            for name, tensor in self.model.state_dict(keep_vars=True).items():
                part = local(tensor)
                if weights is not None:
                    part.copy_(weights[name])
                elif "norm" in name:
                    part.fill_(1.0)
                else:
                    part.normal_(std=0.02)
        self.model.objective = Objective(self.train.label_smoothing, self.train.z_loss)
        self.optimizer = build_optimizer(self.model.train(), optim, None, [self.model])
        set_lr(self.optimizer, 1.0)
        self.gradient_bytes = 0

    def step(self, tokens: Tensor) -> float:
        """Take one step; the mean loss."""
        loss = self.compute(tokens)
        self.update()
        return loss.item()

    def compute(self, tokens: Tensor) -> Tensor:
        """Go forward and backward through rows of one document each, int64 [rows, row]; the mean
        loss.
        """
        rows, row = tokens.shape
        return self.passes(documents(tokens.flatten(), [row] * rows))

    def passes(self, batch: dict[str, Any]) -> Tensor:
        """Go forward and backward through `documents`; the mean loss."""
        supervised = len(batch["tokens"]) - len(batch["cu_seqlens"]) + 1
        with deterministic(self.train.deterministic):
            loss = self.model(**batch) / supervised
            loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient_bytes = sum(local(gradient).nbytes for gradient in gradients)
        return loss.detach()

    def update(self) -> None:
        """Step the optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes_per_parameter(self) -> float:
        """Bytes of weights, gradients and the optimizer's tensors, for each parameter."""
        parameters = list(self.model.parameters())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held = sum(local(tensor).nbytes for tensor in [*parameters, *states])
        return (held + self.gradient_bytes) / sum(local(p).numel() for p in parameters)


def measure(
    world: World,  # one rank
    weights: dict[str, Tensor],
    config: dict[str, Any],
    batches: Tensor,  # int64 [steps + 2, rows, row]
    held_peak: Callable[[Callable[[], object]], int],  # of benchmark_step.py
) -> dict[str, dict[str, float]]:
    """Measure every mode, print a table, and return it."""
    found: dict[str, dict[str, float]] = {}
    # One after the other, as all of them together may not fit; the plain one between them.
    for name, mode in MODES.items():
        sides = {
            which: Side(each, world, config, weights)
            for which, each in (("plain", MODES["plain"]), (name, mode))
        }
        seconds: dict[str, list[float]] = {which: [] for which in sides}
        for index, tokens in enumerate(batches):
            for which, side in sides.items():
                began = time.perf_counter()
                if index == 1:
                    peak = held_peak(lambda side=side, tokens=tokens: side.step(tokens))
                else:
                    loss = side.step(tokens)
                if index > 1:
                    seconds[which].append(time.perf_counter() - began)
        medians = {which: statistics.median(times) for which, times in seconds.items()}
        numbers = found[name] = {
            "speed": medians["plain"] / medians[name],
            "tokens_per_second": batches[0].numel() / medians[name],
            "peak_bytes": peak,
            "bytes_per_parameter": sides[name].bytes_per_parameter(),
            "loss": loss,
        }
        print(
            f"{name:47} {numbers['tokens_per_second']:7.0f} tokens/s ({numbers['speed']:.2f} x "
            f"plain)  peak {numbers['peak_bytes'] / 2**20:6.0f} MiB  "
            f"{numbers['bytes_per_parameter']:5.2f} bytes a parameter  loss {loss:.4f}",
            flush=True,
        )
    return found
