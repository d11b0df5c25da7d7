"""Python's garbage collector, at chosen steps only.

Left alone it runs on each rank at moments of its own, for up to a second where a program has many
objects, and all other ranks wait for that one in the next collective.
"""

import gc
from typing import Any


class Collector:
    """Within its context objects in cycles are freed where `behind_step` says, and nowhere else;
    what is there when it begins is looked at no more. With `every` 0 nothing changes.

    Args:
        every: so many steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def __enter__(self) -> "Collector":
        self.was_on, self.frozen = gc.isenabled(), gc.get_freeze_count()
        if self.every:
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.every:
            return
        if not self.frozen:
            gc.unfreeze()
        if self.was_on:
            gc.enable()

    def behind_step(self, step: int, pause: bool) -> None:
        """Collect, if it is time: every so many steps, and where training pauses anyway."""
        if self.every and (pause or step % self.every == 0):
            gc.collect()
