"""The order of training: an endless stream of global batches that is the same for any number of ranks.

Epoch e is a sequence of rows drawn from (seed, e) alone. A global batch is the next `global_batch_size` rows of it;
data rank r takes the r-th of data_size equal, contiguous parts. The last batch of an epoch is filled up with empty
rows, which weigh nothing in the loss, so every sample is trained exactly once an epoch. The state is (epoch, rows
consumed).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from torchsft.config import InputError
from torchsft.data.batch import Batch, collate
from torchsft.data.packing import pack
from torchsft.data.template import Sample


@dataclass
class Step:
    """What one data rank does in one optimizer step.

    Attributes:
        microbatches: this rank's part of the global batch, `micro_batch_size` rows each.
        epoch: counted from 0.
        sample_ids: of this rank's part, in order; the parts of ranks 0, 1, ... in a row are the global order.
    """

    microbatches: list[Batch]
    epoch: int
    sample_ids: list[str]


def microbatches_per_step(global_batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Microbatches of one data rank in a step; arguments as in `TrainLoader`.

    Raises:
        InputError: the sizes do not divide.
    """
    rows_per_round = micro_batch_size * data_size
    if global_batch_size % rows_per_round:
        nearest = -(-global_batch_size // rows_per_round) * rows_per_round
        raise InputError(
            f"--train.global-batch-size ({global_batch_size}) must divide by --train.micro-batch-size"
            f" ({micro_batch_size}) times the number of data-parallel ranks ({data_size}); set it to {nearest}"
        )
    return global_batch_size // rows_per_round


class TrainLoader:
    """Iterator of `Step`s for one data rank, endless over epochs."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        """
        Args:
            samples: at most seq_len tokens each; the same ones, in the same order, on every rank.
            seq_len: tokens of a row.
            global_batch_size: rows of a step over all data ranks; divides by micro_batch_size * data_size.
            micro_batch_size: rows of a microbatch.
            data_rank: which part of each global batch this loader yields; ranks that share data (pp, cp, tp) share it.
            data_size: number of parts.
            seed: of the order.
            pad_token_id: see `collate`.

        Raises:
            InputError: no samples, one that is longer than a row, or sizes that do not divide.
        """
        if not samples:
            raise InputError("--data.train has no samples to train on; check the files and --data.truncation")
        microbatches_per_step(global_batch_size, micro_batch_size, data_size)  # may refuse
        self.samples = samples
        self.lengths = [len(sample.tokens) for sample in samples]
        named = "".join(f"{sample.id}:{length};" for sample, length in zip(samples, self.lengths, strict=True))
        self.digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.epoch = 0
        self.position = 0
        self._rows_of = lru_cache(maxsize=2)(self._pack)  # an epoch's rows are used by all of its steps

    def _pack(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch in training order, as sample indices."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = pack(self.lengths, rng.permutation(len(self.lengths)), self.seq_len)
        # Packing begins a window with its longest samples; without this, so would the epoch.
        return [rows[i] for i in rng.permutation(len(rows))]

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch, counted from 0; epochs differ slightly, as their rows are packed anew."""
        return -(-len(self._rows_of(epoch)) // self.global_batch_size)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Step:
        part = self.global_batch_size // self.data_size
        rows = self._rows_of(self.epoch)
        begin = self.position + self.data_rank * part
        mine = [[self.samples[i] for i in row] for row in rows[begin : begin + part]]
        mine += [[] for _ in range(part - len(mine))]
        step = Step(
            microbatches=[
                collate(mine[i : i + self.micro_batch_size], self.seq_len, self.pad_token_id)
                for i in range(0, part, self.micro_batch_size)
            ],
            epoch=self.epoch,
            sample_ids=[sample.id for row in mine for sample in row],
        )
        self.position += self.global_batch_size
        if self.position >= len(rows):
            self.epoch += 1
            self.position = 0
        return step

    def state_dict(self) -> dict[str, int | str]:
        """{"epoch", "position": rows consumed in it, "samples", "digest" of their ids and lengths}.

        Means the same on every rank and for any number of ranks.
        """
        return {"epoch": self.epoch, "position": self.position, "samples": len(self.samples), "digest": self.digest}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue after the step at which `state` was taken.

        Raises:
            InputError: the samples are not those that the state belongs to, or the epoch has no such row.
        """
        if (state["samples"], state["digest"]) != (len(self.samples), self.digest):
            raise InputError(
                f"the training data changed since the checkpoint: {state['samples']} samples (digest {state['digest']}) then, "
                f"{len(self.samples)} ({self.digest}) now; restore the files of --data.train or start a new run"
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        rows = self._rows_of(epoch)
        if not 0 <= position < len(rows):
            raise InputError(
                f"the checkpoint continues at row {position} of epoch {epoch}, but that epoch has {len(rows)} rows; use"
                " the data, --data.seq-len and --train.seed of the checkpoint"
            )
        self.epoch, self.position = epoch, position


def eval_batches(
    samples: Sequence[Sample],
    *,
    seq_len: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    pad_token_id: int,
) -> list[Batch]:
    """One data rank's batches of an evaluation set: each sample in one batch of one rank, equally many batches a rank.

    Arguments as in `TrainLoader`; the last batches may hold empty rows. No samples: no batches.

    Raises:
        InputError: a sample is longer than a row.
    """
    rows = pack([len(sample.tokens) for sample in samples], range(len(samples)), seq_len)
    part = -(-len(rows) // (micro_batch_size * data_size)) * micro_batch_size  # rows of each rank
    mine = [[samples[i] for i in row] for row in rows[data_rank * part : (data_rank + 1) * part]]
    mine += [[] for _ in range(part - len(mine))]
    return [collate(mine[i : i + micro_batch_size], seq_len, pad_token_id) for i in range(0, part, micro_batch_size)]
