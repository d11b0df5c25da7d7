"""Gradients behind the last microbatch of a step: their sum over `tp`, one norm over all parameters
of all ranks, and clipping by it.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

BUFFER = 2**26  # elements that are summed over `tp` together, 256 MiB; at least one parameter's


@torch.no_grad()
def local_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, int]]:
    """Return this rank's part of each gradient, and on how many ranks of its mesh the same part
    lies.
    """
    parts = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            parts.append((gradient.to_local(), _copies(gradient)))
        elif gradient is not None:
            parts.append((gradient, 1))
    return parts


def _copies(gradient: DTensor) -> int:
    """Return on how many ranks each element of a gradient lies."""
    copies = 1
    for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
        assert not placement.is_partial(), "a gradient that is not yet summed has no norm"
        if placement.is_replicate():
            copies *= size
    return copies


def sum_summands(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum the gradients of parameters that are replicated over `tp` in place, in fp32; collective.

    Each rank of `mesh`, the `tp` axis, has a summand of them (`models/decoder.py::local`), which
    FSDP2 has summed over microbatches, shards and replicas already. Together they are one DTensor
    that is `Partial`, or a few, so that one collective sums them and not one for each parameter.
    """
    if mesh.size() == 1:
        return
    buffers: list[list[Tensor]] = [[]]
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not _lies_whole(gradient, "tp"):
            continue
        summand = gradient.to_local()
        if sum(map(torch.numel, [*buffers[-1], summand])) > BUFFER:
            buffers.append([])
        buffers[-1].append(summand)
    for summands in filter(None, buffers):
        flat = torch.cat([summand.flatten() for summand in summands])
        # of parameters on the host, those are too
        flat = flat.to(mesh.device_type, torch.float32)
        flat = DTensor.from_local(flat, mesh, [Partial()]).full_tensor().to(summands[0].device)
        parts = flat.split([summand.numel() for summand in summands])
        sums = [part.view_as(summand) for part, summand in zip(parts, summands, strict=True)]
        torch._foreach_copy_(summands, sums)


def _lies_whole(gradient: DTensor, axis: str) -> bool:
    """Whether each rank of a mesh axis has all of what its peers on it have."""
    names = gradient.device_mesh.mesh_dim_names or ()
    return axis in names and gradient.placements[names.index(axis)].is_replicate()


def _alike(parameters: Iterable[nn.Parameter]) -> dict[Any, list[Tensor]]:
    """Return the parts of `local_gradients` by copies and dtype: torch treats a list of one dtype
    in few calls, and a number that the host knows need not travel to the device.
    """
    lists: dict[Any, list[Tensor]] = {}
    for gradient, copies in local_gradients(parameters):
        lists.setdefault((copies, gradient.dtype), []).append(gradient)
    return lists


def global_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients over all ranks, float64 scalar; equal on every rank. One
    collective.

    Every rank adds the squares of the elements that it holds, an element that lies on n ranks with
    weight 1 / n. A rank may hold no gradient, where all of its parameters are frozen.
    """
    parameters = list(parameters)
    squares = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for (copies, _), gradients in _alike(parameters).items():
        norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
        squares += norms.double().square().sum() / copies
    if dist.is_initialized():
        dist.all_reduce(squares)
    return squares.sqrt()


def sum_with(parameter: nn.Parameter, peer: int, group: dist.ProcessGroup) -> None:
    """Add to the gradient of a parameter what `peer`, a rank of `group` with the same part of it,
    has, and the other way round.
    """
    for gradient, _ in local_gradients([parameter]):
        other = torch.empty_like(gradient)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, gradient, group=group, group_peer=peer),
                dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
            ]
        )
        for work in works:
            work.wait()
        gradient += other


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a scalar tensor."""
    for gradients in _alike(parameters).values():
        torch._foreach_mul_(gradients, factor.float())


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / norm): what gradients are multiplied with so that their norm is at
    most `max_norm`.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
