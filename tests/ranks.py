"""A pool of processes that play the ranks of a run: started once, since each start costs 10 s of
imports.

A job is a module-level function; it is run on n ranks with the environment that torchrun would set,
so that `World` works as it does for a user. Each job runs in a fork of its rank's process, so no
job sees what another left behind (DTensor keeps caches that name the process groups of destroyed
meshes). A rank that raises makes the job fail with that rank's traceback.

Once in some thousand jobs a rank was seen to die in native code ("malloc(): unaligned tcache chunk
detected"; valgrind finds nothing wrong in the same job, so threads of torch race there). One such
death in a session is told at its end and the job is run again; a second one fails.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

CRASHES = (-signal.SIGABRT, -signal.SIGSEGV)


class Crash(AssertionError):
    """A rank died in native code."""


def _serve(pipe: Connection) -> None:
    os.setsid()  # a group of its own: the pool ends this process and its fork together
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from torchsft.launch import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    while (job := pipe.recv()) is not None:
        with tempfile.TemporaryFile("w+") as trace:
            child = os.fork()
            if child == 0:
                faulthandler.enable(trace)  # where Python was when native code crashed
                _work(pipe, *job)
            _, status = os.waitpid(child, 0)
            if status:
                trace.seek(0)
                code = os.waitstatus_to_exitcode(status)
                pipe.send(
                    (
                        code if code in CRASHES else False,
                        f"the process ended with status {code}\n{trace.read()}",
                    )
                )


def _work(
    pipe: Connection,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    import torch

    # torch 2.11 often crashes in a fork whose first thread begins elsewhere
    torch.set_num_threads(1)
    try:
        # pickle's own bytes: multiprocessing would share a tensor's memory, which ends with this
        # process
        answer = (True, pickle.dumps(function(**arguments)))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    os._exit(0)


class RankPool:
    """Ranks on this machine, started when a job first needs them."""

    def __init__(self) -> None:
        self.ranks: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self.crashes: list[str] = []

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, ours))

    def run(self, n: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Results of `function(**arguments)` on ranks 0 to n - 1; arguments and results must
        pickle.
        """
        try:
            return self._run(n, function, arguments)
        except Crash as crash:
            self.crashes.append(f"{function.__name__}({arguments}): {crash}")
            if len(self.crashes) > 1:
                raise
            return self._run(n, function, arguments)

    def _run(self, n: int, function: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        self._start(n - len(self.ranks))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, (_, pipe) in enumerate(self.ranks[:n]):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": n,
                "LOCAL_WORLD_SIZE": n,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            pipe.send((function, arguments, {k: str(v) for k, v in environment.items()}))
        results: list[Any] = [None] * n
        waiting = {self.ranks[rank][1]: rank for rank in range(n)}
        while waiting:
            ready = wait(list(waiting), timeout=300)
            if not ready:
                self.close(kill=True)
                raise AssertionError(f"ranks {sorted(waiting.values())} gave no answer in 300 s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    good, results[rank] = pipe.recv()
                except EOFError:
                    good, results[rank] = False, "the process ended"
                # the others may wait for it in a collective: end them all, the next job starts anew
                if good is not True:
                    self.close(kill=True)
                    raise (Crash if good in CRASHES else AssertionError)(
                        f"rank {rank} of {n} failed:\n{results[rank]}"
                    )
                results[rank] = pickle.loads(results[rank])
        return results

    def close(self, kill: bool = False) -> None:
        """End all processes of the pool."""
        for process, pipe in self.ranks:
            if kill:
                os.killpg(process.pid, signal.SIGKILL)
            elif process.is_alive():
                pipe.send(None)
            process.join()
            pipe.close()
        self.ranks = []
