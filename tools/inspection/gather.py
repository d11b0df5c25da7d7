"""From the names of sources to their samples, by the code that training uses, and to the rows that
gave none.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tools.inspection.lint import NOTES, WARNINGS, Finding
from tools.inspection.report import Inspected, plural
from torchsft.config import Data, InputError
from torchsft.data.cache import RowSample, Samples, pack_block
from torchsft.data.prepare import open_sources, prepare
from torchsft.data.preparer import Preparer
from torchsft.data.report import Result
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
    """Read config.json (and its text_config) and generation_config.json.

    Raises:
        InputError: one is no JSON object.
    """
    config = _json(Path(model) / "config.json")
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        config = {**text_config, **config}
    eos = _json(Path(model) / "generation_config.json").get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [eos]
    return Facts(
        vocab_size=_positive(config.get("vocab_size")),
        positions=_positive(config.get("max_position_embeddings")),
        eos_ids=frozenset(token for token in eos_ids if isinstance(token, int)),
    )


def _positive(number: Any) -> int | None:
    """Return a number that is whole and above 0, else None."""
    return number if isinstance(number, int) and number > 0 else None


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is no file."""
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
    """Return every source of `data.train` and `data.eval`, and a finding for each row that cannot
    be used.

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
    opened = _open("", data.train, data)
    for name, specs in sets.items():
        opened += _open(name, specs, data)
    data = replace(data, on_error="skip")
    sources: list[Inspected] = []
    findings: list[Finding] = []
    for each in opened:
        source = each.source
        preparer = Preparer(tokenizer, data, source, vocab_size)
        if most:
            inspected, refused = _first(source, preparer, most)
        else:
            inspected, refused = _all(each.spec, source, preparer, progress)
        inspected.evaluation = bool(each.set_name)
        inspected.origin = preparer
        # Ids tell training and evaluation apart, where both have a file of this name.
        inspected.name = f"{each.set_name}={source.name}" if each.set_name else source.name
        inspected.samples.name = inspected.name
        sources.append(inspected)
        findings += [replace(finding, source=inspected.name) for finding in refused]
        findings += _findings_of_source(inspected)
    return sources, findings


@dataclass
class _Opened:
    """An open source; `set_name`: of its evaluation set, "" for training."""

    set_name: str
    spec: str
    source: Source


def _open(set_name: str, specs: Sequence[str], data: Data) -> list[_Opened]:
    """Open the sources of an evaluation set, or of training."""
    sources = open_sources(specs, data.streaming)
    return [_Opened(set_name, spec, source) for spec, source in zip(specs, sources, strict=True)]


def _findings_of_source(source: Inspected) -> list[Finding]:
    """Return what holds of a source as a whole: keys that mean nothing, and codes that its rows
    have.
    """
    found = []
    for key, rows in sorted(source.ignored.items()):
        text = f"{key!r} in {plural(rows, 'row')}"
        found.append(Finding("ignored-key", source.name, source.path, text))
    for code, rows in source.counts.items():
        if rows and code in (*WARNINGS, *NOTES):
            found.append(Finding(code, source.name, source.path, plural(rows, "row")))
    for sentence in source.kept:
        found.append(Finding("context-lost-kept", source.name, source.path, sentence))
    return found


def _all(
    spec: str, source: Source, preparer: Preparer, progress: bool
) -> tuple[Inspected, list[Finding]]:
    """Return every sample, by way of the cache, and a finding for each row that gave none."""
    try:
        [prepared] = prepare(
            [spec],
            preparer.tokenizer,
            preparer.data,
            vocab_size=preparer.vocab_size,
            progress=progress,
        )
    except InputError as error:
        found, findings = _first(source, preparer, None)
        # else every row is refused, which is what is to be shown
        if len(found.samples) or not findings:
            raise error from None
        return found, findings
    prepared.samples.name = source.name  # the whole path where several files have one name
    report = prepared.report
    found = _inspected(source, report.format, report.rows, prepared.samples, report.counts)
    found.ignored = report.ignored
    found.kept = report.kept
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
    """Return the first `most` samples, in memory, and a finding for each row that gave none.

    Args:
        most: None: all.
    """
    samples: list[RowSample] = []
    findings: list[Finding] = []
    counts: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    kept: list[str] = []
    read = 0
    rows = source.rows()
    while (most is None or len(samples) < most) and (
        batch := list(itertools.islice(rows, ROWS_AT_ONCE))
    ):
        for result in preparer(batch):
            if most is not None and len(samples) >= most:
                break
            read += 1
            counts.update(result.notes)
            if result.fault:
                counts["skipped"] += 1
            ignored.update(result.ignored)
            kept += result.kept
            findings += _finding(source, result)
            first_part = 1 if len(result.samples) > 1 else 0
            for part, sample in enumerate(result.samples, start=first_part):
                samples.append(RowSample(result.number, part, sample.tokens, sample.weights))
    if not read:
        raise InputError(
            f"{source.spec.path} holds no rows; remove it or give a file with at least one"
        )
    made = Samples(source.name, pack_block(samples[:most]))
    found = _inspected(source, preparer.format, read, made, dict(counts))
    found.ignored = dict(ignored)
    found.kept = kept
    return found, findings


def _inspected(
    source: Source, kind: str | None, rows: int, samples: Samples, counts: dict[str, int]
) -> Inspected:
    return Inspected(
        name=source.name,
        path=source.spec.path,
        format=kind or "",
        weight=source.spec.weight,
        evaluation=False,
        rows=rows,
        samples=samples,
        counts=counts,
    )


def _finding(source: Source, result: Result) -> list[Finding]:
    """Return why a row gave no sample; nothing where it gave one, or was cut, which is counted."""
    fault = result.fault
    if fault:
        found = Finding(fault.reason, source.name, fault.where, fault.text)
        if found.level == "warning":
            refusal = "; training refuses the row unless --data.on-error skip"
            found = replace(found, text=found.text + refusal)
        return [found]
    if not result.samples and set(result.notes) == {"no-targets"}:
        where = source.where(result.number)
        return [Finding("no-targets", source.name, where, "no token has a weight above 0")]
    return []
