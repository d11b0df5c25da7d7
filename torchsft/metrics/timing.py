"""Where the time of a run goes: every second since the process began belongs to one phase."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTUP = "startup"


def process_age() -> float:
    """Return seconds since this process was started, its imports included; 0 where the system does
    not tell (it is not Linux).
    """
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the boot
    return max(uptime - started, 0.0)


class Stopwatch:
    """Seconds of each phase. Time in a phase within another one counts for the inner one alone, so
    that all add up.

    What lies between phases is "startup" until the first phase begins, and "other" from then on.
    """

    def __init__(self, age: float) -> None:
        self._now = time.perf_counter()
        self.seconds = {STARTUP: age}  # by phase, in the order in which they began
        self._phase = STARTUP

    def _turn(self, phase: str) -> None:
        """From now on it is `phase`."""
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._now
        self.seconds.setdefault(phase, 0.0)
        self._now, self._phase = now, phase

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """What is done in this context is `phase`."""
        before = "other" if self._phase == STARTUP else self._phase
        self._turn(phase)
        try:
            yield
        finally:
            self._turn(before)

    def shown(self) -> str:
        """Return all phases so far, the longest first; those too short to be seen are "other"."""
        self._turn(self._phase)
        total = sum(self.seconds.values())
        seen = {phase: s for phase, s in self.seconds.items() if phase != "other" and s >= 0.05}
        parts = [
            f"{phase} {s:,.1f} s" for phase, s in sorted(seen.items(), key=lambda item: -item[1])
        ]
        if (rest := total - sum(seen.values())) >= 0.05:
            parts.append(f"other {rest:,.1f} s")
        return f"{total:,.1f} s: {', '.join(parts)}"
