"""DCP's storage reader: any box of a tensor by reading only its bytes, and no trust in a pickle."""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from torchsft.checkpoint.archive import (
    HEAD_BYTES,
    TAIL_BYTES,
    bytes_of,
    read_archive,
    values_offset,
)
from torchsft.checkpoint.boxes import Box
from torchsft.checkpoint.metadata import read_metadata
from torchsft.checkpoint.storage import Folder, in_one_line
from torchsft.checkpoint.writer import OneCheckpoint, completed
from torchsft.config import InputError

SLAB_BYTES = 64 * 2**20  # the most that is read aside when a part has to be cut out
SMALL_BYTES = 64 * 2**10  # a chunk of this size is read whole
# local, remote: so many bytes between two runs are read rather than jumped over
GAPS = {False: 256, True: 2**20}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor as one archive: bytes [offset, offset + length) of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class SortedChunks:
    """The chunks of a tensor by where they begin in its first dim.

    Attributes:
        starts: where each begins.
        longest: most rows of one.
    """

    chunks: list[ChunkStorageMetadata]
    starts: list[int]
    longest: int

    @classmethod
    def of(cls, stored: TensorStorageMetadata) -> "SortedChunks":
        """Sort the chunks of a tensor of at least one dim."""
        chunks = sorted(stored.chunks, key=lambda chunk: chunk.offsets[0])
        starts = [chunk.offsets[0] for chunk in chunks]
        return cls(chunks, starts, max(chunk.sizes[0] for chunk in chunks))

    def near(self, box: Box) -> list[ChunkStorageMetadata]:
        """Return all chunks that have a part in a box, and few others."""
        first = bisect_right(self.starts, box.start[0] - self.longest)
        last = bisect_left(self.starts, box.start[0] + box.shape[0])
        return self.chunks[first:last]


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one dim of a chunk, read together with all of the dims behind it.

    Attributes:
        start: bytes from the chunk's first value.
        target: index in what is filled.
    """

    start: int
    target: tuple[int | slice, ...]


class BoxPlanner(DefaultLoadPlanner):
    """Resolves what is read of one box to the tensor that has its shape."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor."""
        return self._values


class RangeReader(OneCheckpoint, StorageReader):
    """Reads the tensors of a DCP checkpoint.

    Attributes:
        tensors: what is stored, by name.
        bytes_read: so far, headers included, `.metadata` not.

    Raises:
        InputError: see `read_metadata`.
    """

    def __init__(self, folder: Folder | str | Path) -> None:
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self._metadata = read_metadata(self.folder)
        self.tensors: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata
        self.bytes_read = 0
        self._offsets: dict[Chunk, int | None] = {}
        self._sorted: dict[str, SortedChunks] = {}
        self._sizes = {
            MetadataIndex(name, chunk.offsets): chunk.sizes
            for name, stored in self.tensors.items()
            for chunk in stored.chunks
            if 0 not in chunk.sizes
        }

    def read_metadata(self) -> Metadata:
        """Return the metadata, which was read and checked when the reader was made."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the metadata is known."""

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a tensor on the CPU, in its stored dtype.

        Raises:
            InputError: a file is absent or damaged.
        """
        stored = self.tensors[name]
        values = torch.empty(box.shape, dtype=stored.properties.dtype)
        if box.start and stored.chunks:
            # DCP looks at every chunk for every box: for V3's stacked experts that takes longer
            # than reading.
            if name not in self._sorted:
                self._sorted[name] = SortedChunks.of(stored)
            stored = replace(stored, chunks=self._sorted[name].near(box))
        chunk = ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape))
        items = create_read_items_for_chunk_list(name, stored, [chunk])
        self.read_data(LoadPlan(items), BoxPlanner(values))
        return values

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the parts of chunks that a plan names into the planner's tensors.

        Raises:
            InputError: a file is absent or damaged.
        """
        for item in plan.items:
            if 0 in item.lengths:
                continue
            target = planner.resolve_tensor(item).detach()
            chunk = self._chunk(item)
            part = Box(tuple(item.storage_offsets), tuple(item.lengths))
            in_place = target.device.type == "cpu" and target.dtype == chunk.dtype
            values = target if in_place else torch.empty(part.shape, dtype=chunk.dtype)
            try:
                self._read_part(chunk, part, values)
                if not in_place:
                    target.copy_(values)
            except Exception as error:  # what damaged bytes or a file system make of it
                raise InputError(
                    f"{self.folder} is damaged: {item.storage_index.fqn} cannot be read from "
                    f"{chunk.file} ({in_one_line(error)}); use another checkpoint"
                ) from error
            planner.commit_tensor(item, target)
        return completed(None)

    def _chunk(self, item: ReadItem) -> Chunk:
        """Return the chunk of which an item is a part."""
        index = item.storage_index
        stored, place = self.tensors[index.fqn], self._metadata.storage_data[index]
        return Chunk(
            tuple(self._sizes[index]),
            stored.properties.dtype,
            place.relative_path,
            place.offset,
            place.length,
        )

    def _read_part(self, chunk: Chunk, part: Box, target: Tensor) -> None:
        """Fill `target` with a part of a chunk: by runs of bytes, or by torch, which reads the
        whole chunk.
        """
        if chunk not in self._offsets:
            self._offsets[chunk] = self._values_offset(chunk)
        start = self._offsets[chunk]
        if start is not None:
            self._read_runs(chunk, start, part, target)
            return
        archive = bytearray(chunk.length)
        self._fill(chunk, 0, memoryview(archive))
        values = read_archive(archive, chunk.shape, chunk.dtype)
        target.copy_(values[part.within((0,) * len(chunk.shape))])

    def _values_offset(self, chunk: Chunk) -> int | None:
        """Find where in a chunk its values stand, in order; None where they do not, or where it
        does not pay to find out.
        """
        if chunk.length <= SMALL_BYTES:
            return None
        head, tail = bytearray(HEAD_BYTES), bytearray(TAIL_BYTES)
        self._fill(chunk, 0, memoryview(head))
        self._fill(chunk, chunk.length - TAIL_BYTES, memoryview(tail))
        return values_offset(head, tail, chunk.length, chunk.shape, chunk.dtype)

    def _read_runs(self, chunk: Chunk, start: int, part: Box, target: Tensor) -> None:
        """Fill `target` by runs of bytes: rows of a dim `dim` of the part, together with all of
        the chunk's dims behind it, of which the part may need only some.
        """
        whole, itemsize = chunk.shape, chunk.dtype.itemsize
        # bytes from one row of a dim to the next
        steps = [math.prod(whole[dim + 1 :]) * itemsize for dim in range(len(whole))]
        dim = len(whole) - 1
        while dim and (whole[dim] - part.shape[dim]) * steps[dim] <= GAPS[self.folder.remote]:
            dim -= 1
        needed = tuple(
            slice(first, first + n)
            for first, n in zip(part.start[dim + 1 :], part.shape[dim + 1 :], strict=True)
        )
        takes_all = part.shape[dim + 1 :] == whole[dim + 1 :]
        for run in _runs(part, steps, dim):
            rows = target[run.target]
            if takes_all and rows.is_contiguous():
                self._fill(chunk, start + run.start, bytes_of(rows))
            else:
                aside = torch.empty((len(rows), *whole[dim + 1 :]), dtype=chunk.dtype)
                self._fill(chunk, start + run.start, bytes_of(aside))
                rows.copy_(aside[(slice(None), *needed)])

    def _fill(self, chunk: Chunk, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a chunk from `start` on.

        Raises:
            ValueError: the chunk has not as many.
            OSError: they cannot be read.
        """
        end = start + target.nbytes
        if not 0 <= start <= end <= chunk.length:
            raise ValueError(f"bytes {start} to {end} of a chunk of {chunk.length}")
        self.folder.read_into(chunk.file, chunk.offset + start, target)
        self.bytes_read += target.nbytes


def _runs(part: Box, steps: list[int], dim: int) -> Iterator[Run]:
    """Cut a part of a chunk into runs of bytes.

    Args:
        part: in the chunk's coordinates.
        steps: bytes from one row of each dim to the next.
        dim: a run has rows of this one, of at most SLAB_BYTES.
    """
    rows = max(1, SLAB_BYTES // steps[dim])
    outer = [range(n) for n in part.shape[:dim]]
    for *above, first in itertools.product(*outer, range(0, part.shape[dim], rows)):
        indices = (*above, first)
        positions = [o + i for o, i in zip(part.start, indices, strict=False)]
        start = sum(p * step for p, step in zip(positions, steps, strict=False))
        yield Run(start, (*above, slice(first, first + rows)))
