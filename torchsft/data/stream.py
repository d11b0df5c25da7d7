"""The order of training: an endless stream of global batches that is the same for any number of
ranks and workers.

    draws      an epoch draws each sample of each source `weight` times, in an order that a
               permutation of (seed, epoch) gives
    windows    `buffer` draws are packed together; the emptiest row stays open for the next window
               (the remainder)
    rows       of a window, shuffled by (seed, epoch, window)
    steps      the next `global_batch_size` rows, across windows; the last step of an epoch is
               filled up with empty rows, which weigh nothing in the loss, so every sample is
               trained exactly as often as its source's weight says

Permutations are computed place by place, so nothing here grows with the data. The state is (epoch,
window, rows of it that are consumed, remainder): a continuation redoes one window. Streaming
sources are drawn from in the order of their files instead.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from torchsft.config import InputError
from torchsft.data.batch import Batch, collate
from torchsft.data.packing import Method, deal, pack
from torchsft.data.template import Sample

PLACES, SAMPLES, ROWS, STREAM = range(4)  # what a permutation is of: a part of its key
CHANGED = "the training data changed since the checkpoint"


def permute(places: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where a permutation of [0, n) that `key` decides takes some places. int64 -> int64, without
    an array of n.

    A Feistel network permutes the smallest [0, 4^k) that is large enough; what lands outside [0, n)
    goes through it again.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)
    found = np.asarray(places).astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for each in keys:
            mixed = (right + each) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        found[outside] = (left << np.uint64(half)) | right
        outside = outside[found[outside] >= n]
    return found.astype(np.int64)


@dataclass
class Step:
    """What one data rank does in one optimizer step."""

    microbatches: list[Batch]  # this rank's part of the global batch, `micro_batch_size` rows each
    epoch: int  # counted from 0
    # in order; without `cost`, those of ranks 0, 1, ... in a row are the global order
    sample_ids: list[str]
    state: dict[str, Any]  # of the loader behind this step


def microbatches_per_step(global_batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """Microbatches of one data rank in a step; arguments as in the loaders. Raises InputError: the
    sizes do not divide.
    """
    rows_per_round = micro_batch_size * data_size
    if global_batch_size % rows_per_round:
        nearest = -(-global_batch_size // rows_per_round) * rows_per_round
        fault = (
            f"--train.global-batch-size ({global_batch_size}) must divide by "
            f"--train.micro-batch-size"
        )
        fault += (
            f" ({micro_batch_size}) times the number of data-parallel ranks ({data_size}); set it "
            f"to {nearest}"
        )
        raise InputError(fault)
    return global_batch_size // rows_per_round


class _Window(NamedTuple):
    draws: list[list[Any]]
    lengths: list[int]  # of the draws
    rows: list[list[int]]  # places in `draws`
    after: dict[str, Any]  # where the next window begins
    remainder: list[list[Any]]  # draws of its first row
    last: bool  # of its epoch


@dataclass(eq=False)
class _Loader(Iterator[Step]):
    """From draws to the steps of one data rank, endless. A draw is [number of a source, its sample
    or the place of that].

    Raises InputError: no samples, one that is longer than a row (when it is drawn), or sizes that
    do not divide.
    """

    sources: Sequence[Any]  # the same ones, in the same order, on every rank
    _: KW_ONLY
    seq_len: int  # tokens of a row
    # rows of a step over all data ranks; divides by micro_batch_size * data_size
    global_batch_size: int
    micro_batch_size: int  # rows of a microbatch
    # which part of each global batch is this loader's; ranks that share data (pp, cp, tp) share it
    data_rank: int
    data_size: int  # number of parts
    seed: int  # of the order
    pad_token_id: int  # see `collate`
    packing: Method = "best-fit"
    buffer: int = 8192  # draws that are packed together
    # of a row with documents of these lengths; ranks get equal cost
    cost: Callable[[list[int]], float] | None = None

    def __post_init__(self) -> None:
        # may refuse
        microbatches_per_step(self.global_batch_size, self.micro_batch_size, self.data_size)
        self.cursor: dict[str, Any] = {"epoch": 0, "window": 0}  # where the window begins
        self.remainder: list[list[Any]] = []  # draws of its first row
        self.row = 0  # rows of it that are consumed
        self.taken = [0] * len(self.sources)  # samples that are consumed of each source
        self.sizes = [0] * len(self.sources)  # samples of each source, 0 while that is not known
        self.window: _Window | None = None  # packed when it is needed
        # what a state belongs to
        self.content = [f"{source.name} streamed" for source in self.sources]

    def _sample(self, source: int, sample: int | Sample) -> Sample:
        return sample if isinstance(sample, Sample) else self.sources[source].samples[sample]

    def _pack(self, cursor: dict[str, Any], remainder: list[Any]) -> _Window:
        draws, lengths, after, last = self._draw(cursor)
        draws, lengths = (
            remainder + draws,
            [len(self._sample(*draw).tokens) for draw in remainder] + lengths,
        )
        rows = pack(lengths, range(len(draws)), self.seq_len, self.packing, opened=len(remainder))
        left: list[int] = []
        if not last and self.packing != "none":
            left = rows.pop(
                min(range(len(rows)), key=lambda row: sum(lengths[i] for i in rows[row]))
            )
        # Packing begins a window with its longest samples; without this, so would the epoch.
        order = permute(
            range(len(rows)), len(rows), self.seed, ROWS, cursor["epoch"], cursor["window"]
        )
        return _Window(
            draws, lengths, [rows[i] for i in order.tolist()], after, [draws[i] for i in left], last
        )

    def plan(self) -> tuple[list[list[Any]], int, dict[str, Any]]:
        """Decide the next step and go on behind it: this rank's rows of draws, epoch and state. One
        thread at a time.
        """
        epoch, rows, costs = self.cursor["epoch"], [], []
        while len(rows) < self.global_batch_size:
            window = self.window = self.window or self._pack(self.cursor, self.remainder)
            if self.row > len(window.rows):  # of a stream, which has no digest
                text = f"{self.row} rows are done of a window that has {len(window.rows)} now"
                raise InputError(f"{CHANGED}: {text}; restore it or start a new run")
            part = window.rows[self.row : self.row + self.global_batch_size - len(rows)]
            rows += [[window.draws[i] for i in row] for row in part]
            costs += (
                [self.cost([window.lengths[i] for i in row]) for row in part] if self.cost else []
            )
            self.row += len(part)
            if self.row == len(window.rows):
                self.cursor, self.remainder, self.row, self.window = (
                    window.after,
                    window.remainder,
                    0,
                    None,
                )
                if window.last:
                    break
        for source, _ in (draw for row in rows for draw in row):
            self.taken[source] += 1
        missing, part = self.global_batch_size - len(rows), self.global_batch_size // self.data_size
        mine = range(self.data_rank * part, (self.data_rank + 1) * part)
        if self.cost:
            mine = deal(costs + [0.0] * missing, self.data_size, self.micro_batch_size)[
                self.data_rank
            ]
        return [rows[i] if i < len(rows) else [] for i in mine], epoch, self.state_dict()

    def build(self, rows: list[list[Any]], epoch: int, state: dict[str, Any]) -> Step:
        """Read and collate what `plan` returned; in any thread."""
        samples = [[self._sample(*draw) for draw in row] for row in rows]
        starts = range(0, len(rows), self.micro_batch_size)
        batches = [
            collate(samples[i : i + self.micro_batch_size], self.seq_len, self.pad_token_id)
            for i in starts
        ]
        return Step(batches, epoch, [sample.id for row in samples for sample in row], state)

    def __next__(self) -> Step:
        return self.build(*self.plan())

    def state_dict(self) -> dict[str, Any]:
        """Where the stream goes on, as plain JSON: the same on every rank and for any number of
        ranks.
        """
        remainder = [
            [s, [x.id, x.tokens.tolist(), x.weights.tolist()] if isinstance(x, Sample) else x]
            for s, x in self.remainder
        ]
        place = {"row": self.row, "remainder": remainder, "taken": [*self.taken]}
        return self.cursor | place | {"of": self._described()}

    def source_epochs(self, state: dict[str, Any]) -> dict[str, float]:
        """How often each source has been gone through, as of `state`; 0 for a streaming one that
        has not ended yet.
        """
        taken = zip(self.sources, state["taken"], self.sizes, strict=True)
        return {source.name: n / size if size else 0.0 for source, n, size in taken}

    def _described(self) -> str:
        data = " + ".join(
            f"{what} at weight {s.weight:g}"
            for s, what in zip(self.sources, self.content, strict=True)
        )
        order = (
            f"--data.packing {self.packing}, --data.packing-buffer {self.buffer}, --train.seed "
            f"{self.seed}"
        )
        return f"{data} (--data.seq-len {self.seq_len}, {order})"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the step at which `state` was taken, for the same data and options that
        decide its order.
        """
        then, now = state.get("of", "data of another version of torchsft"), self._described()
        if then != now:
            raise InputError(
                f"{CHANGED}: {then} then, {now} now; restore files and options or start a new run"
            )
        self.cursor, self.window = {name: state[name] for name in self.cursor}, None
        self.row, self.taken = state["row"], [*state["taken"]]
        self.remainder = [
            [s, Sample(*x) if isinstance(x, list) else x] for s, x in state["remainder"]
        ]


class TrainLoader(_Loader):
    """Steps from prepared sources (see `prepare.Prepared`); arguments as in `_Loader`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes = [len(source.samples) for source in self.sources]
        self.content = [
            f"{len(source.samples)} samples (digest {source.digest})" for source in self.sources
        ]
        if not self.sizes or not all(self.sizes):
            raise InputError(
                "--data.train has no samples to train on; check the files and --data.truncation"
            )

    def _drawn(self, epoch: int) -> np.ndarray:
        """Draws of each source before an epoch: `weight` times its samples, but at least one an
        epoch.
        """
        counts = [
            epoch * source.weight * n + 0.5
            for source, n in zip(self.sources, self.sizes, strict=True)
        ]
        return np.maximum(np.array(counts, dtype=np.int64), epoch)

    def _draw(
        self, cursor: dict[str, int]
    ) -> tuple[list[list[int]], list[int], dict[str, int], bool]:
        epoch, window = cursor["epoch"], cursor["window"]
        before, behind = self._drawn(epoch), self._drawn(epoch + 1)
        ends = np.cumsum(behind - before)
        total, stop = int(ends[-1]), (window + 1) * self.buffer
        places = permute(
            range(window * self.buffer, min(stop, total)), total, self.seed, PLACES, epoch
        )
        source = np.searchsorted(ends, places, side="right")
        turn, sample = np.divmod(
            places - ends[source] + behind[source], np.array(self.sizes)[source]
        )
        lengths = np.empty_like(sample)
        turn = turn * len(self.sizes) + source
        for each in np.unique(turn).tolist():  # each time through a source has an order of its own
            these, s = turn == each, each % len(self.sizes)
            sample[these] = permute(sample[these], self.sizes[s], self.seed, SAMPLES, each)
            lengths[these] = self.sources[s].samples.lengths[sample[these]]
        after = (
            {"epoch": epoch, "window": window + 1}
            if stop < total
            else {"epoch": epoch + 1, "window": 0}
        )
        return np.stack([source, sample], 1).tolist(), lengths.tolist(), after, stop >= total

    def steps_in_epoch(self, epoch: int, share: Fraction | int = 1) -> int:
        """Optimizer steps of an epoch, counted from 0, found by packing it; epochs differ slightly.

        With a `share` the first steps whose samples are at least this share of the epoch's."""
        due = share * int((self._drawn(epoch + 1) - self._drawn(epoch)).sum())
        cursor, remainder = {"epoch": epoch, "window": 0}, []
        rows = samples = 0
        while samples < due:
            window = self._pack(cursor, remainder)
            cursor, remainder = window.after, window.remainder
            for row in window.rows:
                if samples < due:
                    rows += 1
                    samples += len(row)
        return -(-rows // self.global_batch_size)

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs from the beginning, the last of which may be a part
        (see `steps_in_epoch`).
        """
        whole = int(epochs)
        rest = Fraction(str(epochs)) - whole  # of the decimal number that was written
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        return steps + self.steps_in_epoch(whole, rest)


class StreamLoader(_Loader):
    """Steps from sources that are read while training (see `prepare.Stream`); arguments as in
    `_Loader`.

    Sources are drawn from in turn, by weight (2.0: twice as often). `open(n)` yields (row, part,
    sample) from behind row n on.

    A source that ends begins again, and windows run across that; an epoch has passed when each has
    ended once more. Every rank reads and tokenises the whole stream, as what is packed together
    depends on all lengths.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # Of each source: row and part that were drawn last, samples from its beginning to its end,
        # samples drawn. 0: not yet.
        self.cursor["places"] = [[0, 0, 0, 0] for _ in self.sources]
        self.at: dict[str, Any] = {}  # the cursor at which `readers` stand
        self.readers: list[Iterator[tuple[int, int, Sample]]] = []

    def _open(self, source: Any, row: int, part: int) -> Iterator[tuple[int, int, Sample]]:
        """A reader behind the sample that was drawn last."""
        reader = source.open(max(row - 1, 0))
        if row and next((each[:2] for each in reader if each[:2] >= (row, part)), None) != (
            row,
            part,
        ):
            raise InputError(
                f"{CHANGED}: {source.name} has no sample {row}/{part} now; restore it "
                f"or start a new run"
            )
        return reader

    def _draw(
        self, cursor: dict[str, Any]
    ) -> tuple[list[list[Any]], list[int], dict[str, Any], bool]:
        places, draws = [[*place] for place in cursor["places"]], []
        if cursor != self.at:
            self.readers = [
                self._open(source, *place[:2])
                for source, place in zip(self.sources, places, strict=True)
            ]
        self.at = {}  # until this is done: an error leaves the readers elsewhere
        while len(draws) < self.buffer:
            s = min(range(len(places)), key=lambda s: (places[s][3] + 1) / self.sources[s].weight)
            place, source = places[s], self.sources[s]
            row, part, sample = next(self.readers[s], (0, 0, None))
            if sample is not None:
                place[:2], place[3] = (row, part), place[3] + 1
                draws.append([s, sample])
            elif place[0]:
                place[:3], self.readers[s] = (0, 0, place[2] or place[3]), source.open(0)
            else:
                raise InputError(
                    f"--data.train has no samples in {source.name!r}; check the file "
                    f"and --data.truncation"
                )
        self.sizes = [size for _, _, size, _ in places]
        epoch = min(drawn // size if size else 0 for _, _, size, drawn in places)
        self.at = {"epoch": epoch, "window": cursor["window"] + 1, "places": places}
        draws = [
            draws[i]
            for i in permute(
                range(len(draws)), len(draws), self.seed, STREAM, cursor["window"]
            ).tolist()
        ]
        return draws, [len(sample.tokens) for _, sample in draws], self.at, False


class Background(Iterator[Step]):
    """Steps of a loader, in its order: one thread plans, `workers` build beside training (0: only
    when a step is asked for).

    On a CUDA device they come in pinned memory. What a thread raises is raised by the `next` that
    waits for its step. `waited`: seconds that the last step was waited for.
    """

    def __init__(
        self, loader: TrainLoader | StreamLoader, workers: int, device: torch.device | str = "cpu"
    ) -> None:
        self.loader, self.device = loader, torch.device(device)
        self.ahead = max(2, workers) if workers else 0
        self.waited, self._state = 0.0, loader.state_dict()
        self._steps: deque[Future[Future[Step]]] = deque()
        self._planner, self._builders = ThreadPoolExecutor(1), ThreadPoolExecutor(max(workers, 1))

    def _plan(self) -> Future[Step]:
        # refused when the interpreter ends, which would wait for all that is to be planned yet
        self._builders.submit(int)
        return self._builders.submit(self._build, self.loader.plan())

    def _build(self, plan: tuple[list[list[Any]], int, dict[str, Any]]) -> Step:
        step = self.loader.build(*plan)
        if self.device.type == "cuda":
            # of this thread; else every rank's pinning would make a context on GPU 0
            torch.cuda.set_device(self.device)
            step.microbatches = [batch.pin_memory() for batch in step.microbatches]
        return step

    def __next__(self) -> Step:
        began = time.perf_counter()
        while len(self._steps) <= self.ahead:
            self._steps.append(self._planner.submit(self._plan))
        step = self._steps[0].result().result()  # what failed stays the next one
        self._steps.popleft()
        self.waited, self._state = time.perf_counter() - began, step.state
        return step

    def state_dict(self) -> dict[str, Any]:
        """The loader's state behind the last step that was handed out, whatever is prepared
        already.
        """
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the loader's; what was prepared is thrown away."""
        wait(self._steps)
        self._steps.clear()
        self.loader.load_state_dict(state)
        self._state = self.loader.state_dict()

    def close(self) -> None:
        """End the threads; nothing more can be asked for."""
        self._planner.shutdown(cancel_futures=True)
        self._builders.shutdown(cancel_futures=True)


class EvalSet(Sequence[Batch]):
    """One data rank's batches of an evaluation set, collated when they are asked for; arguments and
    errors as in `_Loader`.

    Each sample is in one batch of one rank, whatever its source's weight; ranks have equally many
    batches, the last of which
    may hold empty rows. No samples: no batches.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        seq_len: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        pad_token_id: int,
    ) -> None:
        self.seq_len, self.micro_batch_size, self.pad_token_id = (
            seq_len,
            micro_batch_size,
            pad_token_id,
        )
        packed = [
            (each.samples, pack(each.samples.lengths, range(len(each.samples)), seq_len))
            for each in sources
        ]
        # a row is of one source
        rows = [(samples, row) for samples, of_source in packed for row in of_source]
        # rows of each rank
        part = -(-len(rows) // (micro_batch_size * data_size)) * micro_batch_size
        self.rows = (rows + [([], [])] * (part * data_size - len(rows)))[
            data_rank * part : (data_rank + 1) * part
        ]

    def __len__(self) -> int:
        return len(self.rows) // self.micro_batch_size

    def __getitem__(self, index: int) -> Batch:
        begin = range(len(self))[index] * self.micro_batch_size  # refuses what is outside
        rows = self.rows[begin : begin + self.micro_batch_size]
        return collate(
            [[samples[i] for i in row] for samples, row in rows], self.seq_len, self.pad_token_id
        )
