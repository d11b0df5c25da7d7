"""What an error of a full device says besides torch's own words.

`explaining` is a context around a computation; `explained` decorates the backward pass of an
autograd Function whose forward pass ran in one and noted, as `ctx.note`, what was to be said there.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_notes: list[Callable[[], str]] = []  # of the contexts that are entered


@contextmanager
def explaining(note: Callable[[], str]) -> Iterator[None]:
    """Add what `note` returns to an error of a full device that is raised within this context."""
    _notes.append(note)
    try:
        yield
    except torch.OutOfMemoryError as error:
        _add(error, note())
        raise
    finally:
        _notes.pop()


def current_note() -> str:
    """Return what would be said here; nothing outside of `explaining`."""
    return _notes[-1]() if _notes else ""


def explained(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Function's backward pass whose errors of a full device say `ctx.note`."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        try:
            return backward(ctx, *grads)
        except torch.OutOfMemoryError as error:
            _add(error, ctx.note)
            raise

    return run


def _add(error: torch.OutOfMemoryError, note: str) -> None:
    if note and not getattr(error, "__notes__", []):
        error.add_note(note)
