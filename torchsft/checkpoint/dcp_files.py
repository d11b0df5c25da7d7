"""DCP's files, written and read without DCP: any slice of a tensor by its bytes, and no trust in a
pickle.

.metadata       a pickle: which box of which tensor lies where; read with records without behaviour
                for DCP's classes
*.distcp        chunks behind each other, each what `torch.save` makes of one tensor: a zip archive
                of uncompressed values
checkpoint.json the manifest: size and checksum of every other file, written last
"""

import io
import itertools
import json
import math
import mmap
import pickle
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.metadata as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo  # private, but part of the format
from torch.utils.serialization import config as serialization

from torchsft.checkpoint.boxes import Box
from torchsft.checkpoint.storage import Folder, Output, told
from torchsft.config import InputError

METADATA = ".metadata"
MANIFEST = "checkpoint.json"
CHUNK_BYTES = 256 * 2**20  # the most that one chunk of ours holds
SLAB_BYTES = 64 * 2**20  # the most that is read aside when a part has to be cut out
SMALL_BYTES = 64 * 2**10  # a chunk of this size is read whole
HEAD_BYTES, TAIL_BYTES = 1024, 2048  # of a chunk: there is all that `torch.save` says of the values
# local, remote: so many bytes between two runs are read rather than jumped over
GAPS = {False: 256, True: 2**20}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor as one `torch.save` archive: bytes [offset, offset + length) of a file of
    the checkpoint.
    """

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


# name, shape of the whole tensor, dtype, where a box of it lies
Written = tuple[str, tuple[int, ...], torch.dtype, Chunk]
_without_crc = threading.Lock()


class ChunkWriter:
    """Writes one file (such as `__0_0.distcp`) from start to end, chunk by chunk. A context
    manager: `size` and `crc32` of the complete file are there when it is left. `written` has (name,
    shape, dtype, Chunk) of each chunk, for `write_metadata`.
    """

    def __init__(self, folder: Folder, file: str) -> None:
        self.file = file
        self.written: list[Written] = []
        self._context = folder.writer(file)

    def __enter__(self) -> "ChunkWriter":
        self._out = self._context.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._context.__exit__(*failure)
        self.size, self.crc32 = self._out.size, self._out.crc32

    def write(self, name: str, shape: Iterable[int], box: Box, values: Tensor) -> None:
        """Append a box of the tensor `name` of global `shape`, in chunks of at most `CHUNK_BYTES`;
        an empty box of a tensor
        that has elements is left out. `values`: any device, dtype and strides. An OSError where
            they cannot be written.
        """
        shape, values = tuple(shape), values.detach().cpu().contiguous()
        assert tuple(values.shape) == box.shape, (
            f"{name}: {tuple(values.shape)} values for the box {box}"
        )
        if not values.numel() and math.prod(shape):
            return
        if (
            values.nbytes > CHUNK_BYTES
            and (dim := next((d for d, n in enumerate(box.shape) if n > 1), None)) is not None
        ):
            rows = max(1, CHUNK_BYTES * box.shape[dim] // values.nbytes)
            for first in range(0, box.shape[dim], rows):
                # contiguous: the dims before have size 1
                part = values.narrow(dim, first, min(rows, box.shape[dim] - first))
                start = (*box.start[:dim], box.start[dim] + first, *box.start[dim + 1 :])
                self.write(name, shape, Box(start, tuple(part.shape)), part)
            return
        offset = self._out.size
        # torch.save writes a tensor's whole storage: here one of these values alone, in the same
        # memory.
        alone = (
            torch.frombuffer(_bytes_of(values), dtype=values.dtype)
            if values.numel()
            else values.new_empty(0)
        )
        # The checksums inside the archive are left out: they take as long as the file's own, and
        # nothing reads them. The option is global: one thread at a time.
        with _without_crc, serialization.patch("save.compute_crc32", False):
            try:
                torch.save(alone.view(values.shape), self._out)
            except RuntimeError as error:  # torch's archive writer hides what the file said
                raise (
                    error.__context__ if isinstance(error.__context__, OSError) else error
                ) from None
        self.written.append(
            (name, shape, values.dtype, Chunk(box, self.file, offset, self._out.size - offset))
        )


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())


def write_metadata(folder: Folder, written: Iterable[Written]) -> Output:
    """Write `.metadata`, by which DCP finds what the files hold, from what the writers of all files
    say.
    """
    tensors: dict[str, dcp.TensorStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for name, shape, dtype, chunk in written:
        size = torch.Size(shape)
        entry = tensors.setdefault(
            name, dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), size, [])
        )
        assert (entry.size, entry.properties.dtype) == (size, dtype), name
        index = dcp.MetadataIndex(name, chunk.box.start, len(entry.chunks))
        entry.chunks.append(
            dcp.ChunkStorageMetadata(torch.Size(chunk.box.start), torch.Size(chunk.box.shape))
        )
        assert index not in places, f"{name} is written twice at {chunk.box.start}"
        places[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
    metadata = dcp.Metadata(tensors, {name: (name,) for name in tensors}, places, dcp.StorageMeta())
    metadata.version = "1.0.0"  # of DCP's format
    with folder.writer(METADATA) as out:
        out.write(pickle.dumps(metadata))
    return out


class _Record:
    """What stands in for a class of DCP: keeps what the pickle says, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


# All that `dcp.save` of torch 2.11 to 2.13 puts into a `.metadata` besides dtypes, sizes and plain
# values.
_KNOWN: dict[tuple[str, str], type] = {
    (module, name): type(name, (_Record,), {})
    for module, names in {
        "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata "
        "BytesStorageMetadata "
        "ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING StorageMeta",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",
    }.items()
    for name in names.split()
} | {("torch", "Size"): tuple}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in _KNOWN:
            raise InputError(f"names {module}.{name}, which DCP's metadata has no use for")
        return _KNOWN[module, name]


def read_metadata(folder: Folder) -> dict[str, Stored]:
    """The tensors of a DCP checkpoint by name, without what else DCP saved. No code that a
    `.metadata` names is run. An
    InputError: no `.metadata`, a damaged one, or one that names something that DCP's metadata does
    not need.
    """
    try:
        data = folder.read(METADATA)
    except OSError as error:
        raise InputError(
            f"{folder} is no DCP checkpoint: its {METADATA} cannot be read ({error}); "
            f"give another one"
        ) from error
    try:
        return _tensors(_MetadataUnpickler(io.BytesIO(data)).load())
    except InputError as error:
        raise InputError(
            f"{folder}/{METADATA} {error}; it was not run: do not trust this file"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{folder} is damaged: unreadable {METADATA} ({error!r}); use another checkpoint"
        ) from error


def _tensors(metadata: Any) -> dict[str, Stored]:
    state = _state(metadata, "Metadata")
    places: dict[str, dict[tuple[int, ...], tuple[str, int, int]]] = {}
    for index, place in state["storage_data"].items():
        index, place = _state(index, "MetadataIndex"), _state(place, "_StorageInfo")
        name, offset = index["fqn"], index.get("offset")
        if offset is None:
            continue  # no tensor
        file, start, length = (place[key] for key in ("relative_path", "offset", "length"))
        _expect(
            isinstance(file, str) and re.fullmatch(r"[^/\\]+", file) and file != "..",
            f"file {file!r}",
        )
        _expect(not place.get("transform_descriptors"), f"{name} is transformed by a DCP extension")
        _expect(
            isinstance(start, int) and isinstance(length, int) and start >= 0 and length > 0,
            f"place of {name}",
        )
        places.setdefault(name, {})[_ints(offset)] = file, start, length
    tensors = {}
    for name, entry in state["state_dict_metadata"].items():
        if type(entry).__name__ == "BytesStorageMetadata":
            continue
        entry = _state(entry, "TensorStorageMetadata")
        shape, dtype = _ints(entry["size"]), entry["properties"].state[0]
        _expect(isinstance(name, str) and isinstance(dtype, torch.dtype), f"dtype of {name!r}")
        chunks = []
        for chunk in entry["chunks"]:
            box = Box(_ints(chunk.state["offsets"]), _ints(chunk.state["sizes"]))
            inside = all(
                s + n <= whole for s, n, whole in zip(box.start, box.shape, shape, strict=True)
            )
            _expect(inside, f"{name} has a chunk {box} outside of its shape {shape}")
            chunks.append(Chunk(box, *places[name][box.start]))
        tensors[name] = Stored(shape, dtype, tuple(chunks))
    return tensors


def _state(record: Any, kind: str) -> dict[str, Any]:
    _expect(isinstance(record, _Record) and type(record).__name__ == kind, f"no {kind}")
    return record.state


def _ints(values: Any) -> tuple[int, ...]:
    _expect(
        isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values),
        f"size {values!r}",
    )
    return values


def _expect(condition: Any, text: str) -> None:
    if not condition:
        raise ValueError(text)


class ChunkReader:
    """The tensors of a DCP checkpoint; any box of one by reading only its bytes. `tensors` has each
    by name; `bytes_read` counts so far, headers included, `.metadata` not.
    """

    def __init__(self, folder: Folder | str | Path) -> None:
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self.tensors = read_metadata(self.folder)
        self.bytes_read = 0
        self._offsets: dict[Chunk, int | None] = {}

    def read(self, name: str, box: Box) -> Tensor:
        """A box of a tensor on the CPU, in its stored dtype. An InputError: a part is lacking, a
        file absent or damaged.
        """
        stored = self.tensors[name]
        values = torch.empty(box.shape, dtype=stored.dtype)
        parts = {
            chunk.box: (chunk, common) for chunk in stored.chunks if (common := chunk.box & box)
        }
        covered = sum(math.prod(common.shape) for _, common in parts.values())
        if covered != values.numel():
            fault = f"it holds {covered} of the {values.numel()} elements of {name} at {box.start}"
            raise InputError(f"{self.folder} is damaged: {fault}; use another checkpoint")
        for chunk, common in parts.values():
            try:
                self._read(chunk, common, values[common.within(box.start)])
            except Exception as error:  # what damaged bytes or a file system make of it
                fault = f"{name} cannot be read from {chunk.file} ({told(error)})"
                raise InputError(
                    f"{self.folder} is damaged: {fault}; use another checkpoint"
                ) from error
        return values

    def _read(self, chunk: Chunk, part: Box, into: Tensor) -> None:
        """Fill `into`, a view, with the part of a chunk: by runs of bytes, or by torch, which reads
        the whole chunk.
        """
        if chunk not in self._offsets:
            self._offsets[chunk] = self._values_offset(chunk, into.dtype)
        if (start := self._offsets[chunk]) is not None:
            self._read_runs(chunk, start, part, into)
            return
        data = io.BytesIO(self._fill(chunk, 0, bytearray(chunk.length)))
        try:
            values = torch.load(data, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            # torch advises to trust it
            raise ValueError("it holds something else than values") from None
        _expect(
            isinstance(values, Tensor) and tuple(values.shape) == chunk.box.shape,
            "not a tensor of the stated shape",
        )
        _expect(values.dtype == into.dtype, f"dtype {values.dtype} instead of {into.dtype}")
        into.copy_(values.detach()[part.within(chunk.box.start)])

    def _values_offset(self, chunk: Chunk, dtype: torch.dtype) -> int | None:
        """Where in a chunk its values stand, in order; None where they do not, or where it does not
        pay to find out.
        """
        if chunk.length <= SMALL_BYTES:
            return None
        head = self._fill(chunk, 0, bytearray(HEAD_BYTES))
        tail = self._fill(chunk, chunk.length - TAIL_BYTES, bytearray(TAIL_BYTES))
        # torch would swap bytes that are not there
        if {"little": b"big", "big": b"little"}[sys.byteorder] in head + tail:
            return None
        try:
            # mostly a hole
            with mmap.mmap(
                -1, chunk.length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            ) as archive:
                archive[:HEAD_BYTES], archive[-TAIL_BYTES:] = head, tail
                values = torch.load(archive, map_location="meta", weights_only=True)
            plain = values.is_contiguous() and not (
                values.storage_offset() or values.is_conj() or values.is_neg()
            )
            plain = plain and (tuple(values.shape), values.dtype) == (chunk.box.shape, dtype)
            return values.untyped_storage()._checkpoint_offset if plain else None
        # something else than plain values: torch knows what, when it has all of it
        except Exception:
            return None

    def _read_runs(self, chunk: Chunk, start: int, part: Box, into: Tensor) -> None:
        """Fill `into` by runs of bytes: the part's rows of dim `dim` with all of the chunk's dims
        behind it.
        """
        whole, itemsize = chunk.box.shape, into.dtype.itemsize
        origin = [a - b for a, b in zip(part.start, chunk.box.start, strict=True)]
        # bytes from one row of a dim to the next
        steps = [math.prod(whole[d + 1 :]) * itemsize for d in range(len(whole))]
        dim = len(whole) - 1
        while dim and (whole[dim] - part.shape[dim]) * steps[dim] <= GAPS[self.folder.remote]:
            dim -= 1
        behind = tuple(
            slice(o, o + n) for o, n in zip(origin[dim + 1 :], part.shape[dim + 1 :], strict=True)
        )
        exact = part.shape[dim + 1 :] == whole[dim + 1 :]
        rows = max(1, SLAB_BYTES // steps[dim])
        for *outer, first in itertools.product(
            *map(range, part.shape[:dim]), range(0, part.shape[dim], rows)
        ):
            target = into[tuple(outer)][first : first + rows]
            at = start + sum(
                (o + i) * step for o, i, step in zip(origin, (*outer, first), steps, strict=False)
            )
            if exact and target.is_contiguous():
                self._fill(chunk, at, _bytes_of(target))
            else:
                aside = torch.empty((len(target), *whole[dim + 1 :]), dtype=into.dtype)
                self._fill(chunk, at, _bytes_of(aside))
                target.copy_(aside[(slice(None), *behind)])

    def _fill(
        self, chunk: Chunk, start: int, target: bytearray | memoryview
    ) -> bytearray | memoryview:
        end = start + len(target)
        _expect(
            0 <= start <= end <= chunk.length,
            f"bytes {start} to {end} of a chunk of {chunk.length}",
        )
        self.folder.read_into(chunk.file, chunk.offset + start, memoryview(target))
        self.bytes_read += len(target)
        return target


def write_manifest(folder: Folder, files: Mapping[str, tuple[int, int]]) -> None:
    """Write `checkpoint.json`, which makes a checkpoint complete, from (bytes, crc32) of every
    other file by name.
    """
    entries = {
        name: {"bytes": size, "crc32": f"{crc32:08x}"}
        for name, (size, crc32) in sorted(files.items())
    }
    folder.write_text(MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")


def read_manifest(folder: Folder) -> dict[str, tuple[int, int]]:
    """(bytes, crc32) of every file by name. Raises InputError where there is no manifest, or a
    damaged one.
    """
    if not folder.has(MANIFEST):
        raise InputError(
            f"{folder} has no {MANIFEST}: it is no checkpoint, or was never "
            f"completed; use another one"
        )
    try:
        entries = json.loads(folder.read(MANIFEST))["files"]
        return {
            str(name): (int(entry["bytes"]), int(entry["crc32"], 16))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}/{MANIFEST} is damaged ({error!r}); use another checkpoint"
        ) from error


def incomplete(folder: Folder) -> list[str]:
    """What a look at names and sizes finds wrong, a phrase each; empty for a complete
    checkpoint.
    """
    if MANIFEST not in folder.names():  # remote file systems keep this listing for the sizes
        return [f"it has no {MANIFEST}"]
    try:
        files = read_manifest(folder)
    except InputError:
        return [f"it has a damaged {MANIFEST}"]
    problems = [] if METADATA in files else [f"its {MANIFEST} names no {METADATA}"]
    for name, (size, _) in files.items():
        try:
            if (found := folder.size(name)) != size:
                problems.append(f"{name} has {found} bytes instead of {size}")
        except FileNotFoundError:
            problems.append(f"it has no {name}")
    return problems
