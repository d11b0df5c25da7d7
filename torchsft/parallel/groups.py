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


def _gather(group: dist.ProcessGroup, one: Tensor, each: Tensor) -> None:
    dist.all_gather_into_tensor(each, one, group=group)
    dist.reduce_scatter_tensor(one, each, group=group)


def _exchange(group: dist.ProcessGroup, one: Tensor, each: Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(each), each, group=group)


def _pass_on(group: dist.ProcessGroup, one: Tensor, each: Tensor) -> None:
    """Let neighbours, the first and the last rank too, send each other a number."""
    rank, size, operations = group.rank(), group.size(), []
    for step in (1, -1):
        to, source = (rank + step) % size, (rank - step) % size
        operations += [
            dist.P2POp(dist.isend, one, group=group, group_peer=to),
            dist.P2POp(dist.irecv, torch.empty_like(one), group=group, group_peer=source),
        ]
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
        one = torch.zeros(1, device=device)
        dist.all_reduce(one, group=group)
        for travel in {TRAFFIC[axis]: None for axis in sorted(axes) if axis in TRAFFIC}:
            travel(group, one, one.new_zeros(group.size()))
