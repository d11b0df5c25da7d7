"""What ends a run early: the signal of a scheduler that wants the machine back, or a fault."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torchsft.config import InputError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Slurm signals torchrun and the ranks, and torchrun passes it on: the same signal so soon is the same notice.
ECHO_SECONDS = 2.0


class Preemption:
    """Within its context the first SIGTERM or SIGUSR1 is only noted; a second one ends the process at once (exit code 128 + n).
    Outside of it signals do what they did before. Only the main thread can enter. A thread reads the signals from a pipe that
    Python's C-level handler writes to: the main thread may be in a collective that never ends, where no Python handler runs."""

    def __init__(self, tell: bool) -> None:
        self.tell = tell  # whether to say on stderr that the signal has been heard
        self.received: signal.Signals | None = None  # the signal, once there was one
        self.since = 0.0  # seconds of `time.monotonic()` when it came

    def __str__(self) -> str:
        if self.received is None:
            return "a signal to another rank"
        return f"{self.received.name} {time.monotonic() - self.since:.1f} s ago"

    def __enter__(self) -> "Preemption":
        self._pipe, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # the thread reads to the end and leaves
        self._thread.join()
        os.close(self._pipe)

    def _listen(self) -> None:
        while number := os.read(self._pipe, 1):
            if number[0] not in SIGNALS:
                continue
            now, name = time.monotonic(), signal.Signals(number[0])
            if self.received is None:
                self.since, self.received = now, name
                if self.tell:
                    print(f"{name.name}: this step is finished and saved, then the run ends", file=sys.stderr, flush=True)
            elif name != self.received or now - self.since > ECHO_SECONDS:
                print(f"{name.name} after {self.received.name}: ended at once", file=sys.stderr, flush=True)
                os._exit(128 + name)


def guarded(main: Callable[[], None]) -> None:
    """Run `main`; an InputError, or an OSError (a full disk, say), becomes one sentence on stderr and exit code 1. Where all
    ranks meet the same fault, torchrun ends the others as soon as rank 0 has left, so that it is told once."""
    patience = 0 if os.environ.get("RANK", "0") == "0" else 3  # seconds
    try:
        main()
    except SystemExit as end:  # the command line was not understood, which rank 0 tells
        time.sleep(patience if end.code else 0)
        raise
    except (InputError, OSError) as error:
        time.sleep(patience)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # peers may wait in a collective: do not wait for them
