"""Our mask beside that of another tool, token by token: what is trained on one side only, and why,
as far as it shows.

Documents of the other tool find our samples by the row they were made of, by equal tokens, by
tokens that they share, or by order. Of a pair, tokens are put side by side; a token that differs is
in one of them only, or trained in one of them only.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.inspection.lint import Finding
from tools.inspection.others import Document, Other
from tools.inspection.reading import Reader
from tools.inspection.report import Inspected
from torchsft.data.template import Sample

REASONS = {
    "everything-trained": "Everything is trained",
    "split-by-turn": "The row is split by turn, so that each answer has the context of inference",
    "header": "Role header",
    "end-of-turn": "End of turn",
    "newline-behind-end": "White space behind the end of turn",
    "reasoning": "Reasoning",
    "tool-result": "Tool result",
    "context": "System or user turn, or prompt",
    "answer": "A whole answer (a weight of 0, --data.mask last-turn, a tool that trains fewer "
    "turns)",
    "part-of-answer": "Part of an answer",
    "bos": "BOS",
    "eos": "EOS or other tokens behind the last turn",
    "truncated": "Cut off on the other side",
    "other-tokens": "The tokens themselves differ",
}
LEARNED = ("answer", "part-of-answer", "end-of-turn", "reasoning")
THINKING = re.compile(r"<think>.*?(?:</think>\n*|\Z)", re.DOTALL)
PLACE = re.compile(r", (?:line|row) (\d+)\Z")  # of a row, in a finding
SHINGLE = 5  # tokens; so many in a row that two texts share make them alike
ALIKE = 0.3  # share of the shorter text
COMMON = 20  # texts; what more of them have in common tells nothing
MOST_ALIGNED = 3000  # tokens between what is equal at both ends; of more, none are aligned


@dataclass
class Pair:
    """A sample of ours, a document of theirs, or both, and their tokens side by side.

    Attributes:
        tokens: int64 [n], those of both, in order.
        sides: [n] of "both", "ours", "theirs": who has the token.
        mine, other: bool [n], trained by us, by them.
        reasons: [n], why a token differs; "" of one that does not.
    """

    source: str
    ours: Sample | None
    theirs: Document | None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sides: list[str] = field(default_factory=list)
    mine: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    other: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    reasons: list[str] = field(default_factory=list)
    missing: str = ""

    @property
    def differs(self) -> bool:
        """Whether there is a difference, or one side has nothing."""
        return any(self.reasons) or self.ours is None or self.theirs is None

    def who(self, i: int) -> str:
        """The side that alone has token i, or alone trains it."""
        return self.sides[i] if self.sides[i] != "both" else "ours" if self.mine[i] else "theirs"

    def tally(self) -> Counter[tuple[str, str]]:
        """Tokens by (reason, side)."""
        return Counter((reason, self.who(i)) for i, reason in enumerate(self.reasons) if reason)

    def stretches(self) -> list[tuple[int, int, str, str]]:
        """(start, end, reason, side) of differing tokens that follow each other, in `tokens`."""
        keys = [(reason, self.who(i)) if reason else None for i, reason in enumerate(self.reasons)]
        found, at = [], 0
        for key, group in itertools.groupby(keys):
            behind = at + len(list(group))
            if key:
                found.append((at, behind, *key))
            at = behind
        return found


@dataclass
class Comparison:
    """All pairs; `other`: the name of the other tool or file."""

    other: str
    pairs: list[Pair]

    def samples(self) -> dict[str, int]:
        """How many are equal, different, only ours, only theirs."""
        whole = [pair for pair in self.pairs if pair.ours is not None and pair.theirs is not None]
        different = sum(pair.differs for pair in whole)
        ours = sum(pair.theirs is None for pair in self.pairs)
        theirs = sum(pair.ours is None for pair in self.pairs)
        return {
            "equal": len(whole) - different,
            "different": different,
            "only ours": ours,
            "only theirs": theirs,
        }

    def trained(self) -> dict[str, int]:
        """How many tokens both train, we alone, they alone."""
        both = sum(int((pair.mine & pair.other).sum()) for pair in self.pairs)
        ours = sum(int((pair.mine & ~pair.other).sum()) for pair in self.pairs)
        theirs = sum(int((pair.other & ~pair.mine).sum()) for pair in self.pairs)
        return {"both": both, "ours only": ours, "theirs only": theirs}

    def tally(self) -> list[tuple[str, str, int, int]]:
        """(reason, side, samples, tokens), the most frequent first."""
        samples: Counter[tuple[str, str]] = Counter()
        tokens: Counter[tuple[str, str]] = Counter()
        for pair in self.pairs:
            found = pair.tally()
            tokens += found
            samples.update(found.keys())
        return [(*key, n, tokens[key]) for key, n in samples.most_common()]

    def findings(self) -> Iterator[Finding]:
        """A note for each of our samples that differs."""
        for pair in self.pairs:
            if pair.ours is not None and pair.differs:
                parts = [
                    f"{reason}: {n:,} only {side}" for (reason, side), n in pair.tally().items()
                ]
                yield Finding(
                    "mask-differs",
                    pair.source,
                    pair.ours.id,
                    pair.missing or f"tokens, {', '.join(parts)}",
                )


def compare(
    other: Other, sources: Sequence[Inspected], reader: Reader, findings: Sequence[Finding] = ()
) -> Comparison:
    """Put the samples of sources beside the documents of another tool.

    Args:
        findings: ours, to say why a row gave no sample.
    """
    faults = {
        (f.source, int(place[1])): f"{f.reason}: {f.text}"
        for f in findings
        if (place := PLACE.search(f.sample))
    }
    samples = [(source.name, sample) for source in sources for sample in source.samples]
    pairs = [
        Pair(source, sample, document)
        for source, sample, document in _matched(samples, other.documents)
    ]
    present = {_row(pair) for pair in pairs if pair.ours is not None and pair.theirs is not None}
    for pair in pairs:
        if pair.ours is not None and pair.theirs is not None:
            _side_by_side(pair)
            pair.reasons = _explain(pair, reader)
        elif pair.ours is not None:
            said = other.refused.get(_row(pair), "it has no such row")
            split = _row(pair) in present
            pair.missing = REASONS["split-by-turn"] if split else f"only ours: {said}"
            _alone(pair, "ours", "split-by-turn" if split else "")
        else:
            said = "no sample of ours comes from it, or has its tokens; see what was left out"
            pair.missing = f"only theirs: {faults.get(pair.theirs.row, said)}"
            _alone(pair, "theirs", "")
    return Comparison(other.name, pairs)


def _row(pair: Pair) -> tuple[str, int]:
    """Source and number of the row of our sample, without the part."""
    return pair.source, int(pair.ours.id.rpartition(":")[2].partition("/")[0])


# ---------------------------------------------------------------- what belongs together

Match = tuple[str, "Sample | None", "Document | None"]


def _matched(samples: Sequence[tuple[str, Sample]], documents: Sequence[Document]) -> list[Match]:
    """Each sample and document once, in the order of the samples; those of theirs without one come
    last.
    """
    if all(document.row for document in documents):
        chosen, left = _by_row(samples, documents)
    else:
        chosen, left = _by_content(samples, documents)
    found: list[Match] = [
        (source, sample, chosen.get(i)) for i, (source, sample) in enumerate(samples)
    ]
    return found + [(document.row[0] if document.row else "", None, document) for document in left]


def _by_row(
    samples: Sequence[tuple[str, Sample]], documents: Sequence[Document]
) -> tuple[dict[int, Document], list[Document]]:
    """The last sample of a row, which has all of its messages, is that of the row's document."""
    last = {}
    for i, (source, sample) in enumerate(samples):
        last[source, int(sample.id.rpartition(":")[2].partition("/")[0])] = i
    chosen = {last[document.row]: document for document in documents if document.row in last}
    return chosen, [document for document in documents if document.row not in last]


def _by_content(
    samples: Sequence[tuple[str, Sample]], documents: Sequence[Document]
) -> tuple[dict[int, Document], list[Document]]:
    """By equal tokens, then by tokens in common, then by order where that is all there is."""
    places: dict[bytes, deque[int]] = defaultdict(deque)
    for i, (_, sample) in enumerate(samples):
        places[_bytes(sample.tokens)].append(i)
    chosen: dict[int, Document] = {}
    left: list[Document] = []
    for document in itertools.chain.from_iterable(
        _unpacked(document, places) for document in documents
    ):
        same = places.get(_bytes(document.tokens))
        if same:
            chosen[same.popleft()] = document
        else:
            left.append(document)
    rest = [i for i in range(len(samples)) if i not in chosen]
    alike = _alike([samples[i][1].tokens for i in rest], [document.tokens for document in left])
    if not chosen and not alike and len(rest) == len(left):
        alike = {i: i for i in range(len(rest))}
    chosen |= {rest[mine]: left[theirs] for theirs, mine in alike.items()}
    return chosen, [document for i, document in enumerate(left) if i not in alike]


def _unpacked(document: Document, places: dict[bytes, deque[int]]) -> Iterator[Document]:
    """A row that is packed without saying where documents begin, taken apart at those that are
    samples of ours.
    """
    if _bytes(document.tokens) in places:
        yield document
        return
    lengths = sorted({len(key) // 8 for key in places}, reverse=True)
    firsts = {int(np.frombuffer(key[:8], np.int64)[0]) for key in places}
    cuts, at = [0], 0
    while at < len(document.tokens):
        sizes = (
            (n for n in lengths if at + n <= len(document.tokens))
            if int(document.tokens[at]) in firsts
            else ()
        )
        size = next((n for n in sizes if _bytes(document.tokens[at : at + n]) in places), 0)
        if size:
            cuts += [at, at + size]
        at += size or 1
    if len(cuts) < 5:  # one sample of ours with something around it
        yield document
        return
    edges = sorted({*cuts, len(document.tokens)})
    for i, (a, b) in enumerate(itertools.pairwise(edges), start=1):
        name = f"{document.name}, document {i}" if len(edges) > 2 else document.name
        yield Document(name, document.tokens[a:b], document.trained[a:b])


def _alike(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[int, int]:
    """theirs -> ours of the texts that share most; what many share, such as a system prompt, is not
    counted.
    """
    index: dict[bytes, list[int]] = defaultdict(list)
    sizes = []
    for i, tokens in enumerate(ours):
        shingles = _shingles(tokens)
        sizes.append(len(shingles))
        for shingle in shingles:
            index[shingle].append(i)
    votes: list[tuple[int, int, int]] = []
    for j, tokens in enumerate(theirs):
        hits = [index.get(shingle, []) for shingle in _shingles(tokens)]
        own = [hit for hit in hits if len(hit) <= COMMON]
        count = Counter(i for hit in own for i in hit)
        for i, n in count.most_common(COMMON):
            if n >= ALIKE * min(len(own), sizes[i]):
                votes.append((-n, j, i))
    found: dict[int, int] = {}
    taken: set[int] = set()
    for _, j, i in sorted(votes):
        if j not in found and i not in taken:
            found[j] = i
            taken.add(i)
    return found


def _shingles(tokens: np.ndarray) -> set[bytes]:
    tokens = np.asarray(tokens, np.int64)
    return {tokens[i : i + SHINGLE].tobytes() for i in range(max(1, len(tokens) - SHINGLE + 1))}


def _bytes(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens, np.int64).tobytes()


# ---------------------------------------------------------------- what differs, and why


def _side_by_side(pair: Pair) -> None:
    """Fill in tokens, sides and masks."""
    ours, theirs = pair.ours.tokens.astype(np.int64), pair.theirs.tokens
    tokens: list[int] = []
    mine: list[bool] = []
    other: list[bool] = []
    weights, trained = pair.ours.weights > 0, pair.theirs.trained
    for tag, a, b, c, d in _operations(ours, theirs):
        if tag == "equal":
            tokens += ours[a:b].tolist()
            pair.sides += ["both"] * (b - a)
            mine += weights[a:b].tolist()
            other += trained[c:d].tolist()
            continue
        tokens += [*ours[a:b].tolist(), *theirs[c:d].tolist()]
        pair.sides += ["ours"] * (b - a) + ["theirs"] * (d - c)
        mine += [*weights[a:b].tolist(), *[False] * (d - c)]
        other += [*[False] * (b - a), *trained[c:d].tolist()]
    pair.tokens, pair.mine, pair.other = (
        np.array(tokens, np.int64),
        np.array(mine, bool),
        np.array(other, bool),
    )
    if len(tokens) and pair.sides[0] == "both":
        pair.mine[0] = pair.other[0] = False  # nothing comes before it, whatever its label


def _alone(pair: Pair, side: str, reason: str) -> None:
    """Tokens that one side has alone."""
    pair.tokens = pair.ours.tokens.astype(np.int64) if side == "ours" else pair.theirs.tokens
    pair.sides = [side] * len(pair.tokens)
    trained = pair.ours.weights > 0 if side == "ours" else pair.theirs.trained
    none = np.zeros(len(pair.tokens), bool)
    pair.mine, pair.other = (trained, none) if side == "ours" else (none, trained)
    pair.reasons = [reason if is_trained else "" for is_trained in trained.tolist()]


def _operations(ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[str, int, int, int, int]]:
    """As `difflib.SequenceMatcher.get_opcodes`, but what is equal at both ends costs nothing."""
    n = min(len(ours), len(theirs))
    same = ours[:n] == theirs[:n]
    head = int(np.argmin(same)) if not same.all() else n
    left = n - head
    same = ours[len(ours) - left :][::-1] == theirs[len(theirs) - left :][::-1]
    tail = int(np.argmin(same)) if not same.all() else left
    yield "equal", 0, head, 0, head
    a, b = ours[head : len(ours) - tail], theirs[head : len(theirs) - tail]
    if max(len(a), len(b)) > MOST_ALIGNED:
        yield "replace", head, head + len(a), head, head + len(b)
    else:
        for tag, *at in difflib.SequenceMatcher(
            None, a.tolist(), b.tolist(), autojunk=False
        ).get_opcodes():
            yield tag, *(head + i for i in at)
    yield "equal", len(ours) - tail, len(ours), len(theirs) - tail, len(theirs)


def _explain(pair: Pair, reader: Reader) -> list[str]:
    """The reason of each token that differs."""
    n, tokens = len(pair.tokens), pair.tokens.tolist()
    one_sided = [side != "both" for side in pair.sides]
    differs = [one_sided[i] or pair.mine[i] != pair.other[i] for i in range(n)]
    if not any(differs):
        return [""] * n
    pieces = reader.pieces(tokens)
    blocks = reader.blocks(pieces)
    block_of = [block for block in blocks for _ in range(block.end - block.start)]
    thinking = _thinking(pieces)
    ends = [token in reader.special for token in tokens]
    blank = [not reader.piece(token).strip() for token in tokens]
    shared = np.array([not each for each in one_sided])
    all_of = {"ours": pair.mine[shared][1:].all(), "theirs": pair.other[shared][1:].all()}
    tail = next(
        (
            i + 1
            for i in range(n - 1, -1, -1)
            if not one_sided[i] or pair.sides[i] != pair.sides[-1]
        ),
        0,
    )
    several = pair.ours is not None and "/" in pair.ours.id.rpartition(":")[2]

    def of_tokens(i: int) -> str:
        if tokens[i] == reader.bos and all(one_sided[: i + 1]):
            return "bos"
        if i >= tail and tail:
            return "eos" if all(ends[j] or blank[j] for j in range(tail, n)) else "truncated"
        return "reasoning" if thinking[i] else "other-tokens"

    def of_mask(i: int) -> str:
        block, who = block_of[i], pair.who(i)
        if all_of[who]:
            return "everything-trained"
        if i < block.content:
            opens = (
                i == block.start and ends[i] and i > 0 and (pair.mine[i - 1] or pair.other[i - 1])
            )
            return "end-of-turn" if opens else "header"
        if thinking[i]:
            return "reasoning"
        if block.role == "tool":
            return "tool-result"
        if block.role in ("system", "user"):
            return "context"
        if ends[i]:
            return "end-of-turn"
        before = next((j for j in range(i - 1, block.start - 1, -1) if not blank[j]), block.start)
        if blank[i] and ends[before]:
            return "newline-behind-end"
        if not block.role:
            known = pair.mine if who == "theirs" else pair.other
            return "context" if not known[:i].any() else "part-of-answer"
        answer = slice(block.content, block.end)
        alone = pair.mine if who == "ours" else pair.other
        beside = pair.other if who == "ours" else pair.mine
        return "answer" if alone[answer].any() and not beside[answer].any() else "part-of-answer"

    found = [(of_tokens(i) if one_sided[i] else of_mask(i)) if differs[i] else "" for i in range(n)]
    return [
        "split-by-turn" if several and reason in LEARNED and pair.who(i) == "theirs" else reason
        for i, reason in enumerate(found)
    ]


def _thinking(pieces: Sequence[tuple[int, str]]) -> list[bool]:
    """Whether each token is of a reasoning block."""
    text = "".join(piece.text for piece in pieces)
    spans = [match.span() for match in THINKING.finditer(text)]
    found: list[bool] = []
    at = 0
    for piece in pieces:
        found += [any(a <= at < b for a, b in spans)] * piece.count
        at += len(piece.text)
    return found
