"""DCP's save planner and stager: what this rank writes, in which chunks, and its copy in host
memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.staging import AsyncStager

from torchsft.checkpoint.boxes import Box
from torchsft.parallel.collectives import gather_objects, rank_and_size

CHUNK_BYTES = 256 * 2**20  # the most that one chunk of ours holds
_FAILURE = "failure"  # what a stager that failed hands to the planner, in place of tensors


def chunk_box(item: WriteItem) -> Box:
    """Return the box of its tensor that an item writes."""
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def write_item(name: str, shape: Sequence[int], dtype: torch.dtype, box: Box) -> WriteItem:
    """Return the item that writes a box of the tensor `name` of global `shape`."""
    chunk = ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape))
    properties = TensorProperties(dtype=dtype)
    data = TensorWriteData(chunk, properties, torch.Size(shape))
    index = MetadataIndex(name, box.start)
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def owned_items(tensors: Mapping[str, Tensor]) -> list[WriteItem]:
    """Choose what this rank writes of tensors and DTensors that it holds; collective.

    Of a box that several ranks hold, DCP chooses the rank that has least to write so far.

    Raises:
        ValueError: the ranks together do not hold each element of a tensor.
    """
    plan = create_default_local_save_plan(dict(tensors), is_coordinator=True)
    items = [item for item in plan.items if _has_values(item)]
    planner = DefaultSavePlanner(flatten_state_dict=False)
    plans, _ = planner.create_global_plan(gather_objects(SavePlan(items)))
    rank, _ = rank_and_size()
    return plans[rank].items


def _has_values(item: WriteItem) -> bool:
    """Whether an item writes something; an empty tensor is written as it is."""
    data = item.tensor_data
    return 0 not in data.chunk.sizes or 0 in data.size


def chunks_of(item: WriteItem) -> Iterator[WriteItem]:
    """Cut an item into ones of at most CHUNK_BYTES, along the first dim that can be cut."""
    data, box = item.tensor_data, chunk_box(item)
    dtype = data.properties.dtype
    size = box.size * dtype.itemsize
    if size <= CHUNK_BYTES or max(box.shape, default=1) == 1:
        yield item
        return
    dim = next(dim for dim, n in enumerate(box.shape) if n > 1)
    length = box.shape[dim]
    at_once = max(1, CHUNK_BYTES * length // size)
    for first in range(0, length, at_once):
        start, shape = list(box.start), list(box.shape)
        start[dim] += first
        shape[dim] = min(at_once, length - first)
        part = Box(tuple(start), tuple(shape))
        smaller = write_item(item.index.fqn, data.size, dtype, part)
        yield from chunks_of(smaller)  # one row of this dim may still be too large


class OwnedPlanner(DefaultSavePlanner):
    """Plans to write given items of tensors, of which it is given this rank's boxes.

    Args:
        items: what this rank writes, a whole box each (see `owned_items`).
    """

    def __init__(self, items: Sequence[WriteItem]) -> None:
        super().__init__()
        self._items = items
        self._starts = {item.index.fqn: item.tensor_data.chunk.offsets for item in items}

    def create_local_plan(self) -> SavePlan:
        """Return the plan of this rank's chunks.

        Raises:
            Exception: what kept the stager from copying them.
        """
        if _FAILURE in self.state_dict:
            raise self.state_dict[_FAILURE]
        chunks = [chunk for item in self._items for chunk in chunks_of(item)]
        return SavePlan(chunks, planner_data=self.mappings)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of a chunk."""
        name = write_item.index.fqn
        held = self.state_dict[name]
        place = chunk_box(write_item).within(self._starts[name])
        return held[place]


class HostStager(AsyncStager):
    """Copies tensors into host memory, which is allocated once (pinned if they are on CUDA).

    Attributes:
        ended: `time.perf_counter()` when the last copy was done.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self.host: dict[str, Tensor] = {}
        self.ended = 0.0

    def stage(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor | Exception]:
        """Return the same tensors in host memory. A failure is handed to the planner, from which
        all ranks learn of it.
        """
        try:
            return self.copy(state_dict)
        except (RuntimeError, MemoryError) as failure:  # no host memory
            return {_FAILURE: failure}
        finally:
            self.ended = time.perf_counter()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same tensors in host memory."""
        host = {}
        for name, values in tensors.items():
            memory, kind = self.host.get(name), (values.shape, values.dtype)
            if memory is None or (memory.shape, memory.dtype) != kind:
                shape, dtype = kind
                memory = torch.empty(shape, dtype=dtype, pin_memory=values.is_cuda)
            host[name] = memory.copy_(values, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self.host = host
        return host
