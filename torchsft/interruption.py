"""What ends a run early: Ctrl-C, the signal of a scheduler that wants the machine back, a fault, or
a rank that died.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchsft.cli import is_main
from torchsft.config import InputError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Slurm signals torchrun and the ranks, and torchrun passes it on: the same signal so soon is the
# same notice.
ECHO_SECONDS = 2.0
# Before a notice is printed: where a rank has died, torchrun sends SIGTERM too, and that rank's
# fault is told instead.
NOTICE_SECONDS = 0.3
# of a rank that leaves the report to another, which torchrun answers by ending all
PATIENCE_SECONDS = 3.0

# What gloo, NCCL and the store say of a peer that is gone; no other fault does.
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "remote process exited",
    "ncclRemoteError",
)
DEATH = (
    "a rank has died (where it says nothing itself it was killed, often for lack of memory); the "
    "same command continues from "
    "the last checkpoint, which torchrun --max-restarts 3 does by itself"
)


@contextmanager
def listening(numbers: Collection[int], hear: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within its context these signals only call `hear`, in a thread; before and after they do what
    they did.

    The thread reads them from a pipe that Python's C-level handler writes to: the main thread may
    be in a collective that never ends, where no Python handler runs. Only the main thread can
    enter.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] in numbers:
                hear(signal.Signals(number[0]))

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    thread.start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # the thread reads to the end and leaves
        thread.join()
        os.close(reader)


class Preemption:
    """Within its context the first signal is only noted; a second one ends the process at once
    (exit code 128 + n).

    Signals are SIGTERM, SIGUSR1 and SIGINT (Ctrl-C, which torchrun passes on; pressed again,
    torchrun sends SIGTERM).
    """

    def __init__(self, announce: bool) -> None:
        self.announce = announce  # whether to print on stderr that the signal has come
        self.received: signal.Signals | None = None  # the signal, once there was one
        self.since = 0.0  # seconds of `time.monotonic()` when it came

    def __str__(self) -> str:
        if self.received is None:
            return "a signal to another rank"
        return f"{self.received.name} {time.monotonic() - self.since:.1f} s ago"

    def __enter__(self) -> "Preemption":
        self._listening = listening(SIGNALS, self._hear)
        self._listening.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._listening.__exit__(*failure)

    def _hear(self, name: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.since, self.received = now, name
            if self.announce:
                time.sleep(NOTICE_SECONDS)
                again = " (Ctrl-C again: at once)" if name == signal.SIGINT else ""
                _print(f"{name.name}: this step is finished and saved, then the run ends{again}")
            return
        passed_on = name != signal.SIGINT or "RANK" in os.environ  # a terminal sends it once
        if name == self.received and passed_on and now - self.since <= ECHO_SECONDS:
            return
        _print(f"{name.name} after {self.received.name}: ended at once")
        os._exit(128 + name)


def run_main(main: Callable[[], None]) -> None:
    """Run `main`; what can be mended becomes one sentence on stderr and exit code 1, told by one
    rank.

    That is an InputError, an OSError (a full disk, say) and the death of another rank. Other
    exceptions keep their traceback. Under torchrun the sentence or traceback also stands in its
    closing report. Ctrl-C ends the process with exit code 130 wherever no `Preemption` listens.
    """
    main_rank = is_main()
    try:
        with listening([signal.SIGINT], _interrupted):
            main()
    except SystemExit as end:  # the command line was not understood, which rank 0 tells
        if end.code and main_rank:
            _report(
                "the command line was not understood; the reason stands above torchrun's messages"
            )
        if end.code and not main_rank:
            time.sleep(PATIENCE_SECONDS)
        raise
    except (InputError, OSError) as error:
        if not main_rank:  # all may have met it: torchrun ends this one as soon as rank 0 has left
            time.sleep(PATIENCE_SECONDS)
        _leave(f"error: {error}")
    except Exception as error:
        if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PEER_LOST):
            if not main_rank and _told_file() is None:
                time.sleep(PATIENCE_SECONDS)
            _leave(f"error: {DEATH}")
        _first_to_report()  # before the others notice that this rank is gone
        _report(traceback.format_exc())
        raise


def _interrupted(name: signal.Signals) -> None:
    """Ctrl-C outside of training: nothing is under way that is not written whole or not at all."""
    if is_main():
        _print("interrupted; the same command starts again from what has been saved")
    os._exit(128 + name)


def _leave(sentence: str) -> None:
    """End the process with exit code 1; `sentence` is printed where no other rank of this machine
    has told its fault.
    """
    if _first_to_report():
        _report(sentence)
        _print(sentence)
    else:  # torchrun shall see the fault of the other one first
        time.sleep(PATIENCE_SECONDS)
    os._exit(1)  # peers may wait in a collective: do not wait for them


def _print(sentence: str) -> None:
    """A line on stderr; below a progress bar, where there may be one."""
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}{sentence}", file=sys.stderr, flush=True)


def _told_file() -> Path | None:
    """Under torchrun: the file that marks a fault as told. All ranks that it started on this
    machine at one time share it.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # LOGS/attempt_0/LOCAL_RANK/error.json
    return Path(error_file).parent.parent / "told" if error_file else None


def _first_to_report() -> bool:
    """Whether no rank of this machine has told a fault yet; from now on one has."""
    if (path := _told_file()) is None:
        return True
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a fault that is told twice is better than one that is not
        return True
    return True


def _report(text: str) -> None:
    """Give torchrun what its closing report shall show as the root cause; in the format of its
    ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    except OSError as error:
        _print(f"warning: torchrun's error file {path} cannot be written ({error})")
