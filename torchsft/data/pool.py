"""Processes that tokenise chunks of rows beside the one that reads and writes.

Not multiprocessing: its processes import the main program (and torch) again, and live on when this
one is killed. Here each process reads from a pipe, which ends with the process that writes to it.
Over the pipe it gets the preparer once, and then chunks; it answers each chunk before the next one
is sent.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from torchsft.config import InputError
from torchsft.data.preparer import Chunk, Preparer, TokenisedChunk

FEW_CHUNKS = 8  # as many are tokenised here before further processes would have started
MAX_PROCESSES = 16  # more would wait for the one that reads and writes
WORKER = [sys.executable, "-c", "from torchsft.data import pool; pool.work()"]


def tokenise(preparer: Preparer, chunks: Iterator[Chunk]) -> Iterator[TokenisedChunk]:
    """Tokenise each chunk, in order; by further processes where there is much to do.

    Raises:
        InputError: one of these processes ended.
    """
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    for i, chunk in enumerate(chunks, start=1):
        yield preparer.tokenised(chunk)
        knows_format = preparer.format is not None  # which the other processes have to know
        if i >= FEW_CHUNKS and processes > 1 and knows_format:
            break
    yield from _tokenise_elsewhere(preparer, chunks, processes)


def _tokenise_elsewhere(
    preparer: Preparer, chunks: Iterator[Chunk], processes: int
) -> Iterator[TokenisedChunk]:
    """Tokenise each chunk in another process; each process has one chunk at a time."""
    workers: deque[_Worker] = deque()  # the one that has worked longest comes first
    try:
        for chunk in chunks:
            finished = None
            if len(workers) < processes:
                workers.append(_Worker())
                workers[-1].send(preparer)
            else:
                finished = workers[0].receive()
                workers.rotate(-1)
            workers[-1].send(chunk)
            if finished is not None:
                yield finished
        for worker in workers:
            yield worker.receive()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"a process that tokenises {preparer.name} ended, perhaps for lack of memory; see "
            f"above, and start again"
        ) from error
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A further process, as the one that started it sees it."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def send(self, message: Preparer | Chunk) -> None:
        """Send the preparer, or a chunk to tokenise."""
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def receive(self) -> TokenisedChunk:
        """Wait for the answer to the chunk that was sent."""
        return pickle.load(self.process.stdout)

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()


def work() -> None:
    """Be a further process: read the preparer and then chunks, and answer each of them, until the
    pipe ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    requests: Any = sys.stdin.buffer
    preparer: Preparer = pickle.load(requests)
    while requests.peek(1):
        chunk: Chunk = pickle.load(requests)
        pickle.dump(preparer.tokenised(chunk), answers)
        answers.flush()
