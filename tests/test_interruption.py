"""Ctrl-C, faults and dead ranks, in processes that play ranks without torch: what they print, and
how they end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

PROLOGUE = """
import time
from torchsft.config import InputError
from torchsft.interruption import Preemption, run_main

def main():
    print("ready", flush=True)
"""
WAITS = "    time.sleep(60)"
TRAINS = """    with Preemption(announce=True) as preemption:
        while preemption.received is None:
            time.sleep(0.01)
        time.sleep(60)"""


def start(body, **environment):
    """A process that runs `run_main(main)`."""
    code = f"{PROLOGUE}{body}\nrun_main(main)"
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "TORCHELASTIC_ERROR_FILE")
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_outside_of_training_is_one_line_of_rank_0_and_no_traceback():
    ranks = [start(WAITS, RANK=str(rank)) for rank in range(2)]
    for rank in ranks:
        rank.stdout.readline()
        rank.send_signal(signal.SIGINT)
    errors = [rank.communicate(timeout=20)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130]
    assert errors[0].startswith("interrupted; ") and errors[0].count("\n") == 1 and errors[1] == ""


@pytest.mark.parametrize(
    ("environment", "second"), [({}, signal.SIGINT), ({"RANK": "0"}, signal.SIGTERM)]
)
def test_the_first_ctrl_c_is_a_notice_and_the_second_ends_at_once(environment, second):
    """A terminal sends SIGINT twice; torchrun, pressed twice, sends SIGINT and then SIGTERM."""
    process = start(TRAINS, **environment)
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert "SIGINT: this step is finished and saved" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(second)
    assert f"{second.name} after SIGINT: ended at once" in process.communicate(timeout=20)[1]
    assert process.returncode == 128 + second


def fail(tmp_path, *bodies):
    """Ranks under one torchrun, one after the other: (exit code, stderr) of each, and what
    torchrun's report would say.
    """
    ended, failures = [], {}
    for rank, body in enumerate(bodies):
        error_file = tmp_path / "attempt_0" / str(rank) / "error.json"
        error_file.parent.mkdir(parents=True)
        process = start(body, RANK=str(rank), TORCHELASTIC_ERROR_FILE=str(error_file))
        ended.append((process.communicate(timeout=30)[1], process.returncode))
        failures[rank] = ProcessFailure(rank, process.pid, process.returncode, str(error_file))
    return ended, ChildFailedError("recipe", failures).format_msg()


LOST = (
    "    raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:1234')"
)


def test_survivors_of_a_dead_rank_say_so_once(tmp_path):
    ended, report = fail(tmp_path, LOST, LOST)
    sentence = (
        "error: a rank has died (where it says nothing itself it was killed, often for lack of "
        "memory)"
    )
    assert ended[0][0].startswith(sentence) and ended[0][0].count("\n") == 1 and ended[1] == ("", 1)
    root = report.split("Root Cause")[1]
    assert f"traceback : {sentence}" in root and report.rstrip("=\n").splitlines()[-1].startswith(
        "  traceback : error: "
    )


def test_a_bug_keeps_its_traceback_and_survivors_are_silent(tmp_path):
    """Its traceback is the root cause of torchrun's report."""
    ended, report = fail(tmp_path, "    raise RuntimeError('shapes do not match')", LOST)
    assert "Traceback" in ended[0][0] and "RuntimeError: shapes do not match" in ended[0][0]
    assert ended[1] == ("", 1) and "shapes do not match" in report.split("Root Cause")[1]


@pytest.mark.parametrize("fault", ["InputError('line 3: no')", "OSError('line 3: no')"])
def test_what_can_be_mended_is_one_sentence_and_the_last_line_of_torchruns_report(tmp_path, fault):
    ended, report = fail(tmp_path, f"    raise {fault}")
    assert ended == [("error: line 3: no\n", 1)]
    assert report.rstrip("=\n").splitlines()[-1] == "  traceback : error: line 3: no"
    data = json.loads((tmp_path / "attempt_0" / "0" / "error.json").read_text())
    assert data["message"]["message"] == "error: line 3: no"


def test_a_command_line_that_is_not_understood_keeps_its_exit_code(tmp_path):
    ended, report = fail(tmp_path, "    raise SystemExit(2)")
    assert ended == [("", 2)] and "the command line was not understood" in report
