"""Safetensors files: what a Hugging Face directory holds, slices of it, and writing a file tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchsft.config import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The header's words.
WEIGHT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPES = WEIGHT_DTYPES | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def listing(names: Sequence[str], most: int = 20) -> str:
    """Names, cut with their count where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: unreadable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object; download it again")
    return content


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor. `dtype` is the header's word, such as "BF16"."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class WeightIndex:
    """The tensors of a Hugging Face directory by key, known from the headers alone; slices are read on demand
    (memory-mapped).

    Attributes:
        tensors: key -> `StoredTensor`.

    Raises:
        InputError: no safetensors weights, files that the index names are absent or unreadable (truncated), keys that
            the index places in a file that lacks them, a key in two files, fp8 weights.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.directory = Path(hf_dir)
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, safe_open] = {}
        weight_map = self._weight_map()
        files = sorted(set(weight_map.values())) or [SINGLE]
        absent = [name for name in files if not (self.directory / name).is_file()]
        if absent:
            raise InputError(
                f"{self.directory}: {INDEX} names {len(absent)} absent files ({listing(absent)}); download them again"
            )
        for name in files:
            self._open(name)
        strayed = [key for key, name in weight_map.items() if key not in self.tensors or self.tensors[key].file != name]
        if strayed:
            raise InputError(
                f"{self.directory}: {INDEX} places {listing(strayed)} in files that do not hold them; "
                "index and files are of different checkpoints, download both again"
            )
        fp8 = [key for key, t in self.tensors.items() if t.dtype.startswith("F8") or key.endswith("weight_scale_inv")]
        if fp8:
            raise InputError(
                f"{self.directory} holds fp8 weights ({listing(fp8, most=2)}), which this version does not read; "
                "convert the directory to bf16 first"
            )

    def _weight_map(self) -> dict[str, str]:
        """key -> file from the index; empty for a single file."""
        if (self.directory / SINGLE).is_file():
            return {}
        path = self.directory / INDEX
        if path.is_file():
            weight_map = read_json_object(path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{path} has no weight_map; download it again")
            return weight_map
        if not self.directory.is_dir():
            raise InputError(f"model directory {self.directory} does not exist; give a Hugging Face directory")
        formats = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        others = sorted(p.name for p in self.directory.iterdir() if p.suffix in formats)
        found = f"it has only {listing(others, most=3)}" if others else "it has no weights"
        raise InputError(
            f"{self.directory} has neither {SINGLE} nor {INDEX} ({found}); give a directory with safetensors weights"
        )

    def _open(self, name: str) -> None:
        """Read one file's header."""
        try:
            file = safe_open(self.directory / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.directory / name} cannot be read as safetensors ({error}); "
                "it is incomplete or damaged, download it again"
            ) from error
        self._files[name] = file
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            if key in self.tensors:
                first = self.tensors[key].file
                raise InputError(f"{self.directory}: {key} is both in {first} and in {name}; remove one of the files")
            header = file.get_slice(key)
            self.tensors[key] = StoredTensor(name, tuple(header.get_shape()), header.get_dtype())

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """One slice of a tensor, on the CPU, in its stored dtype. Only its bytes are read."""
        return self._files[self.tensors[key].file].get_slice(key)[index]

    def read_whole(self, key: str) -> Tensor:
        """A whole tensor, on the CPU, in its stored dtype."""
        return self._files[self.tensors[key].file].get_tensor(key)


class SafetensorsWriter:
    """Writes one safetensors file of known content, tensor by tensor in any order, without holding any of them.

    The format: header length (8 bytes, little-endian), JSON header with byte ranges, data. A context manager: leaving
    it flushes the file to the disk.

    Args:
        path: the file, which is created.
        contents: key -> (dtype, shape) of every tensor that will be written.
    """

    def __init__(self, path: Path, contents: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        self._contents = dict(contents)
        end = 0
        for key in sorted(contents, key=lambda key: -contents[key][0].itemsize):  # wide elements first: all are aligned
            dtype, shape = contents[key]
            start, end = end, end + tensor_bytes(dtype, shape)
            header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._starts[key] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")  # noqa: SIM115 (closed on leaving)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data_start = self._file.tell()

    def write(self, key: str, values: Tensor) -> None:
        """Write a tensor's values at its place: any shape of as many elements, any device, the dtype in `contents`."""
        dtype, shape = self._contents.pop(key)
        assert values.dtype == dtype and values.numel() == math.prod(shape), key
        self._file.seek(self._data_start + self._starts[key])
        self._file.write(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                assert not self._contents, f"never written: {listing(list(self._contents))}"
                self._file.flush()
                os.fsync(self._file.fileno())
