"""The page: one HTML file that loads nothing and keeps training data from being anything else than
text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.inspection.lint import Finding, title
from tools.inspection.report import NOTES, Inspection, as_dict, notes, plural, weight_runs
from tools.markup import policy
from torchsft.data.template import Sample

TEMPLATE = Path(__file__).with_name("page.html")
MOST_SAMPLES = 10_000
MOST_TOKENS = 5_000_000
MOST_FAULTS = 1_000

Key = tuple[int, int]  # index of a source, and of a sample in it


def render(inspection: Inspection) -> str:
    """Return the page as text.

    It holds every sample, or as many as a browser takes: those with findings, then the first rows.
    """
    data = _data(inspection)
    written = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # No end tag can stand in the data: without "<", nothing that HTML knows can.
    harmless = written.replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("__POLICY__", policy(template)).replace("__DATA__", harmless)


# ---------------------------------------------------------------- which samples are shown


def _choose(inspection: Inspection) -> list[Key]:
    """Return the samples that are shown, in the order of the sources: as many as a browser
    takes.
    """
    chosen: set[Key] = set()
    tokens = 0
    for key in _candidates(inspection):
        if key in chosen:
            continue
        tokens += int(_sample_of(inspection, key).tokens.size)
        if chosen and (tokens > MOST_TOKENS or len(chosen) == MOST_SAMPLES):
            break
        chosen.add(key)
    return sorted(chosen)


def _sample_of(inspection: Inspection, key: Key) -> Sample:
    """Return the sample of a key."""
    source, index = key
    return inspection.sources[source].samples[index]


def _candidates(inspection: Inspection) -> Iterator[Key]:
    """Yield all samples, in the order in which they are taken.

    Where they are too many, samples with findings come first (so many that rows are shown too),
    then those of the first packed rows. A sample may come several times.
    """
    samples = sum(len(source.samples) for source in inspection.sources)
    tokens = sum(source.tokens for source in inspection.sources)
    if samples > MOST_SAMPLES or tokens > MOST_TOKENS:
        yield from itertools.islice(_with_findings(inspection), MOST_SAMPLES // 2)
        for row in inspection.plan.rows:
            yield from row
    for s, source in enumerate(inspection.sources):
        for i in range(len(source.samples)):
            yield s, i


def _with_findings(inspection: Inspection) -> Iterator[Key]:
    """Yield the samples with errors or warnings."""
    wrong = inspection.wrong()
    named = {source for source, _ in wrong}
    for s, source in enumerate(inspection.sources):
        if source.name not in named:
            continue
        for i in range(len(source.samples)):
            if (source.name, source.samples[i].id) in wrong:
                yield s, i


# ---------------------------------------------------------------- what the page gets


@dataclass
class _Rows:
    """Packed rows all of whose samples are shown.

    Attributes:
        rows: places of samples on the page.
        place_of: (row, first token in it) of a sample, in the first row that has it.
    """

    rows: list[list[int]]
    place_of: dict[Key, tuple[int, int]]


def _data(inspection: Inspection) -> dict[str, Any]:
    """Return all that the page shows, as JSON.

    The text of each token stands once in `vocabulary`; samples have ids of tokens.
    """
    chosen = _choose(inspection)
    findings_of = _findings_by_sample(inspection)
    packed = _rows(inspection, chosen)
    vocabulary: dict[int, str] = {}
    samples = []
    for key in chosen:
        source = inspection.sources[key[0]]
        sample = _sample_of(inspection, key)
        of_sample = findings_of.pop((source.name, sample.id), [])
        findings = [(finding.reason, finding.text) for finding in of_sample]
        findings += [(note, "") for note in notes(source, sample, inspection.data.seq_len)]
        shown = _sample(inspection, sample, vocabulary)
        shown["source"] = key[0]
        shown["findings"] = findings
        shown["row"] = packed.place_of.get(key)
        samples.append(shown)
    # What is left is of rows that gave no sample, and of samples that are not shown.
    elsewhere = [
        (finding.reason, finding.sample, finding.text)
        for findings in findings_of.values()
        for finding in findings
        if finding.level != "note"
    ]
    all_samples = sum(len(source.samples) for source in inspection.sources)
    return {
        "model": inspection.model,
        "options": inspection.options(),
        "seq_len": inspection.data.seq_len,
        "plan": inspection.plan_text().split(" ", 1),
        "errors": inspection.level("error"),
        "warnings": inspection.level("warning"),
        "reasons": _reasons(inspection, samples),
        "faults": elsewhere[:MOST_FAULTS],
        "sources": [as_dict(source) for source in inspection.sources],
        "totals": _totals(inspection),
        "shown": _shown_of(len(samples), all_samples, "sample"),
        "rows_shown": _shown_of(len(packed.rows), len(inspection.plan.rows), "row"),
        "vocabulary": vocabulary,
        "special": dict.fromkeys(sorted(inspection.reader.special), 1),
        "samples": samples,
        "rows": packed.rows,
    }


def _findings_by_sample(inspection: Inspection) -> dict[tuple[str, str], list[Finding]]:
    """Return all findings, by the source's name and the sample's id or the place of its row."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for finding in inspection.findings:
        found.setdefault((finding.source, finding.sample), []).append(finding)
    return found


def _rows(inspection: Inspection, chosen: list[Key]) -> _Rows:
    """Return the packed rows that are shown.

    Args:
        chosen: the samples that are shown.
    """
    place_on_page = {key: place for place, key in enumerate(chosen)}
    packed = _Rows([], {})
    for row in inspection.plan.rows:
        if not all(key in place_on_page for key in row):
            continue
        first_token = 0
        for key in row:
            packed.place_of.setdefault(key, (len(packed.rows), first_token))
            first_token += len(_sample_of(inspection, key).tokens)
        packed.rows.append([place_on_page[key] for key in row])
    return packed


def _reasons(inspection: Inspection, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return title, level, count and an example of each reason of findings.

    Args:
        samples: those that are shown, with the notes on them.
    """
    examples: dict[str, str] = {}
    for finding in inspection.findings:
        examples.setdefault(finding.reason, f"{finding.sample}: {finding.text}")
    reasons: dict[str, Any] = {}
    # of findings
    for level, reason, n in inspection.tally():
        reasons[reason] = {
            "title": title(reason),
            "level": level,
            "count": n,
            "example": examples[reason],
        }
    # of what happened to samples, which are no findings
    for note, text in NOTES.items():
        count = sum((note, "") in sample["findings"] for sample in samples)
        reasons[note] = {"title": text, "level": "note", "count": count}
    return reasons


def _totals(inspection: Inspection) -> dict[str, int]:
    """Return numbers of the training data, which evaluation sets have no part in."""
    trained = inspection.trained
    return {
        "samples": sum(len(source.samples) for source in trained),
        "tokens": sum(source.tokens for source in trained),
        "supervised_tokens": sum(source.supervised_tokens for source in trained),
        "rows": len(inspection.plan.rows),
        "packed_tokens": inspection.plan.tokens,
        "steps": inspection.plan.steps,
    }


def _shown_of(shown: int, total: int, word: str) -> str:
    """Return how many of all things are shown, in words."""
    if shown == total:
        return plural(total, word)
    return f"{shown:,} of {plural(total, word)} are on this page"


def _sample(inspection: Inspection, sample: Sample, vocabulary: dict[int, str]) -> dict[str, Any]:
    """Return a sample as JSON.

    Args:
        vocabulary: texts of tokens are added to it; those that share a character with others, or
            write something else here, are in the sample's `joined`.
    """
    tokens = sample.tokens.tolist()
    reader = inspection.reader
    pieces = reader.pieces(tokens)
    joined = []
    at = 0
    for piece in pieces:
        if piece.count == 1 and piece.text == reader.piece(tokens[at]):
            vocabulary[tokens[at]] = piece.text
        else:
            joined.append((at, piece.count, piece.text))
        at += piece.count
    found = {
        "id": sample.id,
        "tokens": tokens,
        "weights": weight_runs(sample.weights),
        "blocks": reader.blocks(pieces),
    }
    if joined:
        found["joined"] = joined
    return found
