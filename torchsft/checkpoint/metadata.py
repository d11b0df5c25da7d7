"""`.metadata`, DCP's table of which box of which tensor lies where, read without trust.

It is a pickle. Reading it builds records without behaviour in place of DCP's classes and runs
nothing that the file names; what these records hold is checked and becomes DCP's own `Metadata`.
"""

import io
import pickle
import re
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # private, but part of the format
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchsft.checkpoint.manifest import METADATA
from torchsft.checkpoint.storage import Folder
from torchsft.config import InputError


class _Record:
    """What stands in for a class of DCP: keeps what the pickle says, and does nothing."""

    def __init__(self, *_: Any) -> None:
        """Take what the class that it stands for would be made of."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


# All that `dcp.save` of torch 2.11 to 2.13 puts into a `.metadata` besides dtypes, sizes and plain
# values.
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
_KNOWN: dict[tuple[str, str], type] = {
    (module, name): type(name, (_Record,), {}) for module, names in _NAMES.items() for name in names
}
_KNOWN["torch", "Size"] = tuple


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in _KNOWN:
            raise InputError(f"names {module}.{name}, which DCP's metadata has no use for")
        return _KNOWN[module, name]


def read_metadata(folder: Folder) -> Metadata:
    """Read which tensors a DCP checkpoint holds and where; what else DCP saved is left out.

    Returns:
        `state_dict_metadata`: TensorStorageMetadata by name, chunks inside of the tensor's shape.
        `storage_data`: `_StorageInfo` by MetadataIndex, one for each of these chunks.

    Raises:
        InputError: no `.metadata`, a damaged one, or one that names something that DCP's metadata
            does not need. Nothing that it names is run.
    """
    try:
        data = folder.read(METADATA)
    except OSError as error:
        raise InputError(
            f"{folder} is no DCP checkpoint: its {METADATA} cannot be read ({error}); "
            f"give another one"
        ) from error
    try:
        metadata = _checked(_Unpickler(io.BytesIO(data)).load())
    except InputError as error:
        raise InputError(
            f"{folder}/{METADATA} {error}; it was not run: do not trust this file"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{folder} is damaged: unreadable {METADATA} ({error!r}); use another checkpoint"
        ) from error
    for name, tensor in metadata.state_dict_metadata.items():  # what lacks, torch would leave as is
        held, needed = sum(chunk.sizes.numel() for chunk in tensor.chunks), tensor.size.numel()
        if held != needed:
            raise InputError(
                f"{folder} is damaged: it holds {held} of the {needed} elements of {name}; "
                f"use another checkpoint"
            )
    return metadata


def _checked(record: Any) -> Metadata:
    """Return DCP's metadata of what an unpickled record says of tensors."""
    state = _state(record, "Metadata")
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, value in state["storage_data"].items():
        index = _state(key, "MetadataIndex")
        if index.get("offset") is not None:  # else no tensor
            places[MetadataIndex(index["fqn"], _sizes(index["offset"]))] = _place(value, index)
    metadata = Metadata({}, storage_data={})
    for name, entry in state["state_dict_metadata"].items():
        if type(entry).__name__ == "BytesStorageMetadata":
            continue
        tensor = metadata.state_dict_metadata[name] = _tensor(name, entry)
        for chunk in tensor.chunks:
            index = MetadataIndex(name, chunk.offsets)
            metadata.storage_data[index] = places[index]
    return metadata


def _place(record: Any, index: dict[str, Any]) -> _StorageInfo:
    place = _state(record, "_StorageInfo")
    name, file = index["fqn"], place["relative_path"]
    is_file_name = isinstance(file, str) and re.fullmatch(r"[^/\\]+", file) and file != ".."
    _expect(is_file_name, f"file {file!r}")
    transformed = place.get("transform_descriptors")
    _expect(not transformed, f"{name} is transformed by a DCP extension")
    start, length = place["offset"], place["length"]
    whole_numbers = isinstance(start, int) and isinstance(length, int)
    _expect(whole_numbers and start >= 0 and length > 0, f"place of {name}")
    return _StorageInfo(file, start, length)


def _tensor(name: Any, record: Any) -> TensorStorageMetadata:
    entry = _state(record, "TensorStorageMetadata")
    size, dtype = _sizes(entry["size"]), entry["properties"].state[0]
    _expect(isinstance(name, str) and isinstance(dtype, torch.dtype), f"dtype of {name!r}")
    chunks = []
    for chunk in entry["chunks"]:
        offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
        ends = [start + n for start, n in zip(offsets, sizes, strict=True)]
        inside = all(end <= whole for end, whole in zip(ends, size, strict=True))
        _expect(inside, f"{name} has a chunk at {offsets} outside of its shape {size}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _state(record: Any, kind: str) -> dict[str, Any]:
    _expect(isinstance(record, _Record) and type(record).__name__ == kind, f"no {kind}")
    return record.state


def _sizes(values: Any) -> torch.Size:
    whole_numbers = isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)
    _expect(whole_numbers, f"size {values!r}")
    return torch.Size(values)


def _expect(condition: Any, text: str) -> None:
    if not condition:
        raise ValueError(text)
