"""Which document of another tool belongs to which sample of ours.

They belong together by the row that they were made of, by equal tokens, by tokens that they share,
or by order.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tools.inspection.others import Document
from torchsft.data.template import Sample

SHINGLE = 5  # tokens; so many in a row that two texts share make them alike
ALIKE = 0.3  # share of the shorter text
COMMON = 20  # texts; what more of them have in common does not distinguish them
FEWEST_PACKED = 2  # samples of ours in a row, from which on it counts as packed
INT64_BYTES = 8


@dataclass
class SourceSample:
    """A sample of ours and the name of its source."""

    source: str
    sample: Sample

    @property
    def row(self) -> tuple[str, int]:
        """Source and number of the row that gave it."""
        return self.source, row_number(self.sample)


@dataclass
class Match:
    """A sample of ours, a document of theirs, or both.

    Attributes:
        source: name of the source; "" if it is not known.
    """

    source: str
    ours: Sample | None
    theirs: Document | None


def row_number(sample: Sample) -> int:
    """Return the number of the row that gave a sample, which its id has, without the part."""
    return int(sample.id.rpartition(":")[2].partition("/")[0])


def match(samples: Sequence[SourceSample], documents: Sequence[Document]) -> list[Match]:
    """Match samples and documents.

    Returns:
        Each sample and each document once, in the order of the samples; documents without a sample
        come last.
    """
    if all(document.row for document in documents):
        document_of, rest = _by_row(samples, documents)
    else:
        document_of, rest = _by_content(samples, documents)
    matches = []
    for i, each in enumerate(samples):
        matches.append(Match(each.source, each.sample, document_of.get(i)))
    for document in rest:
        source = document.row[0] if document.row else ""
        matches.append(Match(source, None, document))
    return matches


def _by_row(
    samples: Sequence[SourceSample], documents: Sequence[Document]
) -> tuple[dict[int, Document], list[Document]]:
    """Match by row: the last sample of a row, which has all of its messages, is that of the row's
    document.

    Returns:
        The document of a sample, by the sample's index, and the documents without one.
    """
    last_sample = {each.row: i for i, each in enumerate(samples)}
    document_of: dict[int, Document] = {}
    rest = []
    for document in documents:
        if document.row in last_sample:
            document_of[last_sample[document.row]] = document
        else:
            rest.append(document)
    return document_of, rest


def _by_content(
    samples: Sequence[SourceSample], documents: Sequence[Document]
) -> tuple[dict[int, Document], list[Document]]:
    """Match by equal tokens, then by tokens in common, then by order where that is all there is.

    Returns:
        As `_by_row`.
    """
    samples_with: dict[bytes, deque[int]] = defaultdict(deque)
    for i, each in enumerate(samples):
        samples_with[_bytes(each.sample.tokens)].append(i)
    document_of: dict[int, Document] = {}
    rest: list[Document] = []
    # by equal tokens
    for document in documents:
        for part in _unpacked(document, samples_with):
            equal = samples_with.get(_bytes(part.tokens))
            if equal:
                document_of[equal.popleft()] = part
            else:
                rest.append(part)
    # by tokens in common, or by order
    free = [i for i in range(len(samples)) if i not in document_of]
    our_tokens = [samples[i].sample.tokens for i in free]
    sample_of = _alike(our_tokens, [document.tokens for document in rest])
    nothing_matches = not document_of and not sample_of
    if nothing_matches and len(free) == len(rest):
        sample_of = {i: i for i in range(len(free))}
    for theirs, ours in sample_of.items():
        document_of[free[ours]] = rest[theirs]
    return document_of, [document for i, document in enumerate(rest) if i not in sample_of]


def _unpacked(document: Document, samples_with: dict[bytes, deque[int]]) -> Iterator[Document]:
    """Yield the documents of a row that is packed without saying where they begin.

    It is taken apart at those that are samples of ours; what stands between them are documents too.

    Args:
        samples_with: indices of our samples, by their tokens as int64 bytes.
    """
    tokens = document.tokens
    if _bytes(tokens) in samples_with:
        yield document
        return
    lengths = sorted({len(key) // INT64_BYTES for key in samples_with}, reverse=True)
    first_tokens = {int(np.frombuffer(key[:INT64_BYTES], np.int64)[0]) for key in samples_with}
    edges = {0, len(tokens)}
    found = at = 0
    while at < len(tokens):
        length = 0
        if int(tokens[at]) in first_tokens:
            length = _length_of_sample(tokens[at:], lengths, samples_with)
        if length:
            found += 1
            edges |= {at, at + length}
        at += length or 1
    if found < FEWEST_PACKED:  # one sample of ours with something around it
        yield document
        return
    sections = list(itertools.pairwise(sorted(edges)))
    for i, (start, end) in enumerate(sections, start=1):
        name = f"{document.name}, document {i}" if len(sections) > 1 else document.name
        yield Document(name, tokens[start:end], document.trained[start:end])


def _length_of_sample(
    tokens: np.ndarray, lengths: Sequence[int], samples_with: dict[bytes, deque[int]]
) -> int:
    """Return the length of the longest sample of ours with which tokens begin; 0 for none.

    Args:
        lengths: of our samples, the longest first.
    """
    for length in lengths:
        if length <= len(tokens) and _bytes(tokens[:length]) in samples_with:
            return length
    return 0


def _alike(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> dict[int, int]:
    """Match the texts that share most; what many share, such as a system prompt, is not counted.

    Args:
        ours, theirs: tokens of each text.

    Returns:
        Index of ours, by index of theirs.
    """
    texts_with: dict[bytes, list[int]] = defaultdict(list)
    sizes = []
    for i, tokens in enumerate(ours):
        shingles = _shingles(tokens)
        sizes.append(len(shingles))
        for shingle in shingles:
            texts_with[shingle].append(i)
    candidates: list[_Candidate] = []
    for j, tokens in enumerate(theirs):
        hits = [texts_with.get(shingle, []) for shingle in _shingles(tokens)]
        distinctive = [hit for hit in hits if len(hit) <= COMMON]
        shared = Counter(i for hit in distinctive for i in hit)
        for i, n in shared.most_common(COMMON):
            shorter = min(len(distinctive), sizes[i])
            if n >= ALIKE * shorter:
                candidates.append(_Candidate(-n, j, i))
    found: dict[int, int] = {}
    taken: set[int] = set()
    for candidate in sorted(candidates):
        if candidate.theirs not in found and candidate.ours not in taken:
            found[candidate.theirs] = candidate.ours
            taken.add(candidate.ours)
    return found


class _Candidate(NamedTuple):
    """Texts that may belong together; sorted, they are in the order in which they are taken.

    Attributes:
        minus_shared: number of stretches that they share, below 0.
        theirs, ours: indices of the texts.
    """

    minus_shared: int
    theirs: int
    ours: int


def _shingles(tokens: np.ndarray) -> set[bytes]:
    """Return all stretches of SHINGLE tokens, as int64 bytes; of a shorter text, all of it."""
    tokens = np.asarray(tokens, np.int64)
    count = max(1, len(tokens) - SHINGLE + 1)
    return {tokens[i : i + SHINGLE].tobytes() for i in range(count)}


def _bytes(tokens: np.ndarray) -> bytes:
    """Return tokens as int64 bytes, by which equal texts are found."""
    return np.asarray(tokens, np.int64).tobytes()
