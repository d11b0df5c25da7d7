"""Steps of a loader, prepared by threads beside training."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from torchsft.data.batch import Batch
from torchsft.data.stream import Step, StepPlan, StreamLoader, TrainLoader


class Background(Iterator[Step]):
    """Steps of a loader, in its order: one thread plans, `workers` build beside training (0: only
    when a step is asked for).

    On a CUDA device they come in pinned memory. What a thread raises is raised by the `next` that
    waits for its step.

    Args:
        loader: of the steps.
        workers: threads that build them.
        device: where they go.
        count: sums up a step's microbatches.

    Attributes:
        waited: seconds that the last step was waited for.
    """

    def __init__(
        self,
        loader: TrainLoader | StreamLoader,
        workers: int,
        device: torch.device | str = "cpu",
        count: Callable[[list[Batch]], list[float]] = lambda _: [],
    ) -> None:
        self.loader, self.count = loader, count
        self.device = torch.device(device)
        self.ahead = max(2, workers) if workers else 0
        self.waited = 0.0
        self._state = loader.state_dict()
        # the outer future ends when a step is planned, the inner one when it is built
        self._steps: deque[Future[Future[Step]]] = deque()
        self._planner = ThreadPoolExecutor(1)
        self._builders = ThreadPoolExecutor(max(workers, 1))

    def __next__(self) -> Step:
        start = time.perf_counter()
        while len(self._steps) <= self.ahead:
            self._steps.append(self._planner.submit(self._plan))
        step = self._steps[0].result().result()  # what failed stays the next one
        self._steps.popleft()
        self.waited = time.perf_counter() - start
        self._state = step.state
        return step

    def _plan(self) -> Future[Step]:
        # Refused when the interpreter ends. Without it, the end would wait for all that is still to
        # be planned.
        self._builders.submit(int)
        return self._builders.submit(self._build, self.loader.plan())

    def _build(self, plan: StepPlan) -> Step:
        step = self.loader.build(plan)
        step.sums = self.count(step.microbatches)
        if self.device.type == "cuda":
            # of this thread; else every rank's pinning would make a context on GPU 0
            torch.cuda.set_device(self.device)
            step.microbatches = [batch.pin_memory() for batch in step.microbatches]
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state behind the last step that was handed out, whatever is prepared
        already.
        """
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a state of the loader; what was prepared is thrown away."""
        wait(self._steps)
        self._steps.clear()
        self.loader.load_state_dict(state)
        self._state = self.loader.state_dict()

    def close(self) -> None:
        """End the threads; nothing more can be asked for."""
        self._planner.shutdown(cancel_futures=True)
        self._builders.shutdown(cancel_futures=True)
