"""From the names of sources to their samples, by the code that training uses, and to the rows that
gave none.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tools.inspection.lint import NOTES, WARNINGS, Finding
from tools.inspection.report import Inspected, plural
from torchsft.config import Data, InputError
from torchsft.data.cache import Samples, pack_block
from torchsft.data.prepare import open_sources, prepare
from torchsft.data.preparer import Preparer, Result
from torchsft.data.sources import Source
from torchsft.data.specs import evaluation_sets

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Facts:
    """What a model's directory says of it, as far as it does.

    Attributes:
        vocab_size: rows of the embedding, or None.
        positions: max_position_embeddings, or None.
        eos_ids: tokens at which generation stops.
    """

    vocab_size: int | None
    positions: int | None
    eos_ids: frozenset[int]


def facts(model: str) -> Facts:
    """Read config.json (and its text_config) and generation_config.json. Raises InputError: one is
    no JSON object.
    """
    config = _json(Path(model) / "config.json")
    text = config.get("text_config")
    config = {**(text if isinstance(text, dict) else {}), **config}
    numbers = [config.get(name) for name in ("vocab_size", "max_position_embeddings")]
    vocab_size, positions = (
        number if isinstance(number, int) and number > 0 else None for number in numbers
    )
    eos = _json(Path(model) / "generation_config.json").get("eos_token_id")
    eos = eos if isinstance(eos, list) else [eos]
    return Facts(vocab_size, positions, frozenset(token for token in eos if isinstance(token, int)))


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); restore the model's configuration"
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; restore the model's configuration")
    return found


def gather(
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    vocab_size: int | None = None,
    most: int | None = None,
    progress: bool = False,
) -> tuple[list[Inspected], list[Finding]]:
    """Every source of `data.train` and `data.eval`, and a finding for each row that cannot be used.

    Without `most`, training's cache is filled, or read where it is there.

    Args:
        vocab_size: the model's; None: not known, not checked.
        most: samples of each source, the first ones; they are kept in memory.

    Raises:
        InputError: a source that cannot be opened, or holds no rows; nothing is given.
    """
    sets = evaluation_sets(data.eval)
    if not data.train and not sets:
        raise InputError("there is nothing to inspect; name data with --data.train or --data.eval")
    opened = [
        ("", *each)
        for each in zip(data.train, open_sources(data.train, data.streaming), strict=True)
    ]
    for name, specs in sets.items():
        opened += [
            (name, *each) for each in zip(specs, open_sources(specs, data.streaming), strict=True)
        ]
    data, sources, findings = replace(data, on_error="skip"), [], []
    for name, spec, source in opened:
        preparer = Preparer(tokenizer, data, source, vocab_size)
        inspected, refused = (
            _first(source, preparer, most) if most else _all(spec, source, preparer, progress)
        )
        inspected.evaluation = bool(name)
        inspected.origin = preparer
        # Ids tell training and evaluation apart, where both have a file of this name.
        inspected.name = inspected.samples.name = f"{name}={source.name}" if name else source.name
        sources.append(inspected)
        findings += [replace(finding, source=inspected.name) for finding in refused]
        findings += _told(inspected)
    return sources, findings


def _told(source: Inspected) -> list[Finding]:
    """What is to be known of a source as a whole: keys that mean nothing, and codes that its rows
    have.
    """
    found = [
        Finding("ignored-key", source.name, source.path, f"{key!r} in {plural(rows, 'row')}")
        for key, rows in sorted(source.ignored.items())
    ]
    for code, rows in source.counts.items():
        if rows and code in (*WARNINGS, *NOTES):
            found.append(Finding(code, source.name, source.path, plural(rows, "row")))
    for sentence in source.kept:
        found.append(Finding("context-lost-kept", source.name, source.path, sentence))
    return found


def _all(
    spec: str, source: Source, preparer: Preparer, progress: bool
) -> tuple[Inspected, list[Finding]]:
    """Every sample, by way of the cache."""
    try:
        options = {"vocab_size": preparer.vocab_size, "progress": progress}
        [prepared] = prepare([spec], preparer.tokenizer, preparer.data, **options)
    except InputError as error:
        found, findings = _first(source, preparer, None)
        # else every row is refused, which is what is to be shown
        if len(found.samples) or not findings:
            raise error from None
        return found, findings
    prepared.samples.name = source.name  # the whole path where several files have one name
    report = prepared.report
    found = _inspected(source, report.format, report.rows, prepared.samples, report.counts)
    found.ignored, found.kept = report.ignored, report.kept
    found.digest = prepared.digest
    if not report.counts.get("skipped") and not report.counts.get("no-targets"):
        return found, []
    # The report has sentences and numbers; for reasons and places, what gave no sample is prepared
    # once more.
    usable = set(prepared.samples.rows.tolist())
    preparer.format = report.format
    missing = ((number, payload) for number, payload in source.rows() if number not in usable)
    findings: list[Finding] = []
    while batch := list(itertools.islice(missing, ROWS_AT_ONCE)):
        for result in preparer(batch):
            findings += _finding(source, result)
    return found, findings


def _first(source: Source, preparer: Preparer, most: int | None) -> tuple[Inspected, list[Finding]]:
    """The first `most` samples, in memory."""
    samples: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    findings: list[Finding] = []
    counts: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    kept: list[str] = []
    read, rows = 0, source.rows()
    while (most is None or len(samples) < most) and (
        batch := list(itertools.islice(rows, ROWS_AT_ONCE))
    ):
        for result in preparer(batch):
            if most is not None and len(samples) >= most:
                break
            read += 1
            counts.update([*result.notes, *(["skipped"] if result.fault else [])])
            ignored.update(result.ignored)
            kept += result.kept
            findings += _finding(source, result)
            first = int(len(result.samples) > 1)
            samples += [
                (result.number, part, *each)
                for part, each in enumerate(result.samples, start=first)
            ]
    if not read:
        raise InputError(
            f"{source.spec.path} holds no rows; remove it or give a file with at least one"
        )
    made = Samples(source.name, pack_block(samples[:most]))
    found = _inspected(source, preparer.format, read, made, dict(counts))
    found.ignored, found.kept = dict(ignored), kept
    return found, findings


def _inspected(
    source: Source, kind: str | None, rows: int, samples: Samples, counts: dict[str, int]
) -> Inspected:
    return Inspected(
        source.name,
        source.spec.path,
        kind or "",
        source.spec.weight,
        False,
        rows,
        samples,
        counts=counts,
    )


def _finding(source: Source, result: Result) -> list[Finding]:
    if result.fault:
        found = Finding(result.fault.reason, source.name, result.fault.where, result.fault.text)
        refused = (
            "; training refuses the row unless --data.on-error skip"
            if found.level == "warning"
            else ""
        )
        return [replace(found, text=found.text + refused)]
    # else it was cut, which is counted
    if not result.samples and set(result.notes) == {"no-targets"}:
        return [
            Finding(
                "no-targets",
                source.name,
                source.where(result.number),
                "no token has a weight above 0",
            )
        ]
    return []
