"""One gradient norm over all parameters of all ranks, and clipping by it."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, int]]:
    """This rank's part of each gradient, and on how many ranks of its mesh the same part lies."""
    parts = []
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        copies = 1
        if isinstance(gradient, DTensor):
            assert not any(p.is_partial() for p in gradient.placements), (
                "a gradient that is not yet summed has no norm"
            )
            axes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
            copies = math.prod(size for size, placement in axes if placement.is_replicate())
            gradient = gradient.to_local()
        parts.append((gradient, copies))
    return parts


def global_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients over all ranks, float64 scalar; equal on every rank. One collective.

    Every rank adds the squares of the elements that it holds, an element that lies on n ranks with
    weight 1 / n. A rank may hold no gradient, where all of its parameters are frozen.
    """
    parameters = list(parameters)
    device = parameters[0].device
    parts = local_gradients(parameters)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if parts:
        norms = torch.stack(torch._foreach_norm([gradient for gradient, _ in parts]))
        copies = torch.tensor([n for _, n in parts], dtype=torch.float64, device=device)
        squares = (norms.double().square() / copies).sum()
    if dist.is_initialized():
        dist.all_reduce(squares)
    return squares.sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a scalar tensor."""
    gradients = [gradient for gradient, _ in local_gradients(parameters)]
    if not gradients:
        return
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / norm): what gradients are multiplied with so that their norm is at most
    `max_norm`.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
