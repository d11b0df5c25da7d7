"""A plan as a page: memory over time, the pipeline, and what a search found; one HTML file that
loads nothing and runs no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from tools.markup import element, picture, policy, rectangle, word
from tools.planning.trace import name_of
from torchsft.planning.memory import RESERVE, Memory
from torchsft.planning.simulation import (
    EXCHANGE,
    GATHERED,
    GRADIENTS,
    IN_FLIGHT,
    LAYER,
    LOSS,
    MOMENTS,
    PARAMETERS,
    RECEIVED,
)

if TYPE_CHECKING:
    from tools.planning.replay import Event

# In pixels.
WIDTH, LEFT, TOP = 1120, 84, 12
MEMORY_HEIGHT, TRACK_HEIGHT, AXIS_HEIGHT = 240, 24, 24
MOST_COLUMNS = 400  # of memory over time
NARROWEST_NUMBER = 13  # box that has its microbatch's number in it

RESERVED = "reserve (CUDA, NCCL, allocator)"
# From below; what of them stays all the time is at the bottom.
MEMORY_COLOURS = {
    RESERVED: "#b8bcc4",
    PARAMETERS: "#3b6ea8",
    MOMENTS: "#7fa8d6",
    GATHERED: "#5aa0a0",
    GRADIENTS: "#8fc1a9",
    RECEIVED: "#c9b458",
    IN_FLIGHT: "#e39a4b",
    LAYER: "#cc5f5a",
    EXCHANGE: "#a3527a",
    LOSS: "#6d4c8c",
}
EVENT_COLOURS = {
    "forward": "#3b6ea8",
    "backward": "#d9843b",
    "input gradients": "#d9843b",
    "weight gradients": "#5f9e7a",
    "exposed communication": "#b34a63",
    "optimizer": "#6d4c8c",
    "wait": "#e9eaee",
}
OTHER_STAGE = 0.68  # opacity of stages but a rank's first one

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="__POLICY__">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>__TITLE__</title>
<style>
body { margin: 28px auto; max-width: 1180px; padding: 0 24px; color: #1b1d21; background: #fff;
  font: 14px/1.5 Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 21px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 34px 0 6px; }
h3 { font-size: 14px; margin: 16px 0 4px; font-weight: 600; }
p { margin: 4px 0; color: #5f636d; } svg { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 6px 0; }
td, th { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e3e3de;
  vertical-align: top; }
th { color: #5f636d; font-weight: 600; }
td.command { font: 12px/1.5 "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  min-width: 380px; overflow-wrap: anywhere; }
.key { display: inline-block; margin: 2px 18px 2px 0; white-space: nowrap; }
.key svg { display: inline-block; vertical-align: -1px; margin-right: 6px; }
</style>
</head>
<body>
__BODY__
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """Words in rows and columns; the last column may be a command line, to be copied."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    commands: bool = False


def render(
    title: str,
    facts: Mapping[str, str],
    memories: Sequence[Memory] = (),
    available: int = 0,
    events: Sequence[Event] = (),
    tables: Sequence[Table] = (),
) -> str:
    """Return the page as text.

    Args:
        title: what is planned.
        facts: what is known of it, by name.
        memories: of the pipeline ranks that are shown.
        available: bytes that a GPU has.
        events: of the step; none: no pipeline is drawn.
        tables: below.
    """
    parts = [element("h1", escape(title)), _table(Table("", (), list(facts.items())))]
    if memories:
        parts.append(element("h2", "Memory over time"))
        parts.append(
            element(
                "p",
                "GB of a GPU through the passes of a step over this rank's layers, one after the "
                "other: the worst moment of each. The dashed line is what the GPU has.",
            )
        )
    for memory in memories:
        needed = f"pipeline rank {memory.pp_rank}: {memory.needed / 1e9:.1f} GB"
        parts.append(element("h3", needed))
        parts.append(_memory(memory, available))
    if events:
        ranks = len({event.pp_rank for event in events})
        step = max(event.end for event in events)
        parts.append(element("h2", f"Pipeline: {step:.2f} s a step, {ranks} rank(s)"))
        about = "Numbers are microbatches; a rank's later stages are paler. Hover for details."
        parts.append(element("p", about))
        parts.append(_pipeline(events))
    for table in tables:
        parts += [element("h2", escape(table.title)), element("p", escape(table.note))]
        parts.append(_table(table))
    page = PAGE.replace("__TITLE__", escape(title)).replace("__POLICY__", policy(PAGE))
    return page.replace("__BODY__", "\n".join(parts))


def _table(table: Table) -> str:
    """Return rows of words as HTML."""
    lines = [[element("th", escape(heading)) for heading in table.headings]]
    for row in table.rows:
        cells = [element("td", escape(text)) for text in row]
        if table.commands:
            cells[-1] = element("td", escape(row[-1]), **{"class": "command"})
        lines.append(cells)
    rows = [element("tr", "".join(line)) for line in lines if line]
    return element("div", element("table", "\n".join(rows)), **{"class": "scroll"})


def _legend(colours: Mapping[str, str], words: Mapping[str, str]) -> str:
    """Return the colours of what there is, in words."""
    keys = []
    for name, text in words.items():
        box = rectangle(0, 0, 11, 11, rx=2, fill=colours[name])
        swatch = element("svg", box, width=11, height=11)
        keys.append(element("span", swatch + escape(text), **{"class": "key"}))
    return element("div", "".join(keys))


def _ticks(most: float) -> Iterator[float]:
    """Yield round numbers from 0 to `most`, up to eight."""
    if most <= 0:
        return
    power = 10 ** math.floor(math.log10(most))
    steps = (power * each for each in (0.1, 0.2, 0.5, 1, 2))
    step = next(each for each in steps if most / each < 8)
    yield from (step * number for number in range(int(most / step) + 1))


# ---------------------------------------------------------------- memory


def _memory(memory: Memory, available: int) -> str:
    """Draw what a rank holds over time, purpose upon purpose."""
    columns = thin(memory.timeline or [memory.held])
    shown = {RESERVED: RESERVE} | memory.held
    top = 1.05 * max(available, memory.needed)
    scale = (MEMORY_HEIGHT - 2 * TOP) / top
    wide = (WIDTH - LEFT - 8) / len(columns)
    heights = [0.0] * len(columns)
    parts = []
    for tick in _ticks(top / 1e9):
        y = MEMORY_HEIGHT - TOP - tick * 1e9 * scale
        parts.append(rectangle(LEFT, y, WIDTH - LEFT - 8, 0.5, fill="#e3e3de"))
        parts.append(word(LEFT - 8, y + 4, f"{tick:g}", text_anchor="end", fill="#5f636d"))
    for purpose, colour in MEMORY_COLOURS.items():
        sizes = [RESERVE if purpose == RESERVED else each.get(purpose, 0) for each in columns]
        if any(sizes):
            above = [low + size * scale for low, size in zip(heights, sizes, strict=True)]
            path = _area(heights, above, wide)
            name = element("title", escape(purpose))
            parts.append(element("path", name, d=path, fill=colour))
            heights = above
    y = MEMORY_HEIGHT - TOP - available * scale
    line = {"stroke": "#b3261e", "stroke_width": 1.5, "stroke_dasharray": "7 5"}
    parts.append(element("line", x1=LEFT, x2=WIDTH - 8, y1=y, y2=y, **line))
    words = {
        purpose: f"{purpose} {shown[purpose] / 1e9:.1f}"
        for purpose in MEMORY_COLOURS
        if shown.get(purpose)
    }
    drawn = picture(WIDTH, MEMORY_HEIGHT, "#ffffff", parts, font_size=12)
    return drawn + _legend(MEMORY_COLOURS, words)


def thin(timeline: Sequence[Mapping[str, int]]) -> list[Mapping[str, int]]:
    """Return at most so many moments as are drawn: of neighbours the one that holds most."""
    together = math.ceil(len(timeline) / MOST_COLUMNS)
    return [
        max(timeline[place : place + together], key=lambda held: sum(held.values()))
        for place in range(0, len(timeline), together)
    ]


def _area(below: Sequence[float], above: Sequence[float], wide: float) -> str:
    """Return the path around an area of columns."""

    def line(heights: Sequence[float]) -> list[str]:
        return [
            f"{LEFT + (place + side) * wide:.1f} {MEMORY_HEIGHT - TOP - height:.1f}"
            for place, height in enumerate(heights)
            for side in (0, 1)
        ]

    return "M" + "L".join([*line(above), *reversed(line(below))]) + "Z"


# ---------------------------------------------------------------- the pipeline


def _pipeline(events: Sequence[Event]) -> str:
    """Draw what each pipeline rank does, in time."""
    ranks = sorted({event.pp_rank for event in events})
    end = max(event.end for event in events)
    scale = (WIDTH - LEFT - 8) / end
    height = TOP + len(ranks) * TRACK_HEIGHT
    first = {
        rank: min((e.stage for e in events if e.pp_rank == rank and e.stage is not None), default=0)
        for rank in ranks
    }
    parts = []
    for tick in _ticks(end):
        x = LEFT + tick * scale
        parts.append(rectangle(x, TOP, 0.5, height - TOP + 4, fill="#c9cbd1"))
        parts.append(word(x, height + 18, f"{tick:g} s", text_anchor="middle", fill="#5f636d"))
    for place, rank in enumerate(ranks):
        y = TOP + place * TRACK_HEIGHT + 16
        parts.append(word(LEFT - 8, y, f"rank {rank}", text_anchor="end", fill="#5f636d"))
    for event in events:
        y = TOP + ranks.index(event.pp_rank) * TRACK_HEIGHT + 1
        parts += _box(event, y, scale, event.stage in (None, first[event.pp_rank]))
    kinds = {kind: kind for kind in EVENT_COLOURS if any(e.kind == kind for e in events)}
    drawn = picture(WIDTH, height + AXIS_HEIGHT, "#ffffff", parts, font_size=11)
    return drawn + _legend(EVENT_COLOURS, kinds)


def _box(event: Event, y: float, scale: float, is_first: bool) -> Iterator[str]:
    """Draw an event, with its microbatch's number if there is room."""
    x, wide = LEFT + event.begin * scale, (event.end - event.begin) * scale
    stage = "" if event.stage is None else f", stage {event.stage}"
    told = f"{name_of(event)}{stage}: {event.begin:.4f} to {event.end:.4f} s"
    opacity = 1 if is_first else OTHER_STAGE
    look = {"fill": EVENT_COLOURS[event.kind], "fill_opacity": opacity}
    line = {"stroke": "#ffffff", "stroke_width": min(1.0, wide / 6)}
    title = element("title", escape(told))
    yield rectangle(x, y, wide, TRACK_HEIGHT - 2, title, **look, **line)
    if event.microbatch is not None and wide >= NARROWEST_NUMBER:
        middle = {"text_anchor": "middle", "pointer_events": "none", "fill": "#ffffff"}
        yield word(x + wide / 2, y + 15, str(event.microbatch), **middle)
