"""The page: one HTML file that loads nothing and keeps training data from being anything else than
text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.inspection.lint import Finding, title
from tools.inspection.report import NOTES, Inspection, as_dict, notes, plural, weight_runs
from torchsft.data.template import Sample

TEMPLATE = Path(__file__).with_name("page.html")
MOST_SAMPLES, MOST_TOKENS, MOST_FAULTS = 10_000, 5_000_000, 1_000


def render(inspection: Inspection) -> str:
    """The page as text. It holds every sample, or as many as a browser takes: those with findings,
    then the first rows.
    """
    chosen = _choose(inspection)
    data = json.dumps(
        _data(inspection, chosen), ensure_ascii=True, separators=(",", ":"), allow_nan=False
    )
    template = TEMPLATE.read_text(encoding="utf-8")
    # No end tag can stand in the data: without "<", nothing that HTML knows can.
    return template.replace("__POLICY__", _policy(template)).replace(
        "__DATA__", data.replace("<", "\\u003c")
    )


def _policy(template: str) -> str:
    """A content security policy under which the page's own style and script run, and nothing else
    does or is loaded.
    """

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    own = f"style-src {digest('style')}; script-src {digest('script')}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _choose(inspection: Inspection) -> dict[tuple[int, int], int]:
    """(source, sample) -> place on the page, in the order of the sources."""
    chosen: dict[tuple[int, int], int] = {}
    tokens = 0
    for key in _candidates(inspection):
        if key in chosen:
            continue
        tokens += int(inspection.sources[key[0]].samples[key[1]].tokens.size)
        if chosen and (tokens > MOST_TOKENS or len(chosen) == MOST_SAMPLES):
            break
        chosen[key] = 0
    return {key: place for place, key in enumerate(sorted(chosen))}


def _candidates(inspection: Inspection) -> Iterator[tuple[int, int]]:
    everything = sum(len(source.samples) for source in inspection.sources)
    tokens = sum(source.tokens for source in inspection.sources)
    if everything > MOST_SAMPLES or tokens > MOST_TOKENS:
        wrong = inspection.wrong()
        named = {finding[0] for finding in wrong}
        found = 0
        for s, source in enumerate(inspection.sources):
            for i in range(len(source.samples)) if source.name in named else ():
                if found < MOST_SAMPLES // 2 and (source.name, source.samples[i].id) in wrong:
                    found += 1
                    yield s, i
        for row in inspection.plan.rows:
            yield from row
    for s, source in enumerate(inspection.sources):
        yield from ((s, i) for i in range(len(source.samples)))


def _data(inspection: Inspection, chosen: dict[tuple[int, int], int]) -> dict[str, Any]:
    by_sample: dict[tuple[str, str], list[Finding]] = {}
    for finding in inspection.findings:
        by_sample.setdefault((finding.source, finding.sample), []).append(finding)
    rows, places = [], {}
    for row in inspection.plan.rows:
        if all(key in chosen for key in row):
            at = 0
            for key in row:
                places.setdefault(key, (len(rows), at))
                at += len(inspection.sources[key[0]].samples[key[1]].tokens)
            rows.append([chosen[key] for key in row])
    vocabulary: dict[int, str] = {}
    samples = []
    for s, i in chosen:
        source = inspection.sources[s]
        sample = source.samples[i]
        found = [
            (finding.reason, finding.text)
            for finding in by_sample.pop((source.name, sample.id), [])
        ]
        found += [(note, "") for note in notes(source, sample, inspection.data.seq_len)]
        samples.append(
            _sample(inspection, sample, vocabulary)
            | {"source": s, "findings": found, "row": places.get((s, i))}
        )
    elsewhere = [
        finding for found in by_sample.values() for finding in found if finding.level != "note"
    ]
    faults = [(finding.reason, finding.sample, finding.text) for finding in elsewhere]
    trained = inspection.trained
    examples = {
        finding.reason: f"{finding.sample}: {finding.text}"
        for finding in reversed(inspection.findings)
    }
    reasons = {
        reason: {"title": title(reason), "level": level, "count": n, "example": examples[reason]}
        for level, reason, n in inspection.tally()
    }
    for note, text in NOTES.items():
        reasons[note] = {
            "title": text,
            "level": "note",
            "count": sum((note, "") in sample["findings"] for sample in samples),
        }
    everything = sum(len(source.samples) for source in inspection.sources)
    return {
        "model": inspection.model,
        "options": inspection.options(),
        "seq_len": inspection.data.seq_len,
        "plan": inspection.plan_text().split(" ", 1),
        "errors": inspection.level("error"),
        "warnings": inspection.level("warning"),
        "reasons": reasons,
        "faults": faults[:MOST_FAULTS],
        "sources": [as_dict(source) for source in inspection.sources],
        "totals": {
            "samples": sum(len(source.samples) for source in trained),
            "tokens": sum(source.tokens for source in trained),
            "supervised_tokens": sum(source.supervised_tokens for source in trained),
            "rows": len(inspection.plan.rows),
            "packed_tokens": inspection.plan.tokens,
            "steps": inspection.plan.steps,
        },
        "shown": _of(len(samples), everything, "sample"),
        "rows_shown": _of(len(rows), len(inspection.plan.rows), "row"),
        "vocabulary": vocabulary,
        "special": dict.fromkeys(sorted(inspection.reader.special), 1),
        "samples": samples,
        "rows": rows,
    }


def _of(shown: int, total: int, word: str) -> str:
    return (
        plural(total, word)
        if shown == total
        else f"{shown:,} of {plural(total, word)} are on this page"
    )


def _sample(inspection: Inspection, sample: Sample, vocabulary: dict[int, str]) -> dict[str, Any]:
    tokens, reader = sample.tokens.tolist(), inspection.reader
    pieces = reader.pieces(tokens)
    joined, at = [], 0
    for piece in pieces:
        if piece.count == 1 and piece.text == reader.piece(tokens[at]):
            vocabulary[tokens[at]] = piece.text
        else:
            joined.append((at, piece.count, piece.text))
        at += piece.count
    blocks = reader.blocks(pieces)
    found = {
        "id": sample.id,
        "tokens": tokens,
        "weights": weight_runs(sample.weights),
        "blocks": blocks,
    }
    return found | {"joined": joined} if joined else found
