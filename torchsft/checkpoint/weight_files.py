"""Safetensors files: what a Hugging Face directory holds, slices of it, and writing a file tensor
by tensor. The format: header length (8 bytes, little-endian), JSON header with the byte range of
each tensor, data without gaps."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchsft.checkpoint.stacked import stacked_in, unstacked
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.stored import DTYPE_NAMES, DTYPES, FP8, StoredTensor, listing
from torchsft.config import InputError
from torchsft.precision.blockwise import (
    SCALE_SUFFIX,
    dequantise,
    described_block,
    scale_key,
    scale_shape,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Contents = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of a file: key -> dtype, shape


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def size_of(contents: Contents) -> int:
    """Return bytes of a file's tensors."""
    return sum(tensor_bytes(*entry) for entry in contents.values())


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an InputError where there is none."""
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates
        )
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a JSON {type(content).__name__}, not an object; download it again"
        )
    return content


def has_weights(directory: str | Path) -> bool:
    """Whether there are safetensors files."""
    return any(Path(directory).glob("*.safetensors"))


def fp8_block(directory: str | Path) -> tuple[int, int]:
    """Return rows and columns of a block of a directory's fp8 weights; an InputError where
    config.json does not describe such.
    """
    config = read_json_object(Path(directory) / "config.json")
    if (block := described_block(config)) is None:
        found = f"quantization_config = {json.dumps(config.get('quantization_config'))}"
        needed = (
            '{"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]} or the like '
            "is needed"
        )
        raise InputError(
            f"{directory} holds fp8 weights, but its config.json has {found}, where "
            f"{needed}; download it again"
        )
    return block


class Weights:
    """What a `WeightIndex` and `ConvertedWeights` share: weights by Hugging Face key, known without
    their values; of slices,
    only their bytes are read. `tensors`: key -> `StoredTensor`; `fp8`: keys of the weights that
    have scales (precision/blockwise.py); `bytes_read`: so far, headers not counted.
    """

    def read_whole(self, key: str) -> Tensor:
        """Return a whole tensor, on the CPU, in its stored dtype; see `read`."""
        return self.read(key, ())

    def values(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """Return one slice of a tensor's values on the CPU: fp32 of one that is stored in fp8, else
        as stored; see `read`.
        """
        stored, raw = self.tensors[key], self.read(key, index)
        if stored.dtype != FP8:
            return raw
        ranges = bounds(index, stored.shape)
        blocks = tuple(
            slice(start // n, -(-end // n))
            for (start, end), n in zip(ranges, self._block, strict=True)
        )
        return dequantise(
            raw, self.read(scale_key(key), blocks), self._block, tuple(start for start, _ in ranges)
        )

    @cached_property
    def _block(self) -> tuple[int, int]:
        return fp8_block(self.directory)


def bounds(index: tuple[slice, ...], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return where a slice begins and ends in each dim; dims that it does not name are whole."""
    return [
        part.indices(size)[:2]
        for part, size in itertools.zip_longest(index, shape, fillvalue=slice(None))
    ]


class WeightIndex(Weights):
    """The weights of a Hugging Face directory, known from the files' headers; `tensors` has the
    scales too.

    Experts that are stored stacked are seen one by one; `stacked` has the keys of what holds them.

    Raises:
        InputError: no safetensors weights, files absent or damaged, an index that does not fit
            them, a key twice, fp8 weights without scales or config.json's description, scales
            without weight or of another shape or dtype, experts of no known form.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.directory, self.tensors, self.bytes_read = Path(hf_dir), {}, 0
        weight_map = self._weight_map()
        files = sorted(set(weight_map.values())) or [SINGLE]
        if absent := [name for name in files if not (self.directory / name).is_file()]:
            self._refuse(
                f"{INDEX} names {len(absent)} absent files ({listing(absent)}); download them again"
            )
        for name in files:
            for key, stored in _read_header(self.directory / name).items():
                if key in self.tensors:
                    self._refuse(
                        f"{key} is both in {self.tensors[key].file} and in {name}; remove "
                        f"one of the files"
                    )
                self.tensors[key] = stored
        if strayed := [
            key
            for key, name in weight_map.items()
            if key not in self.tensors or self.tensors[key].file != name
        ]:
            self._refuse(
                f"{INDEX} places {listing(strayed)} in files that do not hold them; "
                f"download index and files again"
            )
        self.stacked = stacked_in(self.tensors)
        try:
            self.tensors = unstacked(self.tensors)
        except ValueError as error:
            self._refuse(str(error))
        self.fp8 = frozenset(key for key, stored in self.tensors.items() if stored.dtype == FP8)
        self._check_scales()

    def _refuse(self, fault: str) -> NoReturn:
        raise InputError(f"{self.directory}: {fault}")

    def _weight_map(self) -> dict[str, str]:
        """key -> file from the index; empty for a single file."""
        if (self.directory / SINGLE).is_file():
            return {}
        path = self.directory / INDEX
        if path.is_file():
            weight_map = read_json_object(path).get("weight_map")
            if (
                not isinstance(weight_map, dict)
                or not weight_map
                or not all(isinstance(n, str) for n in weight_map.values())
            ):
                self._refuse(f"{INDEX} has no weight_map of keys to file names; download it again")
            if outside := sorted({name for name in weight_map.values() if Path(name).name != name}):
                self._refuse(
                    f"{INDEX} names files outside its directory "
                    f"({listing(outside, most=2)}); download it again"
                )
            return weight_map
        if not self.directory.is_dir():
            raise InputError(
                f"model directory {self.directory} does not exist; give a Hugging Face directory"
            )
        others = [
            p.name
            for p in self.directory.iterdir()
            if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        ]
        found = f"it has only {listing(sorted(others), most=3)}" if others else "it has no weights"
        self._refuse(
            f"there is neither {SINGLE} nor {INDEX} ({found}); give a directory with "
            f"safetensors weights"
        )

    def _check_scales(self) -> None:
        scales = {key for key in self.tensors if key.endswith(SCALE_SUFFIX)}
        needed = {scale_key(key): key for key in self.fp8}
        if lonely := sorted(scales - needed.keys()):
            self._refuse(f"scales without their fp8 weights ({listing(lonely)}); download it again")
        if bare := sorted(key for scale, key in needed.items() if scale not in scales):
            self._refuse(f"fp8 weights without their scales ({listing(bare)}); download it again")
        odd = []
        for name, key in needed.items():
            shape, scale = self.tensors[key].shape, self.tensors[name]
            if (
                len(shape) != 2
                or scale.shape != scale_shape(shape, self._block)
                or scale.dtype != "F32"
            ):
                odd.append(f"{name} ({scale.dtype} {scale.shape} for a weight {shape})")
        if odd:
            fault = (
                f"scales must be F32, one for each block of {self._block[0]} x {self._block[1]}, "
                f"but {listing(odd)} are not"
            )
            self._refuse(
                f"{fault}; weights and config.json are of different checkpoints, download "
                f"both again"
            )

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """Return one slice (steps of 1; dims that are not named are whole) of a tensor, on the CPU,
        in its stored dtype, contiguous. Its memory may be the file's, mapped.

        Raises:
            InputError: torch lacks that dtype, or the file has changed since it was opened.
        """
        stored = self.tensors[key]
        if stored.dtype not in DTYPES:
            self._refuse(f"{key} has dtype {stored.dtype}, which cannot be read; remove it")
        ranges = bounds(index, stored.shape)
        shape = [end - start for start, end in ranges]
        if not math.prod(shape):
            return torch.empty(shape, dtype=DTYPES[stored.dtype])
        part = [slice(*ends) for ends in ranges]
        if stored.stack:
            expert, row, _ = stored.start
            rows, columns = part
            part = [slice(expert, expert + 1), slice(rows.start + row, rows.stop + row), columns]
        try:
            # Opened for each slice: what stays open keeps every page that was read in memory.
            with safe_open(self.directory / stored.file, "pt") as file:
                name = stored.stack or key
                values = file.get_slice(name)[tuple(part)] if part else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            self._refuse(
                f"{stored.file} has become shorter or changed since it was opened ({error}); "
                f"download it again"
            )
        self.bytes_read += values.nbytes
        # A column of one element keeps the file's stride, although it counts as contiguous.
        return values.contiguous().as_strided((values.numel(),), (1,)).view(shape)

    def scales(self, key: str) -> Tensor | None:
        """Return all scales of an fp8 weight, fp32; None for other tensors."""
        return self.read_whole(scale_key(key)) if key in self.fp8 else None


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, in the order of their bytes."""
    size = 0
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # safetensors would take the last of two entries of one name
            entries = json.loads(
                file.read(min(length, size)), object_pairs_hook=_without_duplicates
            )
        with safe_open(path, "pt") as file:  # refuses what does not fit the file's bytes
            keys = file.offset_keys()
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        fault = f"{path} cannot be read as safetensors ({error}; it has {size} bytes)"
        raise InputError(f"{fault}; it is incomplete or damaged, download it again") from error
    return {
        key: StoredTensor(path.name, tuple(entries[key]["shape"]), entries[key]["dtype"])
        for key in keys
    }


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, whose names must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"it has {listing([name for name in found if names.count(name) > 1], most=2)} twice"
        )
    return found


def file_order(contents: Contents) -> list[str]:
    """Return keys in an order in which every tensor is aligned to its elements and scales follow
    their fp8 weight; an InputError where the scales would not be aligned.
    """
    scales = {name: key for key in contents if (name := scale_key(key)) in contents}
    if odd := sorted(key for key in scales.values() if tensor_bytes(*contents[key]) % 4):
        raise InputError(
            f"{listing(odd)} cannot be written in fp8: the elements of each must be a "
            f"multiple of 4; choose bf16"
        )
    width = {key: dtype.itemsize for key, (dtype, _) in contents.items()} | dict.fromkeys(
        scales.values(), 4
    )
    ordered = sorted((key for key in contents if key not in scales), key=lambda key: -width[key])
    return [name for key in ordered for name in (key, scale_key(key)) if name in contents]


class SafetensorsWriter:
    """Writes one safetensors file of known content from start to end, without holding any tensor. A
    context manager: leaving it completes the file. `contents` is in the order in which it will be
    written (see `file_order`).
    """

    def __init__(self, folder: Folder, name: str, contents: Contents) -> None:
        self._file, self._contents = folder.writer(name, checksum=False), contents
        self._left = {key: tensor_bytes(*entry) for key, entry in contents.items()}

    def write(self, key: str, values: Tensor) -> None:
        """Append a tensor or the next part of it: any shape of as many elements, any device, the
        dtype in `contents`.
        """
        expected = next(iter(self._left)), self._contents[key][0]
        assert (key, values.dtype) == expected and values.nbytes <= self._left[key], (key, expected)
        self._output.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._left[key] -= values.nbytes
        if not self._left[key]:
            del self._left[key]

    def __enter__(self) -> "SafetensorsWriter":
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for key, (dtype, shape) in self._contents.items():
            start, end = end, end + tensor_bytes(dtype, shape)
            header[key] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._output = self._file.__enter__()
        self._output.write(len(text).to_bytes(8, "little") + text)
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)
        assert error[0] is not None or not self._left, f"never written: {listing(list(self._left))}"
