"""What an inspection found, as data: numbers of each source, findings, and the rows that training
will begin with.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.inspection.lint import LEVELS, Finding, Linter, beyond_positions, runs_of
from tools.inspection.reading import Reader
from torchsft.config import Data
from torchsft.data.cache import Samples
from torchsft.data.preparer import Preparer
from torchsft.data.stream import TrainLoader
from torchsft.data.template import Sample

if TYPE_CHECKING:
    from tools.inspection.compare import Comparison, Pair

BINS = 40
UNSHOWN = ("samples", "origin")  # fields of `Inspected` that are no numbers
OUTCOMES = {  # of data.prepare's counts, as sentences; numbers stand before them
    "too-long": "left out: longer than --data.seq-len",
    "no-targets": "left out: nothing to train",
    "skipped": "left out: cannot be used",
    "truncated": "cut to --data.seq-len",
    "split": "cut into pieces",
    "split-by-turn": "split by turn: the chat template rewrites history",
    "closed-reasoning": "reasoning closed as in inference",
    "context-restored": "behind the prompt of inference, which the rendering of the whole "
    "conversation changes",
    "split-into-documents": "split where their documents begin",
}
NOTES = {  # what can be told of one sample
    "one-of-several": "Split into several samples",
    "full-length": "As long as --data.seq-len",
}


@dataclass
class Inspected:
    """One source, which the loader of training takes as it is.

    Attributes:
        rows: read, usable or not.
        origin: what made the samples, with the open source; None: nothing can be read again.
        counts: of data.prepare: what became of rows and samples.
        ignored: of data.prepare: keys that mean nothing, with the number of rows that have them.
        kept: why rows of which the chat template loses context are kept nevertheless, as sentences.
        served: rows that were compared with serving.
        supervised_tokens, tokens, longest, histogram: of `samples`; filled in by `count`.
        histogram: (edges [n + 1], counts [n]); bin i holds lengths of edges[i] to edges[i + 1] - 1.
    """

    name: str
    path: str
    format: str
    weight: float
    evaluation: bool
    rows: int
    samples: Samples
    digest: str = ""
    origin: Preparer | None = None
    counts: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    served: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    histogram: tuple[list[int], list[int]] = ((), ())

    def count(self, checked: Iterator[Sample]) -> Iterator[Sample]:
        """Pass samples on, and count their supervised tokens on the way."""
        lengths = self.samples.lengths
        self.tokens = int(lengths.sum())
        self.longest = int(lengths.max(initial=0))
        self.histogram = histogram(lengths)
        for sample in checked:
            self.supervised_tokens += int((sample.weights > 0).sum())
            yield sample

    def outcomes(self) -> list[str]:
        """Return sentences on what did not become a sample as it was."""
        known = [
            f"{n:,} {OUTCOMES[what]}" for what, n in self.counts.items() if n and what in OUTCOMES
        ]
        return known or ["every row became a sample"]


@dataclass
class Plan:
    """The first epoch, packed as training packs it, and how long the training is.

    Attributes:
        rows: of the first epoch, in order: (source, sample) of each document.
        tokens: in them.
        steps: of the whole training.
        epochs: of the whole training.
    """

    rows: list[list[tuple[int, int]]]
    tokens: int
    steps: int
    epochs: float

    def fill(self, seq_len: int) -> float:
        """Return the share of the rows' room that holds tokens."""
        return self.tokens / max(1, len(self.rows) * seq_len)


@dataclass
class Inspection:
    """Everything that is shown.

    Attributes:
        model: its directory.
        data, training: options.
        left_out: why not every sample was read, as a sentence; "" where every one was.
    """

    model: str
    data: Data
    training: dict[str, Any]
    reader: Reader
    sources: list[Inspected]
    findings: list[Finding]
    plan: Plan
    left_out: str = ""
    comparison: Comparison | None = None

    @property
    def trained(self) -> list[Inspected]:
        """The sources of --data.train."""
        return [source for source in self.sources if not source.evaluation]

    def tally(self) -> list[tuple[str, str, int]]:
        """Return (level, reason, number of findings): errors, warnings, notes; each by number."""
        found = Counter((finding.level, finding.reason) for finding in self.findings)
        rows = [(level, reason, n) for (level, reason), n in found.items()]
        return sorted(rows, key=lambda row: (LEVELS.index(row[0]), -row[2], row[1]))

    def level(self, name: str) -> int:
        """Return the number of errors, warnings or notes."""
        return sum(finding.level == name for finding in self.findings)

    def wrong(self) -> set[tuple[str, str]]:
        """Return (source, sample) of errors and warnings: what is to be looked at first."""
        return {
            (finding.source, finding.sample) for finding in self.findings if finding.level != "note"
        }

    def plan_text(self) -> str:
        """Return the steps in words."""
        batch = self.training["global_batch_size"]
        epochs = f"{self.plan.epochs:g} epoch{'s' * (self.plan.epochs != 1)}"
        return f"{plural(self.plan.steps, 'step')} of {plural(batch, 'row')}, {epochs}"

    def options(self) -> list[tuple[str, str]]:
        """Return the options of --data that shape samples, as on the command line."""
        names = (
            "map",
            "system",
            "seq_len",
            "mask",
            "reasoning",
            "template_kwargs",
            "chat_template",
            "template_date",
            "on_lost_context",
            "truncation",
            "packing",
            "packing_buffer",
        )
        values = [(name.replace("_", "-"), getattr(self.data, name)) for name in names]
        return [(name, str(value)) for name, value in values if value not in ("", None)]


def notes(source: Inspected, sample: Sample, seq_len: int) -> list[str]:
    """Return what happened to a sample, as far as it shows."""
    found = []
    if "/" in sample.id.removeprefix(source.name):
        found.append("one-of-several")
    has_cut_samples = source.counts.get("truncated", 0) + source.counts.get("split", 0) > 0
    if has_cut_samples and len(sample.tokens) == seq_len:
        found.append("full-length")
    return found


def plural(n: int, word: str) -> str:
    """Return a number of things in words."""
    return f"{n:,} {word}{'s' * (n != 1)}"


def histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """Count lengths in at most BINS bins of equal width that begin at 0.

    Args:
        lengths: int32 [N]

    Returns:
        Edges [n + 1] and counts [n]; bin i holds lengths of edges[i] to edges[i + 1] - 1.
    """
    longest = int(lengths.max(initial=0))
    width = max(1, -(-(longest + 1) // BINS))
    counts = np.bincount(lengths // width) if len(lengths) else np.zeros(1, int)
    return [i * width for i in range(len(counts) + 1)], counts.tolist()


def lint(
    linter: Linter, sources: Sequence[Inspected], watch: Any, positions: int | None = None
) -> list[Finding]:
    """Check every sample of every source, training first, and count on the way.

    Args:
        watch: passes samples through, such as a progress bar.
        positions: of the model; None: not known, not checked.
    """
    found = []
    for source in sorted(sources, key=lambda source: source.evaluation):
        checked = source.count(watch(source.samples))
        found += linter.check(checked, source.name, source.format, source.evaluation)
        if positions is not None:
            found += beyond_positions(source.samples, source.name, positions)
    return found


def plan(
    sources: Sequence[Inspected],
    data: Data,
    *,
    global_batch_size: int,
    seed: int,
    steps: int | None,
    epochs: float | None,
) -> Plan:
    """Return rows and steps, from the loader that training uses.

    Args:
        steps, epochs: as the user gives them; neither: 1 epoch.
    """
    numbers = [i for i, source in enumerate(sources) if len(source.samples)]
    if not numbers:
        return Plan([], 0, 0, 0.0)
    loader = TrainLoader(
        [sources[i] for i in numbers],
        seq_len=data.seq_len,
        global_batch_size=global_batch_size,
        micro_batch_size=1,
        data_rank=0,
        data_size=1,
        seed=seed,
        pad_token_id=0,
        packing=data.packing,
        buffer=data.packing_buffer,
    )
    rows: list[list[tuple[int, int]]] = []
    while loader.start.epoch == 0:
        rows += [[(numbers[s], i) for s, i in row] for row in loader.plan().rows if row]
    tokens = sum(int(sources[s].samples.lengths[i]) for row in rows for s, i in row)
    first = -(-len(rows) // global_batch_size)
    if steps is not None:
        return Plan(rows, tokens, steps, round(steps / first, 2))
    return Plan(rows, tokens, loader.steps_in(epochs or 1), epochs or 1)


def write_json(path: Path, inspection: Inspection) -> None:
    """Write one JSON object a line for each sample: id, source, tokens, weights, text, the keys
    that are ignored in its source (with the number of rows that have them), and where another tool
    differs.
    """
    pairs = inspection.comparison.pairs if inspection.comparison is not None else ()
    different = {
        (pair.source, pair.ours.id): _differences(pair) for pair in pairs if pair.ours is not None
    }
    with path.open("w", encoding="utf-8") as file:
        for source in inspection.sources:
            for sample in source.samples:
                record = {
                    "id": sample.id,
                    "source": source.name,
                    "tokens": sample.tokens.tolist(),
                    "weights": [number(weight) for weight in sample.weights.tolist()],
                    "text": inspection.reader.text(sample.tokens),
                    "ignored": source.ignored,
                }
                if inspection.comparison is not None:
                    record["differences"] = different.get((source.name, sample.id), [])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _differences(pair: Pair) -> list[dict[str, Any]]:
    """Return each stretch of tokens that differ; `at`: in the tokens of both sides, put side by
    side.
    """
    found = []
    for start, end, reason, side in pair.stretches():
        found.append(
            {"at": start, "tokens": pair.tokens[start:end].tolist(), "reason": reason, "only": side}
        )
    return found


def number(value: float) -> float | str:
    """Return a float32 in few digits; one that JSON does not know as a string."""
    return float(f"{value:.6g}") if np.isfinite(value) else str(value)


def weight_runs(weights: np.ndarray) -> list[list[Any]]:
    """Return [start, end, weight] of each stretch of one weight above 0."""
    found = []
    for start, end in runs_of(weights):
        changes = np.flatnonzero(np.diff(weights[start:end])) + start + 1
        edges = [start, *changes.tolist(), end]
        for first, last in itertools.pairwise(edges):
            found.append([first, last, number(float(weights[first]))])
    return found


def as_dict(source: Inspected) -> dict[str, Any]:
    """Return the numbers of a source as JSON."""
    plain = {
        each.name: getattr(source, each.name)
        for each in dataclasses.fields(source)
        if each.name not in UNSHOWN
    }
    edges, counts = source.histogram
    return plain | {
        "samples": len(source.samples),
        "histogram": {"edges": edges, "counts": counts},
        "outcomes": source.outcomes(),
    }
