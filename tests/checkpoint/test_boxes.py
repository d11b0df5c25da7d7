"""The box that a rank holds, against the shards that DTensor itself makes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchsft.checkpoint.boxes import Box, local_box, piece_box, shard_box
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
                assert torch.equal(full[box.within((0,) * full.ndim)], tensor.to_local()), (shape, rank)
        finally:
            dist.destroy_process_group()


def test_boxes_of_all_ranks_cover_a_tensor_once():
    full = torch.zeros(7, 5)
    for coordinate in itertools.product(range(3), range(2)):
        box = shard_box((7, 5), (3, 2), (Shard(0), Shard(1)), coordinate)
        full[box.within((0, 0))] += 1
    assert torch.equal(full, torch.ones(7, 5))


def test_placements_that_are_no_box_are_refused():
    from torch.distributed.tensor.placement_types import _StridedShard

    with pytest.raises(TypeError, match="not one box per rank"):
        shard_box((8, 4), (2,), (_StridedShard(0, split_factor=2),), (0,))


def test_intersection_and_indexing():
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (4, 3))
    assert a & b == Box((3, 2), (1, 1))
    assert a & Box((4, 0), (1, 9)) is None
    assert (a & b).within(b.start) == (slice(0, 1), slice(2, 3))


def test_the_box_of_an_expert_piece_has_leading_ones():
    assert piece_box(Piece("k", (16, 32), (3, 16, 0))) == Box((3, 16, 0), (1, 16, 32))
