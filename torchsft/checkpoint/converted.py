"""Weights that lie in a DCP directory, seen as the tensors of a Hugging Face directory.

A *converted directory* is what `tools/convert_checkpoint.py to-dcp` writes: the files of a Hugging
Face directory besides its weights, and these as DCP files. `model.FQN` are the model's parameters
and buffers, in the source's dtype (formats of few bits: fp32), and `carried.KEY` is what the model
has no place for: MTP layers, unknown tensors and the scales of weights of few bits. A training
checkpoint has the same `model.FQN`, in fp32, and nothing carried.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from torchsft.checkpoint.boxes import Box, piece_box, whole_box
from torchsft.checkpoint.manifest import METADATA, incomplete
from torchsft.checkpoint.reader import RangeReader
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import (
    DTYPE_NAMES,
    DTYPES,
    StoredTensor,
    Weights,
    bounds,
    listing,
    read_json_object,
)
from torchsft.config import InputError
from torchsft.models.decoder import Piece
from torchsft.precision.formats import Format, Int4Groups, described_format

MODEL, CARRIED = "model.", "carried."


def is_dcp(directory: str | Path) -> bool:
    """Whether a directory holds DCP files: converted weights or a training checkpoint."""
    return (Path(directory) / METADATA).is_file()


class ConvertedWeights(Weights):
    """The weights of a converted directory or a training checkpoint, known from `.metadata` alone.

    Attributes:
        tensors: by Hugging Face key; a tensor's `file` is its name in the DCP directory. The scales
            of the model's own weights are not among them, since these have been dequantised;
            `scales` has them.
        packed: the weights that were of few bits in the source: key -> format.

    Args:
        directory: local.
        pieces: `checkpoint_pieces()` of the model.

    Raises:
        InputError: incomplete or damaged, or weights of another model.
    """

    def __init__(self, directory: str | Path, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self.directory = Path(directory)
        if faults := incomplete(Folder(self.directory)):
            raise InputError(
                f"{self.directory} is not a complete checkpoint: "
                f"{listing(faults, most=3)}; write it again"
            )
        self._reader = RangeReader(Folder(self.directory))
        self._shapes = {name: tuple(t.size) for name, t in self._reader.tensors.items()}
        self._check_model(pieces)
        self.tensors: dict[str, StoredTensor] = {}
        # where a tensor begins in its DCP tensor
        self._starts: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._reader.tensors.items():
            dtype = DTYPE_NAMES[tensor.properties.dtype]
            for piece in self._pieces_of(name, pieces):
                self.tensors[piece.key] = StoredTensor(name, piece.hf_shape, dtype)
                self._starts[piece.key] = piece.start
        self.packed: dict[str, Format] = {}
        # of the model's own weights: key of a weight -> its scales
        self._own_scales: dict[str, StoredTensor] = {}
        form = self._source_format()
        if form is not None:
            self._find_packed(form)

    def _find_packed(self, form: Format) -> None:
        """Note the weights that were of few bits; the parts of the model's own leave `tensors`."""
        # All parts but the values, which are the tensor itself here.
        beside = set(form.suffixes) - {form.suffixes[-2]}
        stored = self.tensors.keys()
        packed = [key for key in stored if {key + suffix for suffix in beside} <= stored]
        for key in packed:
            self.packed[key] = form
            if self.tensors[key].file.startswith(MODEL):
                self._own_scales[key] = self.tensors[key + form.scales]
                for suffix in filter(None, form.suffixes):
                    self.tensors.pop(key + suffix, None)

    def _source_format(self) -> Format | None:
        """Return the format of few bits in which the source was, by its config.json; None: in
        none.
        """
        path = self.directory / "config.json"
        if not path.is_file():
            return None
        form = described_format(read_json_object(path))
        if not isinstance(form, Int4Groups):
            return form
        # Its parts that say shapes keep the source's dtype.
        dtypes = (each.dtype for key, each in self.tensors.items() if key.endswith("weight_shape"))
        dtype = next(dtypes, None)
        return form if dtype is None else Int4Groups(DTYPES[dtype])

    def _pieces_of(self, name: str, pieces: Mapping[str, Sequence[Piece]]) -> Sequence[Piece]:
        """Return the Hugging Face tensors that a DCP tensor holds."""
        if name.startswith(MODEL):
            return pieces[name.removeprefix(MODEL)]
        if name.startswith(CARRIED):
            key, shape = name.removeprefix(CARRIED), self._shapes[name]
            return [Piece(key, shape, (0,) * len(shape))]
        return []  # of a training checkpoint: the optimizer's state and random states

    def _check_model(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """Compare names and shapes of the model's tensors with those that the pieces make up."""
        joint = ".eh_proj.weight"
        mtp = tuple(name.removesuffix(joint) for name in pieces if name.endswith(joint))
        expected = {}
        for name, parts in pieces.items():
            # trained MTP layers may be carried, one tensor by one
            carried = all(CARRIED + piece.key in self._shapes for piece in parts)
            if not (carried and name.startswith(mtp)):
                expected[MODEL + name] = _whole_shape(parts)
        found = {name: shape for name, shape in self._shapes.items() if name.startswith(MODEL)}
        odd = []
        for name in sorted(expected.keys() | found.keys()):
            has = found.get(name, "absent")
            needs = expected.get(name, "absent")
            if has != needs:
                odd.append(f"{name} is {has} instead of {needs}")
        if odd:
            raise InputError(
                f"{self.directory} holds another model than its config.json (or the one of --base) "
                f"describes: {listing(odd, most=3)}; use the two that belong together"
            )

    @property
    def bytes_read(self) -> int:
        """Bytes read from the DCP files so far."""
        return self._reader.bytes_read

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        """Return one slice of a tensor, of which only the bytes are read.

        Args:
            key: of the tensor.
            index: steps of 1; dims that are not named are whole.

        Returns:
            On the CPU, in the stored dtype.
        """
        tensor = self.tensors[key]
        ranges = bounds(index, tensor.shape)
        shape = tuple(max(0, end - begin) for begin, end in ranges)
        # Where the slice begins in the parameter, which may have dims in front (that of experts).
        start = list(self._starts[key])
        leading = len(start) - len(shape)
        for dim, (first, _) in enumerate(ranges, start=leading):
            start[dim] += first
        box = Box(tuple(start), (1,) * leading + shape)
        return self._reader.read(tensor.file, box).reshape(shape)

    def scales(self, key: str) -> Tensor | None:
        """Return the scales with which the source stored a weight; None for one that had none."""
        own = self._own_scales.get(key)
        if own is None:
            return super().scales(key)
        return self._reader.read(own.file, whole_box(own.shape))


def _whole_shape(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Return the shape of the parameter that pieces fill: where the last of them end, in each
    dim.
    """
    ends = []
    for box in map(piece_box, pieces):
        ends.append([first + n for first, n in zip(box.start, box.shape, strict=True)])
    return tuple(map(max, zip(*ends, strict=True)))
