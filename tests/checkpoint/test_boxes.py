"""The box that a rank holds, against the shards that DTensor itself makes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchsft.checkpoint.boxes import Box, local_box, piece_box
from torchsft.models.decoder import Piece

LAYOUTS = [
    ((8,), (Shard(0),)),
    ((3,), (Shard(1),)),
    ((4,), (Replicate(),)),
    ((2, 4), (Shard(1), Shard(0))),  # experts: edp, ep
    ((2, 3), (Replicate(), Shard(0))),
    ((3, 2), (Shard(0), Shard(0))),
    ((2, 2, 2), (Replicate(), Shard(1), Shard(0))),
]
# Sizes that do not divide, and fewer rows than ranks (empty shards).
SHAPES = [(8, 6), (7, 5), (3, 4), (1, 1), (5, 7, 3)]


@pytest.mark.parametrize(("sizes", "placements"), LAYOUTS)
def test_the_box_is_the_shard_that_distribute_tensor_gives(sizes, placements):
    world = torch.Size(sizes).numel()
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", sizes)
            for shape in SHAPES:
                full = torch.arange(torch.Size(shape).numel()).view(shape)
                tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
                box = local_box(tensor)
                assert box.shape == tuple(tensor.to_local().shape), (shape, rank)
                assert torch.equal(full[box.within((0,) * full.ndim)], tensor.to_local()), (
                    shape,
                    rank,
                )
        finally:
            dist.destroy_process_group()


def placed(shape, sizes, placements):
    """An empty DTensor of this shape, on a mesh of these sizes."""
    mesh = init_device_mesh("cpu", sizes)
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.empty(0), mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def test_boxes_of_all_ranks_cover_a_tensor_once():
    full = torch.zeros(7, 5)
    for rank in range(6):
        dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
        box = local_box(placed((7, 5), (3, 2), (Shard(0), Shard(1))))
        dist.destroy_process_group()
        full[box.within((0, 0))] += 1
    assert torch.equal(full, torch.ones(7, 5))


# Sizes of (dp_replicate, fsdp, tp), a shape, and how tensor parallelism places it.
FULLY_SHARDED = [
    ((1, 2, 2), (8, 6), Shard(0)),
    ((1, 2, 2), (10, 3), Shard(0)),  # 5 rows on each tp rank: 3 and 2
    ((1, 3, 2), (14, 3), Shard(0)),  # 7: 3, 3 and 1
    ((1, 4, 2), (10, 3), Shard(0)),  # 5: 2, 2, 1 and none
    ((1, 2, 4), (12,), Shard(0)),
    ((2, 2, 2), (6,), Shard(0)),
    ((1, 3, 2), (7, 6), Shard(1)),
    ((2, 2, 2), (7, 6), Replicate()),
]


def check_fsdp(rank):
    """On rank `rank` of a world of each layout: `local_box` against what FSDP2 keeps, and against
    torch's checkpoints.
    """
    checked = 0
    for sizes, shape, tensor_parallel in FULLY_SHARDED:
        if rank >= math.prod(sizes):
            continue
        dist.init_process_group("fake", rank=rank, world_size=math.prod(sizes), store=FakeStore())
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "fsdp", "tp"))
        full = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        module = nn.Module()
        module.weight = nn.Parameter(
            distribute_tensor(full, mesh["tp"], [tensor_parallel], src_data_rank=None)
        )
        fully_shard(module, mesh=mesh["dp_replicate", "fsdp"] if sizes[0] > 1 else mesh["fsdp"])
        weight = module.weight
        strided = any(isinstance(placement, _StridedShard) for placement in weight.placements)
        assert strided == (tensor_parallel == Shard(0)), weight.placements
        box = local_box(weight)
        assert torch.equal(full[box.within((0,) * full.ndim)], weight.to_local()), (sizes, shape)
        extent, start = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        assert extent == box.shape and (start == box.start or 0 in extent), (sizes, shape)
        checked += 1
        dist.destroy_process_group()
    return checked


def test_the_box_is_what_fsdp_keeps_of_a_tensor_parallel_parameter(ranks):
    """One process per rank, as torch remembers meshes with their ranks."""
    checked = sum(ranks(1, check_fsdp, rank=rank)[0] for rank in range(8))
    assert checked == sum(math.prod(sizes) for sizes, _, _ in FULLY_SHARDED)


def test_placements_that_are_no_box_are_refused():
    for shape, sizes, placements in [
        ((8, 4), (2,), (_StridedShard(0, split_factor=2),)),
        ((8, 4), (2, 2), (_StridedShard(0, split_factor=4), Shard(0))),
        # FSDP2 and DTensor would cut 9 rows differently
        ((9, 4), (4, 2), (_StridedShard(0, split_factor=2), Shard(0))),
        ((8, 4), (2,), (Partial(),)),
    ]:
        dist.init_process_group("fake", rank=0, world_size=math.prod(sizes), store=FakeStore())
        tensor = placed(shape, sizes, placements)
        with pytest.raises(TypeError, match="not one box per rank"):
            local_box(tensor)
        dist.destroy_process_group()


def test_intersection_and_indexing():
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (4, 3))
    assert a & b == Box((3, 2), (1, 1))
    assert a & Box((4, 0), (1, 9)) is None
    assert (a & b).within(b.start) == (slice(0, 1), slice(2, 3))


def test_the_box_of_an_expert_piece_has_leading_ones():
    assert piece_box(Piece("k", (16, 32), (3, 16, 0))) == Box((3, 16, 0), (1, 16, 32))
