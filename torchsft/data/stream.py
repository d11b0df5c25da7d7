"""The order of training: an endless stream of global batches that is the same for any number of
ranks and workers.

    epoch      takes each sample of each source `weight` times, in an order that a permutation of
               (seed, epoch) gives
    windows    `buffer` samples are packed together; the emptiest row stays open for the next window
               (the remainder)
    rows       of a window, shuffled by (seed, epoch, window)
    steps      the next `global_batch_size` rows, across windows; the last step of an epoch is
               filled up with empty rows, which weigh nothing in the loss, so every sample is
               trained exactly as often as its source's weight says

Permutations are computed position by position, so nothing here grows with the data. The state is
(epoch, window, rows of it that are consumed, remainder): a continuation packs one window again.
Streaming sources are read in the order of their files instead.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, astuple, dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from torchsft.config import Config, InputError
from torchsft.data.batch import Batch, collate
from torchsft.data.order import shuffled
from torchsft.data.packing import Method, balance_rows, pack
from torchsft.data.template import Sample

# what a permutation is of: a part of its key, so these numbers decide the order
SAMPLES_OF_EPOCH, SAMPLES_OF_PASS, ROWS_OF_WINDOW, SAMPLES_OF_WINDOW = range(4)
CHANGED = "the training data changed since the checkpoint"


@dataclass
class Step:
    """What one data rank does in one optimizer step.

    Attributes:
        microbatches: this rank's part of the global batch, `micro_batch_size` rows each.
        epoch: counted from 0.
        sample_ids: in order; without `cost`, those of ranks 0, 1, ... in a row are the global
            order.
        state: of the loader behind this step.
        sums: of the microbatches, as who prepares steps counts them (`Background`).
    """

    microbatches: list[Batch]
    epoch: int
    sample_ids: list[str]
    state: dict[str, Any]
    sums: list[float] = field(default_factory=list)


class SampleRef(NamedTuple):
    """A sample, or where it is.

    Attributes:
        source: index of its source.
        sample: its index in the source; of a streaming source, which has none, the sample itself.
    """

    source: int
    sample: int | Sample


Rows = list[list[SampleRef]]


@dataclass
class StepPlan:
    """The samples of one data rank in one step, not read yet.

    Attributes:
        rows: of samples; a row may be empty.
        epoch: counted from 0.
        state: of the loader behind this step.
    """

    rows: Rows
    epoch: int
    state: dict[str, Any]


@dataclass
class StreamPosition:
    """How far a streaming source has been read.

    Attributes:
        row, part: of the sample that was read last; 0: none since the source began.
        size: samples from the source's beginning to its end; 0 while that is not known.
        taken: samples that were taken, over all passes.
    """

    row: int = 0
    part: int = 0
    size: int = 0
    taken: int = 0


@dataclass
class WindowStart:
    """Where a window begins. `streams`: of each streaming source, how far it has been read."""

    epoch: int = 0
    window: int = 0
    streams: tuple[StreamPosition, ...] = ()


@dataclass
class _Window:
    """Samples that are packed together.

    Attributes:
        samples: its own; once it is packed, behind the remainder of the window before.
        lengths: tokens of each sample.
        next_start: where the next window begins.
        ends_epoch: whether that is a further epoch.
        rows: indices into `samples`, once it is packed.
        remainder: the samples of the row that stays open for the next window.
    """

    samples: list[SampleRef]
    lengths: list[int]
    next_start: WindowStart
    ends_epoch: bool
    rows: list[list[int]] = field(default_factory=list)
    remainder: list[SampleRef] = field(default_factory=list)


def microbatches_per_step(global_batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Return the microbatches of one data rank in a step; arguments as in the loaders.

    Raises:
        InputError: the sizes do not divide.
    """
    rows_per_round = micro_batch_size * data_size
    if global_batch_size % rows_per_round:
        rounds = -(-global_batch_size // rows_per_round)
        raise InputError(
            f"--train.global-batch-size ({global_batch_size}) must divide by "
            f"--train.micro-batch-size ({micro_batch_size}) times the number of data-parallel "
            f"ranks ({data_size}); set it to {rounds * rows_per_round}"
        )
    return global_batch_size // rows_per_round


def microbatches_of(config: Config) -> int:
    """Return the microbatches of one data rank in a step of a run whose `dp_shard` is resolved.

    Raises:
        InputError: the sizes do not divide.
    """
    parallel, train = config.parallel, config.train
    data_size = parallel.dp_replicate * parallel.dp_shard
    return microbatches_per_step(train.global_batch_size, train.micro_batch_size, data_size)


def tokens_per_microbatch(micro_batch_size: int, seq_len: int, cp: int, tp: int) -> int:
    """Return the tokens of a microbatch, padding included.

    Raises:
        InputError: they do not divide over the cp * tp ranks that share them.
    """
    tokens = micro_batch_size * seq_len
    ranks = cp * tp
    if tokens % ranks:
        raise InputError(
            f"the {tokens} tokens of a microbatch do not divide over cp {cp} x tp {tp} ranks; set "
            f"--data.seq-len to {-(-seq_len // ranks) * ranks}"
        )
    return tokens


@dataclass(eq=False)
class _DataRank:
    """What a data rank makes batches of.

    Args:
        sources: the same ones, in the same order, on every rank.
        seq_len: tokens of a row.
        micro_batch_size: rows of a microbatch.
        data_rank: which part of the rows is this rank's; ranks that share data (pp, cp, tp) share
            it.
        data_size: number of parts.
        pad_token_id: see `collate`.
    """

    sources: Sequence[Any]
    _: KW_ONLY
    seq_len: int
    micro_batch_size: int
    data_rank: int
    data_size: int
    pad_token_id: int

    def _part_of(self, rows: Rows) -> Rows:
        """Return this rank's part of rows, whose number divides by `data_size`."""
        size = len(rows) // self.data_size
        return rows[self.data_rank * size :][:size]

    def _read(self, row: Sequence[SampleRef]) -> list[Sample]:
        """Return the samples of a row."""
        return [
            ref.sample
            if isinstance(ref.sample, Sample)
            else self.sources[ref.source].samples[ref.sample]
            for ref in row
        ]

    def _collate(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return collate(rows, self.seq_len, self.pad_token_id)


@dataclass(eq=False, kw_only=True)
class _Loader(_DataRank, Iterator[Step]):
    """The steps of one data rank, without end.

    Args:
        global_batch_size: rows of a step over all data ranks; divides by micro_batch_size *
            data_size.
        seed: of the order.
        packing: how samples share rows, see `packing.py`.
        buffer: samples that are packed together.
        cost: of a row with documents of these lengths; ranks get equal cost.

    Raises:
        InputError: no samples, one that is longer than a row (when its window is packed), or sizes
            that do not divide.
    """

    global_batch_size: int
    seed: int
    packing: Method = "best-fit"
    buffer: int = 8192
    cost: Callable[[list[int]], float] | None = None

    def __post_init__(self) -> None:
        microbatches_per_step(self.global_batch_size, self.micro_batch_size, self.data_size)
        self.start = WindowStart()  # of the current window
        self.remainder = []  # samples of its first row
        self.row = 0  # rows of it that are consumed
        self.window = None  # packed when it is needed
        self.taken = [0] * len(self.sources)  # samples that are consumed of each source
        self.sizes = [0] * len(self.sources)  # samples of each source, 0 while that is not known
        self.contents = [f"{source.name} streamed" for source in self.sources]

    @abstractmethod
    def _take(self, start: WindowStart) -> _Window:
        """Return the window that begins at `start`, not packed yet."""

    def _pack(self, start: WindowStart, remainder: list[SampleRef]) -> _Window:
        """Pack the window that begins at `start`, behind the remainder of the one before."""
        window = self._take(start)
        window.samples = remainder + window.samples
        lengths = [len(sample.tokens) for sample in self._read(remainder)] + window.lengths
        window.lengths = lengths
        rows = pack(lengths, range(len(lengths)), self.seq_len, self.packing, opened=len(remainder))
        if not window.ends_epoch and self.packing != "none":
            row_lengths = [sum(lengths[i] for i in row) for row in rows]
            open_row = rows.pop(row_lengths.index(min(row_lengths)))
            window.remainder = [window.samples[i] for i in open_row]
        # Packing begins a window with its longest samples; without this, so would the epoch.
        key = (self.seed, ROWS_OF_WINDOW, start.epoch, start.window)
        order = shuffled(range(len(rows)), len(rows), *key)
        window.rows = [rows[i] for i in order.tolist()]
        return window

    def plan(self) -> StepPlan:
        """Decide the samples of the next step and go on behind it. One thread at a time."""
        epoch = self.start.epoch
        rows = []
        costs = []
        while len(rows) < self.global_batch_size:
            window = self._current_window()
            stop = self.row + self.global_batch_size - len(rows)
            next_rows = window.rows[self.row : stop]
            for row in next_rows:
                rows.append([window.samples[i] for i in row])
                if self.cost:
                    costs.append(self.cost([window.lengths[i] for i in row]))
            self.row += len(next_rows)
            if self.row == len(window.rows):
                self.start = window.next_start
                self.remainder = window.remainder
                self.row = 0
                self.window = None
                if window.ends_epoch:
                    break
        for row in rows:
            for ref in row:
                self.taken[ref.source] += 1
        rows = self._own_rows(rows, costs)
        return StepPlan(rows, epoch, self.state_dict())

    def _current_window(self) -> _Window:
        if self.window is None:
            self.window = self._pack(self.start, self.remainder)
        if self.row > len(self.window.rows):  # of a stream, which has no digest
            raise InputError(
                f"{CHANGED}: {self.row} rows are done of a window that has "
                f"{len(self.window.rows)} now; restore it or start a new run"
            )
        return self.window

    def _own_rows(self, rows: Rows, costs: list[float]) -> Rows:
        """Return this rank's rows of a global batch, which is filled up with empty rows."""
        missing = self.global_batch_size - len(rows)
        rows = rows + [[]] * missing
        if not self.cost:
            return self._part_of(rows)
        costs = costs + [0.0] * missing
        own = balance_rows(costs, self.data_size, self.micro_batch_size)[self.data_rank]
        return [rows[i] for i in own]

    def build(self, plan: StepPlan) -> Step:
        """Read and collate the samples of a plan; in any thread."""
        rows = [self._read(row) for row in plan.rows]
        size = self.micro_batch_size
        batches = [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        ids = [sample.id for row in rows for sample in row]
        return Step(batches, plan.epoch, ids, plan.state)

    def __next__(self) -> Step:
        return self.build(self.plan())

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream goes on, as plain JSON: the same on every rank and for any number
        of ranks.
        """
        return {
            "epoch": self.start.epoch,
            "window": self.start.window,
            "places": [[*astuple(position)] for position in self.start.streams],
            "row": self.row,
            "remainder": [_ref_state(ref) for ref in self.remainder],
            "taken": [*self.taken],
            "of": self._description(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the step at which `state` was taken, for the same data and options that
        decide its order.
        """
        before = state.get("of", "data of another version of torchsft")
        now = self._description()
        if before != now:
            raise InputError(
                f"{CHANGED}: {before} then, {now} now; restore files and options or start a new run"
            )
        streams = tuple(StreamPosition(*place) for place in state.get("places", ()))
        self.start = WindowStart(state["epoch"], state["window"], streams)
        self.window = None
        self.row = state["row"]
        self.remainder = [_ref_of(*each) for each in state["remainder"]]
        self.taken = [*state["taken"]]

    def source_epochs(self, state: dict[str, Any]) -> dict[str, float]:
        """Return how often each source has been gone through, as of `state`; 0 for a streaming one
        that has not ended yet.
        """
        return {
            source.name: taken / size if size else 0.0
            for source, taken, size in zip(self.sources, state["taken"], self.sizes, strict=True)
        }

    def _description(self) -> str:
        """Return the data and options to which a state belongs."""
        sources = [
            f"{content} at weight {source.weight:g}"
            for source, content in zip(self.sources, self.contents, strict=True)
        ]
        return (
            f"{' + '.join(sources)} (--data.seq-len {self.seq_len}, --data.packing {self.packing}, "
            f"--data.packing-buffer {self.buffer}, --train.seed {self.seed})"
        )


def _ref_state(ref: SampleRef) -> list[Any]:
    """Return a `SampleRef` as JSON: [source, index], or [source, [id, tokens, weights]]."""
    sample = ref.sample
    if isinstance(sample, Sample):
        return [ref.source, [sample.id, sample.tokens.tolist(), sample.weights.tolist()]]
    return [ref.source, sample]


def _ref_of(source: int, sample: int | list[Any]) -> SampleRef:
    """Return the `SampleRef` that `_ref_state` wrote."""
    return SampleRef(source, Sample(*sample) if isinstance(sample, list) else sample)


class TrainLoader(_Loader):
    """Steps from prepared sources (see `prepare.Prepared`); arguments as in `_Loader`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes = [len(source.samples) for source in self.sources]
        self.contents = [
            f"{len(source.samples)} samples (digest {source.digest})" for source in self.sources
        ]
        if not self.sizes or not all(self.sizes):
            raise InputError(
                "--data.train has no samples to train on; check the files and --data.truncation"
            )

    def _taken_before(self, epoch: int) -> np.ndarray:
        """Return how many samples of each source are taken before an epoch: `weight` times its
        samples in each epoch, but at least one.
        """
        counts = [
            epoch * source.weight * size + 0.5
            for source, size in zip(self.sources, self.sizes, strict=True)
        ]
        return np.maximum(np.array(counts, dtype=np.int64), epoch)

    def _take(self, start: WindowStart) -> _Window:
        """Return the samples of a window.

        The positions of an epoch are divided among the sources, a stretch of positions for each.
        Shuffled positions so give the source, and the number of the sample among all that are taken
        of that source since the training began. That number is a pass through the source and a
        position in that pass, each of which has an order of its own.
        """
        epoch = start.epoch
        before = self._taken_before(epoch)
        after = self._taken_before(epoch + 1)
        stretch_ends = np.cumsum(after - before)
        epoch_size = int(stretch_ends[-1])
        stop = (start.window + 1) * self.buffer
        window = range(stop - self.buffer, min(stop, epoch_size))
        positions = shuffled(window, epoch_size, self.seed, SAMPLES_OF_EPOCH, epoch)

        source = np.searchsorted(stretch_ends, positions, side="right")
        number = positions - stretch_ends[source] + after[source]
        source_pass, index = np.divmod(number, np.array(self.sizes)[source])
        lengths = np.empty_like(index)
        pass_key = source_pass * len(self.sizes) + source
        for key in np.unique(pass_key).tolist():
            of_pass = pass_key == key
            s = key % len(self.sizes)
            key_of_order = (self.seed, SAMPLES_OF_PASS, key)
            index[of_pass] = shuffled(index[of_pass], self.sizes[s], *key_of_order)
            lengths[of_pass] = self.sources[s].samples.lengths[index[of_pass]]

        ends_epoch = stop >= epoch_size
        next_start = WindowStart(epoch + 1) if ends_epoch else WindowStart(epoch, start.window + 1)
        samples = [*map(SampleRef, source.tolist(), index.tolist())]
        return _Window(samples, lengths.tolist(), next_start, ends_epoch)

    def steps_in_epoch(self, epoch: int, share: Fraction | int = 1) -> int:
        """Return the optimizer steps of an epoch, found by packing it; epochs differ slightly.

        Args:
            epoch: counted from 0.
            share: of the epoch's samples, at least which are in these steps, the first ones.
        """
        epoch_size = int((self._taken_before(epoch + 1) - self._taken_before(epoch)).sum())
        needed = share * epoch_size
        start = WindowStart(epoch)
        remainder = []
        rows = samples = 0
        while samples < needed:
            window = self._pack(start, remainder)
            start, remainder = window.next_start, window.remainder
            for row in window.rows:
                if samples >= needed:
                    break
                rows += 1
                samples += len(row)
        return -(-rows // self.global_batch_size)

    def steps_in(self, epochs: float) -> int:
        """Return the optimizer steps of so many epochs from the beginning, the last of which may be
        a part (see `steps_in_epoch`).
        """
        whole = int(epochs)
        rest = Fraction(str(epochs)) - whole  # of the decimal number that was written
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        return steps + self.steps_in_epoch(whole, rest)


class StreamLoader(_Loader):
    """Steps from sources that are read while training (see `prepare.Stream`); arguments as in
    `_Loader`.

    Sources are read in turn, by weight (2.0: twice as often). `open(n)` yields (row, part, sample)
    from behind row n on.

    A source that ends begins again, and windows run across that; an epoch has passed when each has
    ended once more. Every rank reads and tokenises the whole stream, as what is packed together
    depends on all lengths.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start = WindowStart(streams=tuple(StreamPosition() for _ in self.sources))
        self.readers = []
        self.readers_at = None  # the `WindowStart` at which the readers are

    def _take(self, start: WindowStart) -> _Window:
        """Return the samples of a window, in a shuffled order."""
        positions = [replace(position) for position in start.streams]
        if start != self.readers_at:
            self.readers = [
                _open_behind(source, position)
                for source, position in zip(self.sources, positions, strict=True)
            ]
        self.readers_at = None  # until this is done: an error leaves the readers elsewhere
        samples = []
        while len(samples) < self.buffer:
            s = self._next_source(positions)
            sample = self._next_sample(s, positions[s])
            if sample is not None:
                samples.append(SampleRef(s, sample))
        self.sizes = [position.size for position in positions]
        # of each source, the passes that are over
        passes = [position.taken // position.size if position.size else 0 for position in positions]
        next_start = WindowStart(min(passes), start.window + 1, tuple(positions))
        self.readers_at = next_start
        key = (self.seed, SAMPLES_OF_WINDOW, start.window)
        order = shuffled(range(len(samples)), len(samples), *key)
        samples = [samples[i] for i in order.tolist()]
        lengths = [len(ref.sample.tokens) for ref in samples]
        return _Window(samples, lengths, next_start, ends_epoch=False)

    def _next_source(self, positions: Sequence[StreamPosition]) -> int:
        """Return the source of which, by its weight, the least has been taken."""
        shares = [
            (position.taken + 1) / source.weight
            for position, source in zip(positions, self.sources, strict=True)
        ]
        return shares.index(min(shares))

    def _next_sample(self, s: int, position: StreamPosition) -> Sample | None:
        """Read the next sample of a source; None where the source has ended, and begins again."""
        source = self.sources[s]
        row, part, sample = next(self.readers[s], (0, 0, None))
        if sample is not None:
            position.row = row
            position.part = part
            position.taken += 1
            return sample
        if not position.row:
            raise InputError(
                f"--data.train has no samples in {source.name!r}; check the file "
                f"and --data.truncation"
            )
        position.row = 0
        position.part = 0
        position.size = position.size or position.taken
        self.readers[s] = source.open(0)
        return None


def _open_behind(source: Any, position: StreamPosition) -> Iterator[tuple[int, int, Sample]]:
    """Return a reader of a streaming source behind the sample that was read last."""
    last = (position.row, position.part)
    reader = source.open(max(position.row - 1, 0))
    if position.row:
        reached = next((each[:2] for each in reader if each[:2] >= last), None)
        if reached != last:
            raise InputError(
                f"{CHANGED}: {source.name} has no sample {position.row}/{position.part} now; "
                f"restore it or start a new run"
            )
    return reader


@dataclass(eq=False)
class EvalSet(_DataRank, Sequence[Batch]):
    """One data rank's batches of an evaluation set, collated when they are asked for; errors as in
    `_Loader`.

    Each sample is in one batch of one rank, whatever its source's weight; ranks have equally many
    batches, the last of which may hold empty rows. No samples: no batches.
    """

    def __post_init__(self) -> None:
        rows = []
        for s, source in enumerate(self.sources):
            lengths = source.samples.lengths
            packed = pack(lengths, range(len(lengths)), self.seq_len)
            rows += [[SampleRef(s, i) for i in row] for row in packed]
        missing = -len(rows) % (self.micro_batch_size * self.data_size)
        self.rows = self._part_of(rows + [[]] * missing)

    def __len__(self) -> int:
        return len(self.rows) // self.micro_batch_size

    def __getitem__(self, index: int) -> Batch:
        index = range(len(self))[index]  # refuses what is outside
        first = index * self.micro_batch_size
        return self._batch(self.rows[first : first + self.micro_batch_size])

    def first_row(self) -> Batch:
        """Return a microbatch of the first row alone."""
        return self._batch([*self.rows[:1], *[[]] * (self.micro_batch_size - 1)])

    def _batch(self, rows: Rows) -> Batch:
        return self._collate([self._read(row) for row in rows])
