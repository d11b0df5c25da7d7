"""Networks of many experts for a rank that receives far more rows than others, a slice of rows at a
time.

`sliced` computes what a network of experts does, such as `grouped_swiglu` (ops/swiglu.py), but its
temporaries are those of a slice: the rows of some experts or, of an expert that alone has too many,
a part. Of all rows there are inputs and outputs, [R, D] each, in the order in which they came: a
slice's rows are sorted by expert when it is computed. In the backward pass there are inputs and one
gradient: that of inputs takes the place of that of outputs, which nobody else may read (it has come
from other ranks, or is new behind a gather of rows). Nothing but inputs is kept: a slice is
computed again in the backward pass; the repetition of a layer (activation checkpointing), which
only that pass needs, computes nothing.

Outputs and gradients are those of the network (bit by bit, where a row's product does not depend on
how many rows there are: on a CPU it does). Only an expert in several slices has a gradient of
parameters that is the sum of theirs, each as the network rounds it, added up in fp32 and rounded
once. (Where slices are whole tiles of fp8 that run along rows, the tiles stay the same.)

Shape suffixes: R rows, D width, E experts held here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchsft.ops import gradients_asked_for
from torchsft.ops.out_of_memory import current_note, explained
from torchsft.ops.repetition import Pass, repeating

# of rows sorted by expert, their weights [R, 1], where each expert's end (int32), and parameters
Network = Callable[..., Tensor]


class Slice(NamedTuple):
    """Rows, sorted by expert, that are computed together."""

    experts: slice
    rows: slice
    where: slice | Tensor  # where they lie
    offs: Tensor  # where each expert's end among them

    def place(self, number: int) -> slice | Tensor:
        """Return what the slice is of rows, of their weights or of a parameter (0, 1, more)."""
        return (self.where, self.rows, self.experts)[min(number, 2)]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the slice's part of rows, weights and parameters."""
        return [tensor[self.place(number)] for number, tensor in enumerate(tensors)]

    def has_one_expert(self) -> bool:
        """Whether it may be a part of an expert."""
        return self.experts.stop - self.experts.start == 1


def sliced(
    network: Network,
    size: int,
    ends: Sequence[int],
    order_R: Tensor | None,
    x_RD: Tensor,
    weights_R1: Tensor,
    offs_E: Tensor,
    *parameters: Tensor,
) -> Tensor:
    """Compute at most `size` of at least one row at a time.

    Args:
        network: what is computed.
        size: rows of a slice.
        ends: where each expert's sorted rows end.
        order_R: int64, where each row, sorted by expert, lies in x_RD; None: there.
        x_RD: rows; the result has their order.
        weights_R1: of sorted rows.
        offs_E: `ends`, int32.
        parameters: of the experts, [E, ...].
    """
    slices = [
        Slice(
            experts,
            rows,
            rows if order_R is None else order_R[rows],
            (offs_E[experts] - rows.start).clamp(max=rows.stop - rows.start),
        )
        for experts, rows in cut(ends, size)
    ]
    return _Sliced.apply(network, slices, x_RD, weights_R1, *parameters)


def cut(ends: Sequence[int], size: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows of experts, which end there, into slices of at most `size`.

    Yields:
        Experts, and their rows: whole experts together, or a part of one.
    """
    first = begin = before = 0
    for expert, end in enumerate(ends):
        if end - begin > size and expert > first:  # with those before it is too many
            yield slice(first, expert), slice(begin, before)
            first, begin = expert, before
        if end - begin > size:  # by itself it is
            for row in range(begin, end, size):
                yield slice(expert, expert + 1), slice(row, min(row + size, end))
            first, begin = expert + 1, end
        before = end
    if first < len(ends):
        yield slice(first, len(ends)), slice(begin, before)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        network: Network,
        slices: list[Slice],
        x_RD: Tensor,
        weights_R1: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_RD, weights_R1, *parameters)
        ctx.network, ctx.slices, ctx.note = network, slices, current_note()
        if repeating():  # whose backward pass reads no output
            return x_RD.new_empty_strided(x_RD.shape, (0, 0))
        y_RD = torch.empty_like(x_RD)
        for each in slices:
            x, weights, *rest = each.of((x_RD, weights_R1, *parameters))
            y_RD[each.where] = network(x, weights, each.offs, *rest)
        return y_RD

    @staticmethod
    @explained
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        inputs, asked = ctx.saved_tensors, gradients_asked_for(ctx)
        # The weight pass of a zero-bubble schedule, which comes later, reads it again.
        is_last_reader = asked == list(ctx.needs_input_grad[2:])
        grad_RD = grad_RD.contiguous()
        results = {
            number: grad_RD if number == 0 and is_last_reader else torch.empty_like(each)
            for number, each in enumerate(inputs)
            if asked[number]
        }
        before, sums = None, {}
        for each in ctx.slices:
            for number, gradient in _gradients(ctx.network, each, inputs, asked, grad_RD):
                if number > 1 and each.has_one_expert():
                    wide = torch.promote_types(gradient.dtype, torch.float32)
                    earlier = sums[number] if each.experts == before else 0
                    gradient = sums[number] = gradient.to(wide) + earlier
                results[number][each.place(number)] = gradient
            before = each.experts
        return None, None, *map(results.get, range(len(inputs)))


def _gradients(
    network: Network, some: Slice, inputs: Sequence[Tensor], asked: Sequence[bool], grad_RD: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Compute a slice again, and go back through it.

    Args:
        network: what is computed.
        some: the slice.
        inputs: all rows, weights and parameters.
        asked: whether the gradient of each of `inputs` is.
        grad_RD: of the outputs.

    Yields:
        Numbers of those inputs, and their gradients.
    """
    pairs = zip(some.of(inputs), asked, strict=True)
    leaves = [tensor.detach().requires_grad_(is_asked) for tensor, is_asked in pairs]
    x, weights, *parameters = leaves
    # as a repetition: nothing reads the output
    with torch.enable_grad(), Pass((), {}, True):
        y = network(x, weights, some.offs, *parameters)
    numbers = [number for number, leaf in enumerate(leaves) if leaf.requires_grad]
    wanted = [leaves[number] for number in numbers]
    yield from zip(numbers, torch.autograd.grad(y, wanted, grad_RD[some.where]), strict=True)
