"""Where the time of a run goes: phases that add up to the wall time, also where one is in
another.
"""

import re
import subprocess
import sys
import time

import pytest

from torchsft.metrics import timing
from torchsft.metrics.timing import Stopwatch


def test_all_phases_add_up_to_the_time_since_the_process_began(monkeypatch):
    """By hand: started 10 s ago; 2 s startup, 5 s of steps of which 3 s are an evaluation, 1 s
    between, 4 s of export.
    """
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = Stopwatch(10.0)
    now[0] += 2
    with clock("steps"):
        now[0] += 1
        with clock("evaluation"):
            now[0] += 3
        now[0] += 1
    now[0] += 1
    with clock("export"):
        now[0] += 4
    assert clock.seconds == {
        "startup": 12.0,
        "steps": 2.0,
        "evaluation": 3.0,
        "other": 1.0,
        "export": 4.0,
    }
    assert (
        clock.shown()
        == "22.0 s: startup 12.0 s, export 4.0 s, evaluation 3.0 s, steps 2.0 s, other 1.0 s"
    )


def test_a_phase_that_raises_ends(monkeypatch):
    clock = Stopwatch(0.0)
    with pytest.raises(KeyError), clock("steps"):
        raise KeyError
    time.sleep(0.06)
    assert re.search(r"other 0\.\d s", clock.shown())


def test_the_age_of_a_process_counts_from_its_start():
    """It sleeps before it imports anything."""
    code = (
        "import time; time.sleep(0.5); from torchsft.metrics.timing import process_age; "
        "print(process_age())"
    )
    began = time.monotonic()
    age = float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert age + 0.02 >= 0.5 and age <= time.monotonic() - began + 0.02
