"""A planned step as a Chrome trace, which Perfetto and chrome://tracing open: one track for each
pipeline rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.planning.replay import Event


def microseconds(seconds: float) -> float:
    """Return a time as the format has it; of the nanosecond, so that neighbours share it."""
    return round(seconds * 1e6, 3)


def trace(events: Sequence[Event]) -> dict[str, Any]:
    """Return the trace as JSON, in the Trace Event Format of chrome://tracing: complete events
    ("X"), and the names of tracks ("M").
    """
    found: list[dict[str, Any]] = []
    for rank in sorted({event.pp_rank for event in events}):
        track = {"ph": "M", "pid": 0, "tid": rank}
        found.append({**track, "name": "thread_name", "args": {"name": f"pipeline rank {rank}"}})
        found.append({**track, "name": "thread_sort_index", "args": {"sort_index": rank}})
    for event in events:
        begin, end = microseconds(event.begin), microseconds(event.end)
        arguments = {"stage": event.stage, "microbatch": event.microbatch}
        found.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": event.pp_rank,
                "name": name_of(event),
                "cat": event.kind,
                "ts": begin,
                "dur": round(end - begin, 3),
                "args": {key: value for key, value in arguments.items() if value is not None},
            }
        )
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def name_of(event: Event) -> str:
    """Return what happens, and to which microbatch."""
    return event.kind if event.microbatch is None else f"{event.kind} {event.microbatch}"


def write_trace(path: Path, events: Sequence[Event]) -> None:
    """Write the trace."""
    path.write_text(json.dumps(trace(events), separators=(",", ":")) + "\n")
