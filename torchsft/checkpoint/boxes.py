"""Boxes: rectangular parts of a tensor, and which box of a parameter a rank holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

# Both are private; tests/checkpoint/test_boxes.py holds them to FSDP2.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from torchsft.models.decoder import Piece


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it starts and how far it extends, one int per dim."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __and__(self, other: "Box") -> "Box | None":
        """Return the common part, None where there is none."""
        starts, shape = [], []
        for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True):
            start = max(a, b)
            length = min(a + n, b + m) - start
            if length <= 0:
                return None
            starts.append(start)
            shape.append(length)
        return Box(tuple(starts), tuple(shape))

    def within(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Return the index of this box in a tensor whose first element stands at `origin`."""
        offsets = [start - first for start, first in zip(self.start, origin, strict=True)]
        return tuple(
            slice(offset, offset + n) for offset, n in zip(offsets, self.shape, strict=True)
        )


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def local_box(tensor: Tensor) -> Box:
    """Return the box of `tensor` that this rank holds: all of a plain tensor.

    Raises:
        TypeError: a rank's part of the DTensor is not one box.
    """
    if not isinstance(tensor, DTensor):
        return whole_box(tensor.shape)
    _check_placements(tensor)
    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Box(tuple(start), tuple(shape))


def _check_placements(tensor: DTensor) -> None:
    """Refuse a DTensor of which a rank holds something else than one box of values.

    FSDP2 cuts what tensor parallelism has cut already, although its axis comes first: where both
    cut the same dim, it says so with a `_StridedShard` of as many parts as the axes behind it make.
    FSDP2 and DTensor itself cut differently where these do not divide the dim.
    """
    mesh_shape, placements = tensor.device_mesh.shape, tensor.placements
    for axis, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):
            dim = placement.dim
            parts = math.prod(
                size
                for size, later in zip(mesh_shape[axis + 1 :], placements[axis + 1 :], strict=True)
                if getattr(later, "dim", None) == dim
            )
            one_box = placement.split_factor == parts and tensor.shape[dim] % parts == 0
        else:
            one_box = isinstance(placement, Shard | Replicate)
        if not one_box:
            raise TypeError(
                f"a tensor of shape {tuple(tensor.shape)} placed as {tuple(placements)} on a mesh "
                f"of {tuple(mesh_shape)} is not one box per rank; place it as Shard or Replicate"
            )


def piece_box(piece: Piece) -> Box:
    """Return the box of its parameter that a Hugging Face tensor fills."""
    leading = len(piece.start) - len(piece.hf_shape)
    return Box(piece.start, (1,) * leading + piece.hf_shape)
