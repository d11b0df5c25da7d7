"""Sources in memory, as the loaders take them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchsft.data.template import Sample


class Samples(list):
    """Samples with `.lengths`, as the cache's."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sample.tokens) for sample in self], dtype=np.int32)


@dataclass
class Listed:
    """Like `prepare.Prepared`."""

    samples: Sequence[Sample]
    weight: float = 1.0
    name: str = "s"
    digest: str = ""

    def __post_init__(self) -> None:
        self.samples = Samples(self.samples)
        named = "".join(f"{sample.id}:{sample.tokens.tolist()};" for sample in self.samples)
        self.digest = self.digest or hashlib.sha256(named.encode()).hexdigest()[:16]


@dataclass
class Read:
    """Like `prepare.Stream`: rows of one or several samples each; notes at which rows it was
    opened.
    """

    rows: Sequence[Sequence[Sample]]
    weight: float = 1.0
    name: str = "s"
    opened: list[int] = field(default_factory=list)

    def open(self, start: int) -> Iterator[tuple[int, int, Sample]]:
        self.opened.append(start)
        for number, samples in enumerate(self.rows[start:], start + 1):
            for part, sample in enumerate(samples, 1):
                yield number, part if len(samples) > 1 else 0, sample


def numbered(lengths: Sequence[int], name: str = "s", first: int = 1000) -> list[Sample]:
    """Samples of these lengths: token first + k is in sample k alone, so that a batch shows which
    samples it holds.
    """
    return [
        Sample(f"{name}:{k}", [first + k] * n, [0.0] + [1.0] * (n - 1))
        for k, n in enumerate(lengths)
    ]
