"""What is printed: numbers of each source, findings, and chosen samples with trained tokens coloured."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

from tools.inspection.lint import Finding, title
from tools.inspection.reading import Reader
from tools.inspection.report import Inspected, Inspection, plural, weight_runs
from torchsft.config import InputError
from torchsft.data.template import Sample

BARS = " ▁▂▃▄▅▆▇█"
EXAMPLES = 3  # of each finding
MOST_TOKENS = 4000  # of a printed sample
MOST_CHARACTERS = 300  # of a printed finding
STYLES = {
    "bold": "1",
    "faint": "2",
    "error": "31;1",
    "warning": "33;1",
    "note": "34;1",
    "trained": "48;5;22;38;5;157",
    "role": "36;1",
}


class Pen:
    """Writes escape sequences, or none."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, style: str, text: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self.colour and text else text


def visible(text: str) -> str:
    """Without anything that moves the cursor, changes colours or turns the direction of writing: that is in the data."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character)[0] != "C" else f"<U+{ord(character):04X}>"
        for character in text
    )


def overview(inspection: Inspection, pen: Pen) -> Iterator[str]:
    """Lines on sources, packing, steps and findings."""
    for source in inspection.sources:
        yield from _source(source, pen)
    plan, data = inspection.plan, inspection.data
    if plan.rows:
        how = data.packing if data.packing == "none" else f"{data.packing} over {plural(data.packing_buffer, 'sample')}"
        filled = f"{100 * plan.fill(data.seq_len):.1f} % filled"
        yield f"{pen('bold', 'packing'):<10} {plural(len(plan.rows), 'row')} of {data.seq_len:,} tokens, {filled} ({how})"
        yield f"{pen('bold', 'training'):<10} {inspection.plan_text()}"
        if len(inspection.trained) > 1:
            for source in inspection.trained:
                times = source.weight * plan.epochs
                yield f"           {times:g} time{'s' * (times != 1)} through {visible(source.name)}"
        if inspection.left_out:
            yield f"           of the samples that were read: {inspection.left_out}"
        yield ""
    yield from _findings(inspection, pen)


def _source(source: Inspected, pen: Pen) -> Iterator[str]:
    kind = f"{source.format or 'no known format'}{', evaluation' * source.evaluation}"
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    yield f"{pen('bold', visible(source.name))} ({kind}{weight}) {pen('faint', visible(source.path))}"
    share = 100 * source.supervised_tokens / max(1, source.tokens)
    numbers = (source.rows, "row"), (len(source.samples), "sample"), (source.tokens, "token")
    yield f"  {', '.join(plural(*each) for each in numbers)}, {share:.1f} % of them trained"
    if source.tokens:
        _, counts = source.histogram
        bars = "".join(BARS[-(-n * 8 // max(counts))] for n in counts)
        yield f"  lengths 0 {bars} {plural(source.longest, 'token')}"
    yield from (f"  {text}" for text in source.outcomes())
    if source.served:
        gave = len(set(source.samples.rows.tolist()))
        yield f"  {source.served:,} of {plural(gave, 'row')} compared with what serving gives the model"
    yield ""


def _findings(inspection: Inspection, pen: Pen) -> Iterator[str]:
    errors, warnings = inspection.level("error"), inspection.level("warning")
    for level, reason, n in inspection.tally():
        yield f"{pen(level, f'{level:<8}')}{n:>7,}  {pen('bold', reason)}: {title(reason)}"
        these = (finding for finding in inspection.findings if finding.reason == reason)
        for finding in itertools.islice(these, EXAMPLES):
            said = visible(f"{finding.sample}: {finding.text}").replace("\n", " ")
            yield f"                 {textwrap.shorten(said, MOST_CHARACTERS, placeholder=' ...')}"
        if n > EXAMPLES:
            yield pen("faint", f"                 and {n - EXAMPLES:,} more")
    if inspection.findings:
        yield ""
    counts = f"{plural(errors, 'error')}, {plural(warnings, 'warning')}"
    yield counts if errors or warnings else "no findings"  # notes are none


def choose(inspection: Inspection, wanted: Sequence[str]) -> list[tuple[Inspected, Sample]]:
    """The samples to print: ids, or a number of samples, those with findings first.

    Raises:
        InputError: there is no sample with this id.
    """
    found = []
    for each in wanted:
        if each.isdecimal():
            found += itertools.islice(_interesting(inspection), int(each))
            continue
        named = ((source, sample) for source in inspection.sources for sample in source.samples if sample.id == each)
        match = next(named, None)
        if match is None:
            first = next((sample.id for source in inspection.sources for sample in source.samples), "none at all")
            raise InputError(f"there is no sample {each}; ids are of the kind {first}")
        found.append(match)
    return found


def _interesting(inspection: Inspection) -> Iterator[tuple[Inspected, Sample]]:
    wrong = inspection.wrong()
    named = {name for name, _ in wrong}
    for first in (True, False):
        for source in inspection.sources if not first else [s for s in inspection.sources if s.name in named]:
            yield from ((source, sample) for sample in source.samples if ((source.name, sample.id) in wrong) is first)


def sample_lines(sample: Sample, reader: Reader, findings: Sequence[Finding], pen: Pen) -> Iterator[str]:
    """A sample as text: a line for each turn with its role, trained tokens coloured (without colour: in ⟦ ⟧)."""
    runs = weight_runs(sample.weights)
    trained = sum(end - start for start, end, _ in runs)
    yield f"{pen('bold', visible(sample.id))}  {plural(len(sample.tokens), 'token')}, {trained:,} trained"
    yield from (f"{pen(finding.level, finding.level)} {finding.reason}: {visible(finding.text)}" for finding in findings)
    pieces = reader.pieces(sample.tokens[:MOST_TOKENS])
    starts = [0, *itertools.accumulate(piece.count for piece in pieces)]
    weights = sample.weights.tolist()
    for block in reader.blocks(pieces):
        within = [(weights[i], piece) for i, piece in zip(starts, pieces, strict=False) if block.start <= i < block.end]
        said = ""
        for weight, group in itertools.groupby(within, key=lambda each: each[0]):
            text = visible("".join(piece.text for _, piece in group))
            mark = f"\u00d7{weight:g} " if weight not in (0, 1) else ""
            plain = text if weight <= 0 else f"⟦{mark}{text}⟧"
            coloured = "\n".join(pen("trained", line) for line in (mark + text).split("\n"))
            said += coloured if pen.colour and weight > 0 else plain
        role = block.role or "text"
        yield f"{pen('role', f'{role:<10}')} " + said.rstrip("\n").replace("\n", "\n           ")
    if len(sample.tokens) > MOST_TOKENS:
        yield pen("faint", f"           and {plural(len(sample.tokens) - MOST_TOKENS, 'more token')}")
    yield ""
