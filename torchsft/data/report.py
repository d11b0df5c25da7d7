"""What became of the rows of a source."""

from collections import Counter
from dataclasses import dataclass, field

from torchsft.data.cache import Block
from torchsft.data.rows import RowError, Strings
from torchsft.data.template import WeightedTokens

LISTED_FAULTS = 100


@dataclass
class Result:
    """What one row gave: samples, or the fault that makes it useless.

    Attributes:
        number: of the row.
        samples: of at most seq_len tokens.
        notes: codes that are counted.
        ignored: keys that no format knows.
        ends: the token that ends each trained turn.
        kept: why the row is kept, although it has a fault.
    """

    number: int
    samples: list[WeightedTokens] = field(default_factory=list)
    notes: Strings = ()
    ignored: Strings = ()
    ends: tuple[int, ...] = ()
    kept: Strings = ()
    fault: RowError | None = None


@dataclass
class Report:
    """What became of the rows of one source; tokens are those of the samples that are left.

    Attributes:
        counts: what happened how often, to samples (too-long, truncated, split, no-targets) or rows
            (notes of the template, skipped).
        ignored: keys that no format knows, with the number of rows that have them.
        ends: ids of the tokens that end trained turns (as strings, for JSON), with the number of
            these turns.
        faults: the first skipped rows.
        kept: the first rows that have a fault and are kept nevertheless.
    """

    name: str
    path: str
    format: str | None = None
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    max_id: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def add(self, block: Block, results: list[Result]) -> None:
        """Take in further rows.

        Args:
            block: their samples.
            results: what became of them.
        """
        supervised = block.runs["end"] - block.runs["start"]
        self.rows += len(results)
        self.samples += len(block.index) - 1
        self.tokens += len(block.tokens)
        self.supervised_tokens += int(supervised.sum())
        self.longest = max(self.longest, int(block.index["length"].max()))
        self.max_id = max(self.max_id, int(block.tokens.max(initial=0)))
        for result in results:
            self.counts.update(result.notes)
            self.ignored.update(result.ignored)
            self.ends.update(map(str, result.ends))
            self.kept += result.kept
            if result.fault:
                self.counts["skipped"] += 1
                self.faults.append(str(result.fault))
        del self.faults[LISTED_FAULTS:], self.kept[LISTED_FAULTS:]

    def __str__(self) -> str:
        """Return one line: numbers, what happened how often, and ignored keys."""
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        parts = [
            f"{self.name} ({self.format}): {self.rows:,} rows, {self.samples:,} samples, "
            f"{self.tokens:,} tokens ({share:.1f} % supervised), longest {self.longest:,}"
        ]
        parts += [f"{name} {count:,}" for name, count in sorted(self.counts.items())]
        if self.ignored:
            keys = [f"{key} ({count:,})" for key, count in sorted(self.ignored.items())]
            parts.append(f"ignored keys {', '.join(keys)}")
        return "; ".join(parts)
