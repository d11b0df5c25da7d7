"""Gradients behind the last microbatch of a step: their sum over `tp`, one norm over all parameters
of all ranks, and clipping by it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
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


class ExactSummands:
    """This rank's summands of gradients in fp32, where `.grad` is of less: of parameters that are
    replicated over `tp` while their masters are in bf16, added up over microbatches.

    FSDP2 sums a unit's gradients over shards and replicas in fp32, as one flat tensor, calls a hook
    with it, rounds it, and lets `.grad` of each parameter be a view of what it has rounded, at the
    same place, or adds that to it; then it calls hooks of the parameter. So the exact part of a
    parameter is where the first `.grad` of a step is.

    Args:
        modules: whose parameters have memory, in FSDP2.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.flat = torch.empty(0)
        self.sums: dict[nn.Parameter, tuple[int, Tensor]] = {}  # their place, and themselves
        for module in modules:
            rounded = [p for p in module.parameters() if _is_rounded(p) and _lies_whole(p, "tp")]
            for parameter in rounded:
                parameter.register_post_accumulate_grad_hook(self._add)
            units = [part for part in module.modules() if isinstance(part, FSDPModule)]
            for unit in units if rounded else []:
                unit.set_all_reduce_hook(self._reduced)

    def _reduced(self, flat: Tensor) -> None:
        if flat.is_cuda:  # made on FSDP2's stream of reduce-scatters, but read on this one
            flat.record_stream(torch.cuda.current_stream())
        self.flat = flat

    def _add(self, parameter: nn.Parameter) -> None:
        summand = parameter.grad.to_local()
        first, total = self.sums.get(parameter, (summand.storage_offset(), 0))
        exact = self.flat[first : first + summand.numel()].view_as(summand)
        self.sums[parameter] = first, exact + total

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Return those of the step that ends, and forget them."""
        found = {parameter: total for parameter, (_, total) in self.sums.items()}
        self.flat = self.flat[:0].clone()
        self.sums.clear()
        return found


def _is_rounded(parameter: nn.Parameter) -> bool:
    """Whether a parameter is trained and its gradient has fewer bits than fp32."""
    return parameter.requires_grad and parameter.dtype != torch.float32


def sum_summands(
    parameters: Iterable[nn.Parameter],
    mesh: DeviceMesh,
    device: torch.device,
    exact: Mapping[nn.Parameter, Tensor],
) -> None:
    """Sum the gradients of parameters that are replicated over `tp` in place, in fp32; collective.

    Each rank of `mesh`, the `tp` axis, has a summand of them (`models/decoder.py::local`), which
    FSDP2 has summed over microbatches, shards and replicas already. Together they are one DTensor
    that is `Partial`, or a few, so that one collective sums them and not one for each parameter.

    Args:
        parameters: of this rank.
        mesh: the `tp` axis.
        device: where that is done, also for parameters on the host.
        exact: of `ExactSummands`; the summands of other parameters are their gradients.
    """
    if mesh.size() == 1:
        return
    buffers: list[list[tuple[Tensor, Tensor]]] = [[]]  # gradients, and what is summed
    for parameter in parameters:
        if parameter.grad is None or not _lies_whole(parameter.grad, "tp"):
            continue
        gradient = parameter.grad.to_local()
        if sum(each.numel() for each, _ in buffers[-1]) + gradient.numel() > BUFFER:
            buffers.append([])
        buffers[-1].append((gradient, exact.get(parameter, gradient)))
    for buffer in filter(None, buffers):
        gradients, summands = zip(*buffer, strict=True)
        flat = torch.cat([summand.flatten() for summand in summands]).to(device, torch.float32)
        flat = DTensor.from_local(flat, mesh, [Partial()]).full_tensor().to(gradients[0].device)
        parts = flat.split([gradient.numel() for gradient in gradients])
        sums = [part.view_as(each) for part, each in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, sums)


def _lies_whole(tensor: Tensor, axis: str) -> bool:
    """Whether each rank of a mesh axis has all of what its peers on it have."""
    names = (isinstance(tensor, DTensor) and tensor.device_mesh.mesh_dim_names) or ()
    return axis in names and tensor.placements[names.index(axis)].is_replicate()


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
