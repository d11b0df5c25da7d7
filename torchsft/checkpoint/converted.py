"""Weights that lie in a DCP directory, seen as the tensors of a Hugging Face directory.

A *converted directory* is what `tools/convert_checkpoint.py to-dcp` writes: the files of a Hugging Face directory besides its
weights, and these as DCP files. `model.FQN` are the model's parameters and buffers, in the source's dtype (fp8: fp32), and
`carried.KEY` is what the model has no place for: MTP layers, unknown tensors and the scales of fp8 weights. A training
checkpoint has the same `model.FQN`, in fp32, and nothing carried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from torchsft.checkpoint.boxes import Box, piece_box
from torchsft.checkpoint.dcp_files import METADATA, ChunkReader, incomplete
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import DTYPE_NAMES, FP8, StoredTensor, fp8_block, listing
from torchsft.config import InputError
from torchsft.models.decoder import Piece
from torchsft.precision.blockwise import dequantise, scale_key

TRAINER = "trainer.json"
MODEL, CARRIED = "model.", "carried."


def is_dcp(directory: str | Path) -> bool:
    """Whether a directory holds DCP files: converted weights or a training checkpoint."""
    return (Path(directory) / METADATA).is_file()


def is_training(directory: str | Path) -> bool:
    """Whether a directory is a training checkpoint."""
    return is_dcp(directory) and (Path(directory) / TRAINER).is_file()


def slices(shape: Sequence[int], elements: int, multiple: int = 1) -> Iterator[tuple[slice, ...]]:
    """Indices of consecutive parts of a tensor, cut along its first dim.

    Args:
        shape: of the tensor.
        elements: most elements of a part, where a row has not more.
        multiple: the number of rows of each part but the last is a multiple of this.
    """
    if not shape:
        yield ()
        return
    width = max(1, torch.Size(shape[1:]).numel())
    rows = max(1, elements // width // multiple) * multiple
    for start in range(0, max(shape[0], 1), rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))


class ConvertedWeights:
    """The weights of a converted directory or a training checkpoint by Hugging Face key, known from `.metadata` alone; slices
    are read on demand.

    Args:
        directory: as `is_dcp` knows it.
        pieces: `checkpoint_pieces()` of the model.

    Attributes:
        tensors: key -> `StoredTensor`, as in a `WeightIndex`; its `file` is the tensor's name in the DCP directory. The scales
            of the model's own weights are not among them, since these have been dequantised; `scales` has them.
        fp8: keys of the weights that have scales: that were fp8 in the source, or are.

    Raises:
        InputError: incomplete or damaged, or weights of another model.
    """

    def __init__(self, directory: str | Path, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self.directory = Path(directory)
        if faults := incomplete(Folder(self.directory)):
            raise InputError(f"{self.directory} is not a complete checkpoint: {listing(faults, most=3)}; write it again")
        self._reader = ChunkReader(Folder(self.directory))
        self.tensors: dict[str, StoredTensor] = {}
        self._starts: dict[str, tuple[int, ...]] = {}
        stored = self._reader.tensors
        self._check_model(pieces)
        for name, tensor in stored.items():
            dtype = DTYPE_NAMES[tensor.dtype]
            if name.startswith(CARRIED):
                key = name.removeprefix(CARRIED)
                self.tensors[key] = StoredTensor(name, tensor.shape, dtype)
                self._starts[key] = (0,) * len(tensor.shape)
            elif name.startswith(MODEL):
                for piece in pieces[name.removeprefix(MODEL)]:
                    self.tensors[piece.key] = StoredTensor(name, piece.hf_shape, dtype)
                    self._starts[piece.key] = piece.start
        self._scales = {
            key: scale
            for key, tensor in self.tensors.items()
            if tensor.file.startswith(MODEL) and (scale := self.tensors.get(scale_key(key))) is not None
        }
        for key in self._scales:
            del self.tensors[scale_key(key)]
        self.fp8 = frozenset(self._scales) | {key for key, tensor in self.tensors.items() if tensor.dtype == FP8}

    def _check_model(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """Compare names and shapes of the model's tensors with those that the pieces make up."""
        expected = {}
        for name, parts in pieces.items():
            ends = [[a + n for a, n in zip(b.start, b.shape, strict=True)] for b in map(piece_box, parts)]
            expected[MODEL + name] = tuple(map(max, zip(*ends, strict=True)))
        found = {name: s.shape for name, s in self._reader.tensors.items() if name.startswith(MODEL)}
        odd = [
            f"{name} is {found.get(name, 'absent')} instead of {expected.get(name, 'absent')}"
            for name in sorted(expected.keys() | found.keys())
            if found.get(name) != expected.get(name)
        ]
        if odd:
            raise InputError(
                f"{self.directory} holds another model than its config.json (or the one of --base) describes: "
                f"{listing(odd, most=3)}; use the two that belong together"
            )

    @property
    def bytes_read(self) -> int:
        """Bytes read from the DCP files so far."""
        return self._reader.bytes_read

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """One slice of a tensor, on the CPU, in its stored dtype. Only its bytes are read."""
        tensor, origin = self.tensors[key], self._starts[key]
        bounds = [part.indices(size) for part, size in itertools.zip_longest(index, tensor.shape, fillvalue=slice(None))]
        shape = tuple(max(0, stop - start) for start, stop, _ in bounds)
        leading = len(origin) - len(shape)
        starts = tuple(o + start for o, (start, _, _) in zip(origin[leading:], bounds, strict=True))
        return self._reader.read(tensor.file, Box(origin[:leading] + starts, (1,) * leading + shape)).reshape(shape)

    def read_whole(self, key: str) -> Tensor:
        """A whole tensor, on the CPU, in its stored dtype."""
        return self.read(key, ())

    def values(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """One slice of a tensor's values on the CPU: fp32 of a weight that is carried in fp8, else as stored; see `read`."""
        values, shape = self.read(key, index), self.tensors[key].shape
        if self.tensors[key].dtype != FP8:
            return values
        bounds = [part.indices(n)[:2] for part, n in itertools.zip_longest(index, shape, fillvalue=slice(None))]
        blocks = tuple(slice(a // n, -(-b // n)) for (a, b), n in zip(bounds, self._block, strict=True))
        return dequantise(values, self.read(scale_key(key), blocks), self._block, tuple(start for start, _ in bounds))

    @cached_property
    def _block(self) -> tuple[int, int]:
        return fp8_block(self.directory)

    def scales(self, key: str) -> Tensor | None:
        """The fp32 scales with which the source stored a weight; None for one that was not fp8."""
        if key not in self.fp8:
            return None
        if key in self._scales:
            return self._reader.read(self._scales[key].file, _whole(self._scales[key].shape))
        return self.read_whole(scale_key(key))


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)
