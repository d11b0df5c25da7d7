"""What is printed: numbers of each source, findings, and chosen samples with trained tokens
coloured.
"""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from tools.inspection.compare import Comparison, Pair
from tools.inspection.lint import Finding, title
from tools.inspection.reading import Reader
from tools.inspection.reasons import REASONS
from tools.inspection.report import Inspected, Inspection, plural, weight_runs
from torchsft.config import InputError
from torchsft.data.template import Sample

BARS = " ▁▂▃▄▅▆▇█"
EXAMPLES = 3  # of each finding
MOST_TOKENS = 4000  # of a printed sample
MOST_STRETCHES = 20  # of differing tokens, of a printed sample
MOST_CHARACTERS = 300  # of a printed finding
STYLES = {
    "bold": "1",
    "faint": "2",
    "error": "31;1",
    "warning": "33;1",
    "note": "34;1",
    "trained": "48;5;22;38;5;157",
    "role": "36;1",
    "ours": "48;5;24;38;5;195",
    "theirs": "48;5;88;38;5;224",
}
LEGEND = (
    "⟦both train⟧ ⟦+only we train⟧ ⟦-only they train⟧ {+a token of ours alone} {-of theirs alone}"
)


class Pen:
    """Writes escape sequences, or none.

    Args:
        colour: whether it writes any.
    """

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, style: str, text: str) -> str:
        """Return a text in a style."""
        if not self.colour or not text:
            return text
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def visible(text: str) -> str:
    """Return a text without anything that moves the cursor, changes colours or turns the direction
    of writing: that is in the data.
    """
    shown = []
    for character in text:
        is_control = unicodedata.category(character)[0] == "C"
        if is_control and character not in "\n\t":
            shown.append(f"<U+{ord(character):04X}>")
        else:
            shown.append(character)
    return "".join(shown)


def _short(text: str) -> str:
    """Return a text on one line and cut."""
    return textwrap.shorten(text, MOST_CHARACTERS, placeholder=" ...")


def overview(inspection: Inspection, pen: Pen) -> Iterator[str]:
    """Yield lines on sources, packing, steps and findings."""
    for source in inspection.sources:
        yield from _source(source, pen)
    if inspection.plan.rows:
        yield from _plan(inspection, pen)
    if inspection.comparison is not None:
        yield from comparison_lines(inspection.comparison, pen)
    yield from _findings(inspection, pen)


def _plan(inspection: Inspection, pen: Pen) -> Iterator[str]:
    """Yield lines on packing and steps."""
    plan = inspection.plan
    data = inspection.data
    how = data.packing
    if data.packing != "none":
        how += f" over {plural(data.packing_buffer, 'sample')}"
    filled = f"{100 * plan.fill(data.seq_len):.1f} % filled"
    rows = f"{plural(len(plan.rows), 'row')} of {data.seq_len:,} tokens"
    yield f"{pen('bold', 'packing')}    {rows}, {filled} ({how})"
    yield f"{pen('bold', 'training')}   {inspection.plan_text()}"
    if len(inspection.trained) > 1:
        for source in inspection.trained:
            times = source.weight * plan.epochs
            often = f"{times:g} time{'s' * (times != 1)}"
            yield f"           {often} through {visible(source.name)}"
    if inspection.left_out:
        yield f"           of the samples that were read: {inspection.left_out}"
    yield ""


def _source(source: Inspected, pen: Pen) -> Iterator[str]:
    """Yield lines on one source."""
    kind = f"{source.format or 'no known format'}{', evaluation' * source.evaluation}"
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    name = pen("bold", visible(source.name))
    path = pen("faint", visible(source.path))
    yield f"{name} ({kind}{weight}) {path}"
    share = 100 * source.supervised_tokens / max(1, source.tokens)
    rows = plural(source.rows, "row")
    samples = plural(len(source.samples), "sample")
    tokens = plural(source.tokens, "token")
    yield f"  {rows}, {samples}, {tokens}, {share:.1f} % of them trained"
    if source.tokens:
        _, counts = source.histogram
        bars = "".join(BARS[-(-n * 8 // max(counts))] for n in counts)
        yield f"  lengths 0 {bars} {plural(source.longest, 'token')}"
    yield from (f"  {text}" for text in source.outcomes())
    if source.served:
        gave = len(set(source.samples.rows.tolist()))
        of_rows = f"{source.served:,} of {plural(gave, 'row')}"
        yield f"  {of_rows} compared with what serving gives the model"
    yield ""


def _findings(inspection: Inspection, pen: Pen) -> Iterator[str]:
    """Yield lines on findings, with examples, and their number."""
    errors = inspection.level("error")
    warnings = inspection.level("warning")
    for level, reason, n in inspection.tally():
        yield f"{pen(level, f'{level:<8}')}{n:>7,}  {pen('bold', reason)}: {title(reason)}"
        these = (finding for finding in inspection.findings if finding.reason == reason)
        for finding in itertools.islice(these, EXAMPLES):
            text = visible(f"{finding.sample}: {finding.text}").replace("\n", " ")
            yield f"                 {_short(text)}"
        if n > EXAMPLES:
            yield pen("faint", f"                 and {n - EXAMPLES:,} more")
    if inspection.findings:
        yield ""
    counts = f"{plural(errors, 'error')}, {plural(warnings, 'warning')}"
    yield counts if errors or warnings else "no findings"  # notes are none


def comparison_lines(comparison: Comparison, pen: Pen) -> Iterator[str]:
    """Yield lines on a comparison: numbers of samples and of trained tokens, and the reasons of
    what differs.
    """
    samples = ", ".join(f"{n:,} {what}" for what, n in comparison.samples().items())
    trained = comparison.trained()
    yield f"{pen('bold', 'comparison')} with {visible(comparison.other)}"
    yield f"  samples    {samples}"
    only = f"{trained['ours only']:,} only by us, {trained['theirs only']:,} only by them"
    yield f"  trained    {trained['both']:,} tokens by both, {only}"
    for reason, who, n, tokens in comparison.tally():
        counts = f"{plural(n, 'sample')}, {plural(tokens, 'token')}"
        side = "only ours" if who == "ours" else "only theirs"
        yield f"  {pen('bold', reason)}, {side}: {counts}: {REASONS[reason]}"
    alone = [pair for pair in comparison.pairs if pair.ours is None or pair.theirs is None]
    for pair in alone[:EXAMPLES]:
        name = pair.ours.id if pair.ours is not None else pair.theirs.name
        yield f"    {visible(name)}: {_short(visible(pair.missing))}"
    if len(alone) > EXAMPLES:
        yield pen("faint", f"    and {len(alone) - EXAMPLES:,} more on one side only")
    yield ""


def pair_lines(pair: Pair, other: str, reader: Reader, pen: Pen) -> Iterator[str]:
    """Yield the tokens of both sides as text: what differs and why, and a line for each turn.

    Args:
        other: name of the other tool or file.
    """
    names = []
    if pair.ours is not None:
        names.append(pair.ours.id)
    if pair.theirs is not None:
        names.append(pair.theirs.name)
    yield f"{pen('bold', visible(' beside '.join(names)))}  {pen('faint', LEGEND)}"
    if pair.missing:
        yield f"{visible(pair.missing)} ({visible(other)})"
    for start, end, reason, who in pair.stretches()[:MOST_STRETCHES]:
        side = "only ours" if who == "ours" else "only theirs"
        text = _short(visible(repr(reader.text(pair.tokens[start:end]))))
        yield f"{pen(who, side)} {reason}: {plural(end - start, 'token')} at {start:,}: {text}"
    marks = [_mark(pair, i) for i in range(len(pair.tokens))]
    yield from _turn_lines(pair.tokens, marks, _marked_text, reader, pen)
    yield ""


def _turn_lines(
    tokens: np.ndarray,
    marks: Sequence[Any],
    marked: Callable[[Any, str, Pen], str],
    reader: Reader,
    pen: Pen,
) -> Iterator[str]:
    """Yield a line for each turn of a text.

    Args:
        marks: of each token, how it is to be shown.
        marked: writes a text with its mark.
    """
    pieces = reader.pieces(tokens[:MOST_TOKENS])
    starts = [0, *itertools.accumulate(piece.count for piece in pieces)]
    mark_and_piece = [(marks[start], piece) for start, piece in zip(starts, pieces, strict=False)]
    for block in reader.blocks(pieces):
        first = bisect_left(starts, block.start)
        last = bisect_left(starts, block.end)
        line = ""
        for mark, group in itertools.groupby(mark_and_piece[first:last], key=itemgetter(0)):
            text = "".join(piece.text for _, piece in group)
            line += marked(mark, visible(text), pen)
        role = f"{block.role or 'text':<10}"
        yield f"{pen('role', role)} " + line.rstrip("\n").replace("\n", "\n           ")
    if len(tokens) > MOST_TOKENS:
        more = plural(len(tokens) - MOST_TOKENS, "more token")
        yield pen("faint", f"           and {more}")


class _Mark(NamedTuple):
    """Who has a token (both, ours, theirs), and who trains it ("" for nobody)."""

    side: str
    trained_by: str


def _mark(pair: Pair, i: int) -> _Mark:
    """Return the mark of token i."""
    trained_by = ""
    if pair.ours_trained[i]:
        trained_by = "both" if pair.theirs_trained[i] else "ours"
    elif pair.theirs_trained[i]:
        trained_by = "theirs"
    return _Mark(pair.sides[i], trained_by)


def _marked_text(mark: _Mark, text: str, pen: Pen) -> str:
    """Return a text of both sides as LEGEND explains it, or in colours."""
    if pen.colour:
        style = mark.side
        if mark.side == "both":
            style = "trained" if mark.trained_by == "both" else mark.trained_by
        return _coloured(style, text, pen) if style else text
    signs = {"both": "", "ours": "+", "theirs": "-"}
    if mark.side == "both":
        return f"⟦{signs[mark.trained_by]}{text}⟧" if mark.trained_by else text
    inner = f"⟦{text}⟧" if mark.trained_by else text
    return f"{{{signs[mark.side]}{inner}}}"


def _coloured(style: str, text: str, pen: Pen) -> str:
    """Return a text with each of its lines in a style."""
    return "\n".join(pen(style, line) for line in text.split("\n"))


def choose(inspection: Inspection, asked: Sequence[str]) -> list[tuple[Inspected, Sample]]:
    """Return the samples to print, with their sources.

    Args:
        asked: ids, or a number of samples, of which those with findings come first.

    Raises:
        InputError: there is no sample with this id.
    """
    chosen: list[tuple[Inspected, Sample]] = []
    for each in asked:
        if each.isdecimal():
            chosen += itertools.islice(_by_interest(inspection), int(each))
        else:
            chosen.append(_with_id(inspection, each))
    return chosen


def _with_id(inspection: Inspection, name: str) -> tuple[Inspected, Sample]:
    """Return the sample of an id."""
    first = "none at all"
    for source in inspection.sources:
        for sample in source.samples:
            if sample.id == name:
                return source, sample
            if first == "none at all":
                first = sample.id
    raise InputError(f"there is no sample {name}; ids are of the kind {first}")


def _by_interest(inspection: Inspection) -> Iterator[tuple[Inspected, Sample]]:
    """Yield all samples, those with errors or warnings first; in a comparison, those that
    differ.
    """
    interesting = set()
    if inspection.comparison is not None:
        for pair in inspection.comparison.pairs:
            if pair.differs and pair.ours is not None:
                interesting.add((pair.source, pair.ours.id))
    if not interesting:
        interesting = inspection.wrong()
    names = {name for name, _ in interesting}
    for source in inspection.sources:
        for sample in source.samples if source.name in names else ():
            if (source.name, sample.id) in interesting:
                yield source, sample
    for source in inspection.sources:
        for sample in source.samples:
            if (source.name, sample.id) not in interesting:
                yield source, sample


def sample_lines(
    sample: Sample, reader: Reader, findings: Sequence[Finding], pen: Pen
) -> Iterator[str]:
    """Yield a sample as text: its findings, and a line for each turn with its role, trained tokens
    coloured (without colour: in ⟦ ⟧).
    """
    runs = weight_runs(sample.weights)
    trained = sum(end - start for start, end, _ in runs)
    tokens = plural(len(sample.tokens), "token")
    yield f"{pen('bold', visible(sample.id))}  {tokens}, {trained:,} trained"
    for finding in findings:
        level = pen(finding.level, finding.level)
        yield f"{level} {finding.reason}: {visible(finding.text)}"
    yield from _turn_lines(sample.tokens, sample.weights.tolist(), _weighted_text, reader, pen)
    yield ""


def _weighted_text(weight: float, text: str, pen: Pen) -> str:
    """Return a text of one weight, as `sample_lines` shows it."""
    if weight <= 0:
        return text
    mark = f"\u00d7{weight:g} " if weight != 1 else ""
    if pen.colour and weight > 0:  # which a weight that is no number is not
        return _coloured("trained", mark + text, pen)
    return f"⟦{mark}{text}⟧"
