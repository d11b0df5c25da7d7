"""Steps whose results the host reads late, while the device computes the next one.

The host launches a step's passes, its update and the copies of its results to pinned memory, and
goes on. Behind the backward pass of the next step (whose mixture-of-experts layers have waited for
the device anyway) these are there.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsft.config import Config
from torchsft.metrics.step import GlobalBatch, StepResults, further_losses, load_scalars
from torchsft.metrics.throughput import memory_gib, mfu, peak_tflops


class Mark:
    """A place in what a device does: behind all that has been launched so far."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.event = time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def wait(self) -> None:
        """Return when the device has come here."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: "Mark") -> float:
        """Return the seconds from `earlier` to here; waits for the device."""
        if self.event is None or earlier.event is None:
            return self.seconds - earlier.seconds
        self.wait()
        return earlier.event.elapsed_time(self.event) / 1000


@dataclass
class Counters:
    """How far a run is; saved in its checkpoints, and the same on every rank. Of a step that is
    still under way only `step` knows.
    """

    step: int = 0  # steps taken, skipped ones included
    updates: int = 0  # steps that changed the weights: what the learning-rate schedule counts
    skipped: int = 0  # steps that changed nothing: gradient not finite, or nothing supervised
    skipped_in_a_row: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan

    def add(self, loss: float, updated: bool) -> None:
        """Count a step's outcome."""
        self.last_loss = loss
        if math.isnan(self.first_loss):
            self.first_loss = loss
        self.updates += updated
        self.skipped += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1


@dataclass(frozen=True)
class TakenStep:
    """A step that the host has launched.

    Attributes:
        epoch: counted from 0.
        data_state: of the loader behind it.
        batch: its global batch.
        lr_scale: the learning rate as a share of its peak.
        waited: seconds that the host waited for its data.
        norm: of the gradients before clipping, float64 scalar.
        sums: of `sum_results`; like `norm` on the host, where both are complete at `ended`.
        before: where the step before ended; None: it is this process's first.
        begun: before its first pass.
        ended: behind all of it.
    """

    epoch: int
    data_state: dict[str, Any]
    batch: GlobalBatch
    lr_scale: float
    waited: float
    norm: Tensor
    sums: Tensor
    before: Mark | None
    begun: Mark
    ended: Mark

    @property
    def seconds(self) -> float:
        """What the device needed, the host's delays included, waiting for data and what else is
        done between steps left out.
        """
        return self.ended.since(self.begun)

    @property
    def data_wait_share(self) -> float:
        """The share of waiting for data; what the device was busy with meanwhile is not waited
        for.
        """
        waited = self.waited
        if self.before is not None:
            waited = min(waited, self.begun.since(self.before))
        return waited / (waited + self.seconds)


def describe_step(
    taken: TakenStep, results: StepResults, config: Config, mtp_layers: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return a step's line of metrics.jsonl, and what only TensorBoard shows, by tag.

    Args:
        taken: the step.
        results: what it found.
        config: of the run.
        mtp_layers: of the whole model.
        device: of this rank.
    """
    batch, seconds = taken.batch, taken.seconds
    record = {
        "loss": results.loss_sum / batch.divisor,
        "grad_norm": results.norm,
        "lr": config.optim.lr * taken.lr_scale,
        "tokens": int(batch.tokens),
        "supervised_tokens": int(batch.supervised_tokens),
        "tokens_per_second": batch.tokens / seconds,
        "step_seconds": seconds,
        "epoch": taken.epoch,
        "data_wait_share": taken.data_wait_share,
    }
    record |= further_losses(results, config, batch, mtp_layers)
    scalars = {"speed/supervised_tokens_per_second": batch.supervised_tokens / seconds}
    for group in config.optim.parameter_groups():
        if group.lr is not None:
            scalars[f"optim/lr/{group.pattern}"] = taken.lr_scale * group.lr
    scalars |= memory_gib(device)
    scalars |= load_scalars(results.expert_load)
    peak = config.metrics.peak_tflops or peak_tflops(device)
    if peak:
        ranks = torch.distributed.get_world_size()
        scalars["speed/mfu"] = mfu(batch.flops / ranks, seconds, peak)
    return record, scalars
