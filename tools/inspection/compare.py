"""Our mask beside that of another tool, token by token: what is trained on one side only, and why,
as far as it shows.

`matching.py` finds which document belongs to which sample. Of a pair, tokens are put side by side;
a token that differs is in one of them only, or trained in one of them only.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tools.inspection.lint import Finding
from tools.inspection.matching import SourceSample, match, row_number
from tools.inspection.others import Document, Other
from tools.inspection.reading import Reader
from tools.inspection.reasons import REASONS, Explanation
from tools.inspection.report import Inspected
from torchsft.data.template import Sample

LEARNED = ("answer", "part-of-answer", "end-of-turn", "reasoning")
PLACE = re.compile(r", (?:line|row) (\d+)\Z")  # of a row, in a finding
MOST_ALIGNED = 3000  # tokens between what is equal at both ends; of more, none are aligned


class Stretch(NamedTuple):
    """Differing tokens [start, end) that follow each other, of one reason and side.

    Attributes:
        start, end: in the tokens of both sides, put side by side.
        side: that alone has them, or alone trains them.
    """

    start: int
    end: int
    reason: str
    side: str


class ReasonCount(NamedTuple):
    """How often a reason occurs on a side.

    Attributes:
        samples: in which it occurs.
        tokens: of which it is the reason.
    """

    reason: str
    side: str
    samples: int
    tokens: int


@dataclass
class Pair:
    """A sample of ours, a document of theirs, or both, and their tokens side by side.

    Attributes:
        tokens: int64 [n], those of both, in order.
        sides: [n] of "both", "ours", "theirs": who has the token.
        ours_trained, theirs_trained: bool [n], trained by us, by them.
        reasons: [n], why a token differs; "" of one that does not.
        missing: why one side has nothing.
    """

    source: str
    ours: Sample | None
    theirs: Document | None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sides: list[str] = field(default_factory=list)
    ours_trained: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    theirs_trained: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    reasons: list[str] = field(default_factory=list)
    missing: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether both sides have something."""
        return self.ours is not None and self.theirs is not None

    @property
    def differs(self) -> bool:
        """Whether there is a difference, or one side has nothing."""
        return any(self.reasons) or not self.is_whole

    def side_of(self, i: int) -> str:
        """Return the side that alone has token i, or alone trains it."""
        if self.sides[i] != "both":
            return self.sides[i]
        return "ours" if self.ours_trained[i] else "theirs"

    def tally(self) -> Counter[tuple[str, str]]:
        """Return the number of differing tokens, by (reason, side)."""
        counts: Counter[tuple[str, str]] = Counter()
        for i, reason in enumerate(self.reasons):
            if reason:
                counts[reason, self.side_of(i)] += 1
        return counts

    def stretches(self) -> list[Stretch]:
        """Return the stretches of differing tokens, in order."""
        found: list[Stretch] = []
        for i, reason in enumerate(self.reasons):
            if not reason:
                continue
            side = self.side_of(i)
            last = found[-1] if found else None
            if last and (last.end, last.reason, last.side) == (i, reason, side):
                found[-1] = last._replace(end=i + 1)
            else:
                found.append(Stretch(i, i + 1, reason, side))
        return found


@dataclass
class Comparison:
    """All pairs.

    Attributes:
        other: name of the other tool or file.
    """

    other: str
    pairs: list[Pair]

    def samples(self) -> dict[str, int]:
        """Return how many samples are equal, different, only ours, only theirs.

        What only one side has is not counted as different.
        """
        whole = [pair for pair in self.pairs if pair.is_whole]
        different = sum(pair.differs for pair in whole)
        return {
            "equal": len(whole) - different,
            "different": different,
            "only ours": sum(pair.theirs is None for pair in self.pairs),
            "only theirs": sum(pair.ours is None for pair in self.pairs),
        }

    def trained(self) -> dict[str, int]:
        """Return how many tokens both train, we alone, they alone.

        A token that one side alone has can only be trained by that side.
        """
        both = ours = theirs = 0
        for pair in self.pairs:
            both += int((pair.ours_trained & pair.theirs_trained).sum())
            ours += int((pair.ours_trained & ~pair.theirs_trained).sum())
            theirs += int((pair.theirs_trained & ~pair.ours_trained).sum())
        return {"both": both, "ours only": ours, "theirs only": theirs}

    def tally(self) -> list[ReasonCount]:
        """Return how often each reason occurs, that of most samples first."""
        samples: Counter[tuple[str, str]] = Counter()
        tokens: Counter[tuple[str, str]] = Counter()
        for pair in self.pairs:
            of_pair = pair.tally()
            tokens += of_pair
            samples.update(of_pair.keys())
        counts = []
        for (reason, side), n in samples.most_common():
            counts.append(ReasonCount(reason, side, n, tokens[reason, side]))
        return counts

    def findings(self) -> Iterator[Finding]:
        """Yield a note for each of our samples that differs.

        What is theirs alone is no sample of ours, and has none.
        """
        for pair in self.pairs:
            if pair.ours is None or not pair.differs:
                continue
            text = pair.missing
            if not text:
                counts = pair.tally().items()
                parts = [f"{reason}: {n:,} only {side}" for (reason, side), n in counts]
                text = f"tokens, {', '.join(parts)}"
            yield Finding("mask-differs", pair.source, pair.ours.id, text)


def compare(
    other: Other, sources: Sequence[Inspected], reader: Reader, findings: Sequence[Finding] = ()
) -> Comparison:
    """Put the samples of sources beside the documents of another tool.

    Args:
        other: what the other tool makes of the data.
        sources: ours.
        findings: ours, to say why a row gave no sample.

    Returns:
        Each sample and each document in one pair, with tokens side by side and reasons.
    """
    samples = [SourceSample(source.name, sample) for source in sources for sample in source.samples]
    pairs = [Pair(each.source, each.ours, each.theirs) for each in match(samples, other.documents)]
    matched_rows = {_row(pair) for pair in pairs if pair.is_whole}
    fault_of = _faults(findings)
    for pair in pairs:
        if pair.is_whole:
            _put_side_by_side(pair)
            pair.reasons = _reasons(pair, reader)
        elif pair.ours is None:
            unknown = "no sample of ours comes from it, or has its tokens; see what was left out"
            pair.missing = f"only theirs: {fault_of.get(pair.theirs.row, unknown)}"
            _put_alone(pair, "theirs", "")
        elif _row(pair) in matched_rows:
            pair.missing = REASONS["split-by-turn"]
            _put_alone(pair, "ours", "split-by-turn")
        else:
            refusal = other.refused.get(_row(pair), "it has no such row")
            pair.missing = f"only ours: {refusal}"
            _put_alone(pair, "ours", "")
    return Comparison(other.name, pairs)


def _faults(findings: Sequence[Finding]) -> dict[tuple[str, int], str]:
    """Return why rows gave no sample, by source and number of the row.

    The place in a finding ends with the number.
    """
    faults: dict[tuple[str, int], str] = {}
    for finding in findings:
        place = PLACE.search(finding.sample)
        if place:
            faults[finding.source, int(place[1])] = f"{finding.reason}: {finding.text}"
    return faults


def _row(pair: Pair) -> tuple[str, int]:
    """Return source and number of the row that gave our sample.

    A row may have given several; the number is without the part.
    """
    return pair.source, row_number(pair.ours)


# ---------------------------------------------------------------- tokens side by side


class Section(NamedTuple):
    """Tokens of ours and theirs that stand beside each other.

    Attributes:
        is_equal: whether they are the same.
    """

    is_equal: bool
    ours: slice
    theirs: slice


def _put_side_by_side(pair: Pair) -> None:
    """Fill in tokens, sides and masks of a pair that both sides have.

    Where the texts differ, the tokens of ours come first, and then those of theirs.
    """
    ours = pair.ours.tokens.astype(np.int64)
    theirs = pair.theirs.tokens
    ours_trained = pair.ours.weights > 0
    theirs_trained = pair.theirs.trained
    tokens: list[np.ndarray] = []
    by_us: list[np.ndarray] = []
    by_them: list[np.ndarray] = []
    for section in _align(ours, theirs):
        of_ours = ours[section.ours]
        of_theirs = theirs[section.theirs]
        tokens.append(of_ours)
        by_us.append(ours_trained[section.ours])
        if section.is_equal:
            by_them.append(theirs_trained[section.theirs])
            pair.sides += ["both"] * len(of_ours)
            continue
        tokens.append(of_theirs)
        by_us.append(np.zeros(len(of_theirs), bool))
        by_them.append(np.zeros(len(of_ours), bool))
        by_them.append(theirs_trained[section.theirs])
        pair.sides += ["ours"] * len(of_ours)
        pair.sides += ["theirs"] * len(of_theirs)
    pair.tokens = np.concatenate(tokens).astype(np.int64)
    pair.ours_trained = np.concatenate(by_us).astype(bool)
    pair.theirs_trained = np.concatenate(by_them).astype(bool)
    if pair.sides and pair.sides[0] == "both":
        # nothing comes before it, whatever its label
        pair.ours_trained[0] = False
        pair.theirs_trained[0] = False


def _put_alone(pair: Pair, side: str, reason: str) -> None:
    """Fill in tokens, sides and masks of a pair that one side has alone.

    Args:
        side: ours or theirs.
        reason: of the tokens that are trained; "" for none.
    """
    if side == "ours":
        pair.tokens = pair.ours.tokens.astype(np.int64)
        trained = pair.ours.weights > 0
    else:
        pair.tokens = pair.theirs.tokens
        trained = pair.theirs.trained
    untrained = np.zeros(len(pair.tokens), bool)
    pair.ours_trained = trained if side == "ours" else untrained
    pair.theirs_trained = trained if side == "theirs" else untrained
    pair.sides = [side] * len(pair.tokens)
    pair.reasons = [reason if is_trained else "" for is_trained in trained.tolist()]


def _align(ours: np.ndarray, theirs: np.ndarray) -> Iterator[Section]:
    """Yield the sections of two texts in order, as `difflib.SequenceMatcher` finds them.

    What is equal at both ends is found first, as most texts differ little; the rest takes time that
    grows with its square.

    Args:
        ours: int64 [n]
        theirs: int64 [m]
    """
    shorter = min(len(ours), len(theirs))
    head = _equal_at_start(ours[:shorter], theirs[:shorter])
    rest = shorter - head
    tail = _equal_at_start(ours[len(ours) - rest :][::-1], theirs[len(theirs) - rest :][::-1])
    ours_end = len(ours) - tail
    theirs_end = len(theirs) - tail
    yield Section(True, slice(0, head), slice(0, head))
    middle = ours[head:ours_end]
    their_middle = theirs[head:theirs_end]
    if max(len(middle), len(their_middle)) > MOST_ALIGNED:
        yield Section(False, slice(head, ours_end), slice(head, theirs_end))
    else:
        matcher = difflib.SequenceMatcher(
            None, middle.tolist(), their_middle.tolist(), autojunk=False
        )
        for tag, start, end, their_start, their_end in matcher.get_opcodes():
            of_ours = slice(head + start, head + end)
            of_theirs = slice(head + their_start, head + their_end)
            yield Section(tag == "equal", of_ours, of_theirs)
    yield Section(True, slice(ours_end, len(ours)), slice(theirs_end, len(theirs)))


def _equal_at_start(one: np.ndarray, other: np.ndarray) -> int:
    """Return with how many equal tokens two texts begin.

    Args:
        one, other: int64 [n]
    """
    is_same = one == other
    return len(one) if is_same.all() else int(np.argmin(is_same))


def _reasons(pair: Pair, reader: Reader) -> list[str]:
    """Return the reason of each token that differs, "" of the others.

    Where our row was split by turn, the other tool trains in its one document what we train in
    several samples.
    """
    n = len(pair.tokens)
    have_same_tokens = all(side == "both" for side in pair.sides)
    if have_same_tokens and np.array_equal(pair.ours_trained, pair.theirs_trained):
        return [""] * n
    explanation = Explanation(
        pair.tokens.tolist(),
        pair.sides,
        pair.ours_trained,
        pair.theirs_trained,
        reader,
    )
    reasons = [explanation.reason(i) for i in range(n)]
    is_one_of_several = "/" in pair.ours.id.rpartition(":")[2]
    if is_one_of_several:
        for i, reason in enumerate(reasons):
            if reason in LEARNED and pair.side_of(i) == "theirs":
                reasons[i] = "split-by-turn"
    return reasons
