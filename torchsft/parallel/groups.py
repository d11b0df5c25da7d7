"""Process groups: as few as the meshes need, each with the one backend that it uses.

A process group connects each of its ranks with each other one. On GPUs only the group of all ranks
and that of the checkpoint writers are of gloo, since elsewhere the host does not talk.
"""

from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Axes of meshes that no collective goes over: their sizes alone are asked for.
SIZES_ALONE = ("dp_shard", "data")


def make_meshes(
    sizes: Mapping[str, Mapping[str, int]], device_type: str, timeout: timedelta
) -> dict[str, DeviceMesh]:
    """Return a mesh of all ranks, row-major, for each name in `sizes`; collective.

    Axes over the same ranks share a group, the default one if these are all ranks. On GPUs only
    axes of one name do, or of one rank: else a layer's collectives would wait behind FSDP's, in the
    queue of one NCCL communicator.

    Args:
        sizes: name of a mesh -> axis -> size.
        device_type: of what travels.
        timeout: of the groups' collectives.
    """
    ranks = torch.arange(dist.get_world_size())
    on_gpus = device_type == "cuda"
    groups: dict[tuple[str | int, ...], dist.ProcessGroup] = {}

    def group_of(axis: str, line: list[int]) -> dist.ProcessGroup:
        may_share = not on_gpus or len(line) == 1 or axis in SIZES_ALONE
        if may_share and len(line) == len(ranks):
            return dist.group.WORLD
        key = ("" if may_share else axis, *line)
        if key not in groups:
            backend = "nccl" if on_gpus else "gloo"
            groups[key] = dist.new_group(line, timeout, backend, group_desc=axis)
        return groups[key]

    meshes = {}
    for name, axes in sizes.items():
        grid = ranks.view(*axes.values())
        own = []
        for number, (axis, size) in enumerate(axes.items()):
            lines = grid.movedim(number, -1).reshape(-1, size).tolist()
            # every rank makes all of them, in the same order
            of_line = [group_of(axis, line) for line in lines]
            own += [g for g, line in zip(of_line, lines, strict=True) if dist.get_rank() in line]
        meshes[name] = DeviceMesh.from_group(own, device_type, grid, mesh_dim_names=tuple(axes))
    return meshes


def groups_of(meshes: Iterable[DeviceMesh]) -> dict[dist.ProcessGroup, set[str]]:
    """Return this rank's groups over which something travels: of several ranks, in the same order
    on all ranks, each with the names of its axes.
    """
    groups: dict[dist.ProcessGroup, set[str]] = {}
    for mesh in meshes:
        for axis in mesh.mesh_dim_names or ():
            if mesh[axis].size() > 1 and axis not in SIZES_ALONE:
                groups.setdefault(mesh.get_group(axis), set()).add(axis)
    return groups


def _gather(group: dist.ProcessGroup, numbers: Tensor) -> None:
    """Gather, and sum parts, as FSDP2 does (torch renames the functions that it does so by)."""
    parts = list(numbers.split(1))
    dist.all_gather(parts, parts[group.rank()].clone(), group=group)
    dist.reduce_scatter(torch.empty_like(parts[0]), parts, group=group)


def _exchange(group: dist.ProcessGroup, numbers: Tensor) -> None:
    """Exchange a number with each rank."""
    received = torch.empty_like(numbers)
    dist.all_to_all_single(received, numbers, group=group)


def _pass_on(group: dist.ProcessGroup, numbers: Tensor) -> None:
    """Exchange numbers with both neighbours, in a ring."""
    operations = []
    for step in (1, -1):
        to = (group.rank() + step) % group.size()
        source = (group.rank() - step) % group.size()
        received = torch.empty_like(numbers)
        operations.append(dist.P2POp(dist.isend, numbers, group=group, group_peer=to))
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
    for work in dist.batch_isend_irecv(operations):
        work.wait()


# What goes over an axis besides all-reduces.
TRAFFIC = {
    "pp": _pass_on,
    **dict.fromkeys(("fsdp", "edp", "tp"), _gather),
    **dict.fromkeys(("ep", "cp", "rail", "node"), _exchange),
}


def connect(groups: Mapping[dist.ProcessGroup, Iterable[str]], device: torch.device) -> None:
    """Let all ranks of each group send each other a number; collective.

    NCCL makes a group's communicator, and takes memory for it, in its first collective, which all
    of its ranks must join, and the channels of a kind of traffic in the first one of that kind:
    here, while memory is free, and not where two neighbours of a pipeline talk.

    Args:
        groups: and the axes that say what goes over them (`TRAFFIC`).
        device: of what travels.
    """
    for group, axes in groups.items():
        numbers = torch.zeros(group.size(), device=device)
        dist.all_reduce(numbers, group=group)
        kinds = [TRAFFIC[axis] for axis in sorted(axes) if axis in TRAFFIC]
        for travel in dict.fromkeys(kinds):
            travel(group, numbers)
