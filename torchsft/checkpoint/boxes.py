"""Boxes: rectangular parts of a tensor, which box of a parameter a rank holds, and which rank
writes it.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

# private; tests/checkpoint/test_boxes.py holds it to FSDP2
from torch.distributed.tensor.placement_types import _StridedShard

from torchsft.models.decoder import Piece


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it starts and how far it extends, one int per dim."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __and__(self, other: "Box") -> "Box | None":
        """The common part; None where there is none."""
        for a, n, b, m in zip(self.start[:1], self.shape, other.start, other.shape, strict=False):
            if a >= b + m or b >= a + n:  # most of a stack's boxes, told apart without more ado
                return None
        start = tuple(map(max, self.start, other.start))
        dims = zip(self.start, self.shape, other.start, other.shape, start, strict=True)
        shape = tuple(min(a + n, b + m) - s for a, n, b, m, s in dims)
        return Box(start, shape) if min(shape, default=1) > 0 else None

    def within(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element stands at `origin`."""
        return tuple(
            slice(s - o, s - o + n) for s, o, n in zip(self.start, origin, self.shape, strict=True)
        )


def shard_box(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Box:
    """The box of a DTensor of global `shape` that the rank at mesh `coordinate` holds. DTensor's
    rule: axis by axis, the part that the axes before left is cut as by `torch.chunk`: equal parts,
    rounded up, the last ones smaller or empty. FSDP2 cuts what tensor parallelism has cut already,
    although its axis comes first: where both cut the same dim, it says so with a `_StridedShard`,
    whose turn comes after all axes behind it. A TypeError where a rank's part is not one box, or
    where FSDP2
    and DTensor itself differ: a `_StridedShard` of a dim that the axes behind it do not cut
    evenly.
    """
    start, extent = [0] * len(shape), list(shape)

    def cut(dim: int, size: int, index: int) -> None:
        part = -(-extent[dim] // size)
        offset = min(part * index, extent[dim])
        start[dim] += offset
        extent[dim] = min(part, extent[dim] - offset)

    later: list[tuple[int, int, int]] = []
    for axis, (size, placement, index) in enumerate(
        zip(mesh_shape, placements, coordinate, strict=True)
    ):
        if type(placement) is Shard:
            cut(placement.dim, size, index)
        elif isinstance(placement, _StridedShard):
            behind = zip(mesh_shape[axis + 1 :], placements[axis + 1 :], strict=True)
            parts = math.prod(
                n for n, other in behind if getattr(other, "dim", None) == placement.dim
            )
            if placement.split_factor != parts or extent[placement.dim] % parts:
                raise TypeError(
                    f"{tuple(shape)} placed as {tuple(placements)} on "
                    f"{tuple(mesh_shape)} is not one box per rank"
                )
            later.append((placement.dim, size, index))
        elif not isinstance(placement, Replicate):
            raise TypeError(
                f"a parameter placed as {placement} is not one box per rank; place it "
                f"as Shard or Replicate"
            )
    for last in reversed(later):
        cut(*last)
    return Box(tuple(start), tuple(extent))


def local_box(tensor: Tensor) -> Box:
    """The box of `tensor` that this rank holds: all of a plain tensor."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        return shard_box(tensor.shape, mesh.shape, tensor.placements, mesh.get_coordinate())
    return Box((0,) * tensor.ndim, tuple(tensor.shape))


def piece_box(piece: Piece) -> Box:
    """The box of its parameter that a Hugging Face tensor fills."""
    return Box(piece.start, (1,) * (len(piece.start) - len(piece.hf_shape)) + piece.hf_shape)


def share_out(items: Mapping[Any, tuple[int, Collection[int]]]) -> dict[Any, int]:
    """Which rank writes each item of (bytes, ranks that hold it): the one of these with the fewest
    bytes so far. Items that few ranks hold come first (so an expert is gathered only over them),
    then large ones.
    """
    load, owners = Counter(), {}
    for key, (size, ranks) in sorted(
        items.items(), key=lambda item: (len(item[1][1]), -item[1][0])
    ):
        owners[key] = min(ranks, key=lambda rank: (load[rank], rank))
        load[owners[key]] += size
    return owners
