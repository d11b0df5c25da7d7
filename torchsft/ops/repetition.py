"""What the first pass through a layer leaves for its repetition in the backward pass.

Activation checkpointing computes a layer again. A computation whose result must be the same then,
or that costs more than the memory of its result, is wrapped here; outside of activation
checkpointing the wrapping does nothing.

    once               any computation that has no gradient
    keeping_attention  the operations of attention, which have one

What is kept has a name; the `Pass` says which names it keeps, so that a layer has each once.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

Result = TypeVar("Result")
# Where tokens go, and what that asks of other ranks and of the host: kept by every layer that is
# computed again, which so cannot route otherwise.
ROUTING = frozenset({"choice", "exchange", "frequency"})
ATTENTION, PRODUCTS = "attention", "products"


class Pass(AbstractContextManager):
    """A context: the first pass through a layer, or its repetition."""

    running: "Pass | None" = None

    def __init__(
        self,
        names: Collection[str],
        kept: dict[str, Any],
        repeating: bool,
        move: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """Make one of the two.

        Args:
            names: of what is kept.
            kept: what the first pass leaves, the same object for both.
            repeating: whether it is the repetition.
            move: gives what stands for a tensor (or another value) in `kept` or, in a repetition,
                that tensor.
        """
        self.names, self.kept, self.repeating, self.move = names, kept, repeating, move

    def __enter__(self) -> Self:
        self.outer, Pass.running = Pass.running, self
        return self

    def __exit__(self, *_: Any) -> None:
        Pass.running = self.outer


def repeating() -> bool:
    """Whether a layer is computed again."""
    return Pass.running is not None and Pass.running.repeating


def once(name: str, compute: Callable[[], Result]) -> Result:
    """Return what `compute` returns or, in a repetition, of which there is one, what it returned in
    the first pass; what was put among the kept before that pass is not computed.
    """
    running = Pass.running
    if running is None or name not in running.names:
        return compute()
    if running.repeating:
        return tree_map(running.move, running.kept.pop(name))
    if name in running.kept:
        return running.kept[name]
    result = compute()
    running.kept[name] = tree_map(running.move, result)
    return result


def keeping_attention() -> AbstractContextManager:
    """Return a context around attention, in which a repetition takes outputs from the first pass.

    Gradients come from the operations' own backward passes, which read inputs and outputs. (That of
    `flex` on CUDA is compiled and not seen here: it is computed again.)
    """
    running = Pass.running
    if running is None or ATTENTION not in running.names:
        return nullcontext()
    return _Attention(running)


class _Attention(TorchDispatchMode):
    def __init__(self, running: Pass) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.move, self.again = running.move, None
        if running.repeating:
            self.again = iter(running.kept.pop(ATTENTION))
        else:
            running.kept[ATTENTION] = self.outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" not in func.name() and "attn" not in func.name():
            return func(*args, **(kwargs or {}))
        if self.again is None:
            found = func(*args, **(kwargs or {}))
            self.outputs.append(tree_map(self.move, found))
        else:
            found = tree_map(self.move, next(self.again))
        # Autograd marks the tensors that it is given here: each time others.
        return tree_map_only(torch.Tensor, Tensor.detach, found)
