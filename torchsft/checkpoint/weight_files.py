"""Safetensors files: what a Hugging Face directory holds, slices of it, and writing a file tensor
by tensor. The format: header length (8 bytes, little-endian), JSON header with the byte range of
each tensor, data without gaps."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchsft.checkpoint.stacked import stacked_in, unstacked
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.stored import DTYPE_NAMES, DTYPES, FP8, StoredTensor, listing
from torchsft.config import InputError
from torchsft.precision.formats import (
    Contents,
    Format,
    Fp8Blocks,
    Int4Groups,
    Mxfp4,
    described_format,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Exported(Protocol):
    """A tensor to be written."""

    key: str
    contents: Contents  # it, or its parts


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


def stored_format(directory: str | Path, kind: type[Format]) -> Format:
    """Return the format of a directory's weights of few bits, by its config.json.

    Raises:
        InputError: it describes another one, or none.
    """
    config = read_json_object(Path(directory) / "config.json")
    form = described_format(config)
    if not isinstance(form, kind):
        raise InputError(
            f"{directory} holds {kind.name} weights, but its config.json has quantization_config = "
            f"{json.dumps(config.get('quantization_config'))}, where "
            f"{json.dumps(kind().description)} or the like is needed; download it again"
        )
    return form


class Weights:
    """What a `WeightIndex` and `ConvertedWeights` share: weights by Hugging Face key, known without
    their values; of slices, only their bytes are read.

    Attributes:
        tensors: key -> `StoredTensor`; the parts of weights of few bits are there too.
        packed: the weights that have scales: key -> format (precision/formats.py).
        bytes_read: so far, headers not counted.
    """

    directory: Path
    tensors: dict[str, StoredTensor]
    packed: dict[str, Format]

    @cached_property
    def parts(self) -> set[str]:
        """Keys of the tensors that are parts of weights of few bits, and no weights themselves."""
        return {
            key + suffix for key, form in self.packed.items() for suffix in form.suffixes if suffix
        }

    def stores(self, form: Format) -> bool:
        """Whether some weights are in a format."""
        return any(type(other) is type(form) for other in self.packed.values())

    def read_whole(self, key: str) -> Tensor:
        """Return a whole tensor, on the CPU, in its stored dtype; see `read`."""
        return self.read(key, ())

    def values(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """Return one slice of a tensor's values on the CPU: fp32 of one that is stored in few bits,
        else as stored; see `read`.
        """
        stored, form = self.tensors[key], self.packed.get(key)
        if form is None or stored.dtype != form.word:
            return self.read(key, index)
        return form.values(self.read, key, bounds(index, stored.shape))

    def scales(self, key: str) -> Tensor | None:
        """Return all scales of a weight of few bits; None for other tensors."""
        return self.read_whole(key + self.packed[key].scales) if key in self.packed else None


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
            them, a key twice, weights of few bits without all of their parts or config.json's
            description, scales without weight or of another shape or dtype, experts of no known
            form.
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
        fp8 = [key for key, stored in self.tensors.items() if stored.dtype == FP8]
        self._check_fp8_parts(fp8)
        self.packed = dict.fromkeys(fp8, stored_format(hf_dir, Fp8Blocks)) if fp8 else {}
        self._put_together("weight_packed", Int4Groups)
        self._put_together("_blocks", Mxfp4)
        self._check_parts()

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

    def _check_fp8_parts(self, fp8: Sequence[str]) -> None:
        """Refuse fp8 weights without scales, and scales without weights."""
        suffix = Fp8Blocks.scales
        scales = {key for key in self.tensors if key.endswith(suffix)}
        needed = {key + suffix: key for key in fp8}
        if lonely := sorted(scales - needed.keys()):
            self._refuse(f"scales without their fp8 weights ({listing(lonely)}); download it again")
        if bare := sorted(key for scale, key in needed.items() if scale not in scales):
            self._refuse(f"fp8 weights without their scales ({listing(bare)}); download it again")

    def _put_together(self, ending: str, kind: type[Int4Groups | Mxfp4]) -> None:
        """Enter the weights of a format whose values end so as tensors of their own."""
        data = kind.suffixes[-2]
        word = "U8" if kind is Mxfp4 else "I32"
        found = [
            key.removesuffix(data)
            for key, stored in self.tensors.items()
            if key.endswith(ending) and stored.dtype == word
        ]
        if not found:
            return
        form = stored_format(self.directory, kind)
        parts = {key + suffix: key for key in found for suffix in form.suffixes}
        if absent := sorted(parts.keys() - self.tensors.keys()):
            self._refuse(
                f"{form.name} weights lack parts of them ({listing(absent)}); download it again"
            )
        if isinstance(form, Int4Groups):
            form = Int4Groups(DTYPES[self.tensors[found[0] + form.suffixes[0]].dtype])
        for key in found:
            shape = form.shape_of(self.tensors[key + data].shape)
            self.tensors[key] = StoredTensor(self.tensors[key + data].file, shape, form.word)
            self.packed[key] = form

    def _check_parts(self) -> None:
        """Refuse parts of other shapes or dtypes than their weights need."""
        odd, rules = [], set()
        for key, form in self.packed.items():
            shape = self.tensors[key].shape
            flat = isinstance(form, Fp8Blocks) and len(shape) != 2
            needed = {} if flat else form.parts(key, shape)
            for name in (key + suffix for suffix in form.suffixes if suffix):
                part = self.tensors[name]
                dtype, wanted = needed.get(name, (None, None))
                if flat or (part.dtype, part.shape) != (DTYPE_NAMES[dtype], wanted):
                    odd.append(f"{name} ({part.dtype} {part.shape} for a weight {shape})")
                    rules.add(form.rule)
        if odd:
            self._refuse(
                f"{' and '.join(sorted(rules))}, but {listing(odd)} are not; weights and "
                "config.json are of different checkpoints, download both again"
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
        raise InputError(
            f"{path} cannot be read as safetensors ({error}; it has {size} bytes); it is "
            "incomplete or damaged, download it again"
        ) from error
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


def in_file_order(tensors: Iterable[Exported]) -> list[Exported]:
    """Return tensors in an order in which all parts of each are aligned to their elements.

    Raises:
        InputError: there is none.
    """
    tensors, odd = list(tensors), []
    for tensor in tensors:
        width, end = _alignment(tensor.contents), 0
        for dtype, shape in tensor.contents.values():
            if end % dtype.itemsize:
                odd.append(tensor.key)
            end += tensor_bytes(dtype, shape)
        if end % width:
            odd.append(tensor.key)
    if odd := sorted(set(odd)):
        raise InputError(
            f"{listing(odd)} cannot be written with scales: the elements of each must be a "
            "multiple of 4 (INT4: of 128); choose bf16"
        )
    return sorted(tensors, key=lambda tensor: -_alignment(tensor.contents))


def _alignment(contents: Contents) -> int:
    return max(dtype.itemsize for dtype, _ in contents.values())


class SafetensorsWriter:
    """Writes one safetensors file of known content from start to end, without holding any tensor. A
    context manager: leaving it completes the file. `contents` is in the order in which it will be
    written (see `in_file_order`).
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
