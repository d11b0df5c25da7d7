"""What is printed: numbers of each source, findings, and chosen samples with trained tokens
coloured.
"""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

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
    """Writes escape sequences, or none."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, style: str, text: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self.colour and text else text


def visible(text: str) -> str:
    """Without anything that moves the cursor, changes colours or turns the direction of writing:
    that is in the data.
    """
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character)[0] != "C"
        else f"<U+{ord(character):04X}>"
        for character in text
    )


def overview(inspection: Inspection, pen: Pen) -> Iterator[str]:
    """Lines on sources, packing, steps and findings."""
    for source in inspection.sources:
        yield from _source(source, pen)
    plan, data = inspection.plan, inspection.data
    if plan.rows:
        how = (
            data.packing
            if data.packing == "none"
            else f"{data.packing} over {plural(data.packing_buffer, 'sample')}"
        )
        filled = f"{100 * plan.fill(data.seq_len):.1f} % filled"
        rows = f"{plural(len(plan.rows), 'row')} of {data.seq_len:,} tokens"
        yield f"{pen('bold', 'packing'):<10} {rows}, {filled} ({how})"
        yield f"{pen('bold', 'training'):<10} {inspection.plan_text()}"
        if len(inspection.trained) > 1:
            for source in inspection.trained:
                times = source.weight * plan.epochs
                often = f"{times:g} time{'s' * (times != 1)}"
                yield f"           {often} through {visible(source.name)}"
        if inspection.left_out:
            yield f"           of the samples that were read: {inspection.left_out}"
        yield ""
    if inspection.comparison is not None:
        yield from comparison_lines(inspection.comparison, pen)
    yield from _findings(inspection, pen)


def _source(source: Inspected, pen: Pen) -> Iterator[str]:
    kind = f"{source.format or 'no known format'}{', evaluation' * source.evaluation}"
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    name, path = pen("bold", visible(source.name)), pen("faint", visible(source.path))
    yield f"{name} ({kind}{weight}) {path}"
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
        of_rows = f"{source.served:,} of {plural(gave, 'row')}"
        yield f"  {of_rows} compared with what serving gives the model"
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


def comparison_lines(comparison: Comparison, pen: Pen) -> Iterator[str]:
    """Counts of samples and of trained tokens, and the reasons of what differs."""
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
        missing = textwrap.shorten(visible(pair.missing), MOST_CHARACTERS, placeholder=" ...")
        yield f"    {visible(name)}: {missing}"
    if len(alone) > EXAMPLES:
        yield pen("faint", f"    and {len(alone) - EXAMPLES:,} more on one side only")
    yield ""


def pair_lines(pair: Pair, other: str, reader: Reader, pen: Pen) -> Iterator[str]:
    """The tokens of both sides as text: a line for each turn, and below it what differs and why."""
    names = [
        *([pair.ours.id] if pair.ours is not None else []),
        *([pair.theirs.name] if pair.theirs is not None else []),
    ]
    yield f"{pen('bold', visible(' beside '.join(names)))}  {pen('faint', LEGEND)}"
    if pair.missing:
        yield f"{visible(pair.missing)} ({visible(other)})"
    for start, end, reason, who in pair.stretches()[:MOST_STRETCHES]:
        side = "only ours" if who == "ours" else "only theirs"
        said = textwrap.shorten(
            visible(repr(reader.text(pair.tokens[start:end]))), MOST_CHARACTERS, placeholder=" ..."
        )
        yield f"{pen(who, side)} {reason}: {plural(end - start, 'token')} at {start:,}: {said}"
    pieces = reader.pieces(pair.tokens[:MOST_TOKENS])
    starts = [0, *itertools.accumulate(piece.count for piece in pieces)]
    kinds = [_kind(pair, i) for i in range(len(pair.tokens))]
    for block in reader.blocks(pieces):
        within = [
            (kinds[i], piece)
            for i, piece in zip(starts, pieces, strict=False)
            if block.start <= i < block.end
        ]
        said = ""
        for kind, group in itertools.groupby(within, key=lambda each: each[0]):
            said += _marked(kind, visible("".join(piece.text for _, piece in group)), pen)
        role = block.role or "text"
        yield f"{pen('role', f'{role:<10}')} " + said.rstrip("\n").replace("\n", "\n           ")
    if len(pair.tokens) > MOST_TOKENS:
        yield pen("faint", f"           and {plural(len(pair.tokens) - MOST_TOKENS, 'more token')}")
    yield ""


def _kind(pair: Pair, i: int) -> tuple[str, str]:
    """Who has a token, and who trains it: "", both, ours or theirs."""
    mine, other = bool(pair.ours_trained[i]), bool(pair.theirs_trained[i])
    trained = "both" if mine and other else "ours" if mine else "theirs" if other else ""
    return pair.sides[i], trained


def _marked(kind: tuple[str, str], text: str, pen: Pen) -> str:
    side, trained = kind
    signs = {"both": "", "ours": "+", "theirs": "-"}
    if pen.colour:
        style = (
            "trained"
            if (side, trained) == ("both", "both")
            else trained
            if side == "both"
            else side
        )
        return "\n".join(pen(style, line) for line in text.split("\n")) if style else text
    if side != "both":
        return f"{{{signs[side]}{f'⟦{text}⟧' if trained else text}}}"
    return f"⟦{signs[trained]}{text}⟧" if trained else text


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
        named = (
            (source, sample)
            for source in inspection.sources
            for sample in source.samples
            if sample.id == each
        )
        match = next(named, None)
        if match is None:
            first = next(
                (sample.id for source in inspection.sources for sample in source.samples),
                "none at all",
            )
            raise InputError(f"there is no sample {each}; ids are of the kind {first}")
        found.append(match)
    return found


def _interesting(inspection: Inspection) -> Iterator[tuple[Inspected, Sample]]:
    wrong = inspection.wrong()
    if inspection.comparison is not None:  # what is asked for comes first
        pairs = inspection.comparison.pairs
        wrong = {
            (pair.source, pair.ours.id) for pair in pairs if pair.differs and pair.ours is not None
        } or wrong
    named = {name for name, _ in wrong}
    for first in (True, False):
        for source in (
            inspection.sources if not first else [s for s in inspection.sources if s.name in named]
        ):
            yield from (
                (source, sample)
                for sample in source.samples
                if ((source.name, sample.id) in wrong) is first
            )


def sample_lines(
    sample: Sample, reader: Reader, findings: Sequence[Finding], pen: Pen
) -> Iterator[str]:
    """A sample as text: a line for each turn with its role, trained tokens coloured (without
    colour: in ⟦ ⟧).
    """
    runs = weight_runs(sample.weights)
    trained = sum(end - start for start, end, _ in runs)
    tokens = plural(len(sample.tokens), "token")
    yield f"{pen('bold', visible(sample.id))}  {tokens}, {trained:,} trained"
    yield from (
        f"{pen(finding.level, finding.level)} {finding.reason}: {visible(finding.text)}"
        for finding in findings
    )
    pieces = reader.pieces(sample.tokens[:MOST_TOKENS])
    starts = [0, *itertools.accumulate(piece.count for piece in pieces)]
    weights = sample.weights.tolist()
    for block in reader.blocks(pieces):
        within = [
            (weights[i], piece)
            for i, piece in zip(starts, pieces, strict=False)
            if block.start <= i < block.end
        ]
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
        yield pen(
            "faint", f"           and {plural(len(sample.tokens) - MOST_TOKENS, 'more token')}"
        )
    yield ""
