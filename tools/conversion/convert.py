"""Conversion between Hugging Face directories and DCP directories, of models of any size.

What there is to write follows from headers and the configuration: a list of output files, each with
the parts of tensors that go into it, in order. Worker processes write one file after another, a
part at a time, so that a worker holds one part and nothing else. No model is built (only names and
shapes, on the meta device), and no process group.

All is written into a hidden directory beside the output, with a journal of the files that are
complete; when all are, the directory gets its name. The same command continues there, unless its
source or options have changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from tools.conversion.jobs import Bar, Journal, Progress, run, shares
from tools.conversion.training import chat_template, default_base, trained_ends, trained_mtp
from torchsft.checkpoint.boxes import Box, piece_box
from torchsft.checkpoint.converted import CARRIED, MODEL, ConvertedWeights, is_dcp
from torchsft.checkpoint.endings import read_generation_config, with_ends, write_generation_config
from torchsft.checkpoint.hf_directory import (
    Kind,
    Weights,
    carried_keys,
    carried_kind,
    contents_of,
    copy_side_files,
    export_kind,
    exported_config,
    exported_kind,
    is_carried,
    is_mtp,
    read_config,
)
from torchsft.checkpoint.huggingface import check_weights, known_scales
from torchsft.checkpoint.manifest import METADATA, FileEntry
from torchsft.checkpoint.planning import chunk_box, write_item
from torchsft.checkpoint.publish import publish, read_lock, staging_of
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import (
    DTYPES,
    INDEX,
    Contents,
    SafetensorsWriter,
    has_weights,
    in_file_order,
    listing,
    size_of,
    tensor_bytes,
)
from torchsft.checkpoint.writer import DirectoryWriter
from torchsft.config import InputError
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel, Mtp

PART_ELEMENTS = 1 << 24  # of a tensor; a worker holds them as read, as written and perhaps in fp32
DCP_FILE_BYTES = 1e9
SHARD_BYTES = 5e9


def slices(shape: Sequence[int], elements: int, multiple: int = 1) -> Iterator[tuple[slice, ...]]:
    """Indices of consecutive parts of a tensor of this shape, cut along its first dim; `elements`:
    most of a part, where a row has not more. The number of rows of each part but the last is a
    `multiple`.
    """
    if not shape:
        yield ()
        return
    width = max(1, torch.Size(shape[1:]).numel())
    rows = max(1, elements // width // multiple) * multiple
    for start in range(0, max(shape[0], 1), rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))


def meta_model(config: Mapping[str, Any], mtp: Mtp = "keep") -> LanguageModel:
    """Return the model of a config.json without memory: names and shapes."""
    with torch.device("meta"):
        return build_model(config, mtp=mtp)


@dataclass(frozen=True)
class Part:
    """A slice of a source tensor, which a worker holds, and where it goes.

    Attributes:
        key, index: of it in the source.
        bytes: of it there.
        item: which box of which DCP tensor it becomes, and in which dtype.
    """

    key: str
    index: tuple[slice, ...]
    bytes: int
    item: WriteItem

    @property
    def bytes_written(self) -> int:
        """Bytes of its values in the DCP tensor."""
        return chunk_box(self.item).size * self.item.tensor_data.properties.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where in a parameter a Hugging Face tensor goes.

    Attributes:
        name, shape: of the DCP tensor.
        start: where the tensor begins in that.
        dtype: of the DCP tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    dtype: torch.dtype

    def item(self, index: tuple[slice, ...]) -> WriteItem:
        """Return the item that writes a slice of the Hugging Face tensor."""
        leading = len(self.start) - len(index)
        starts = [o + i.start for o, i in zip(self.start[leading:], index, strict=True)]
        extents = [i.stop - i.start for i in index]
        box = Box((*self.start[:leading], *starts), (1,) * leading + tuple(extents))
        return write_item(self.name, self.shape, self.dtype, box)


@dataclass(frozen=True)
class Item:
    """A tensor of a Hugging Face directory to be written.

    Attributes:
        kind: the dtype or format in which it is written.
        bytes: in the source, without scales.
        carried: whether it comes from the base.
        contents: what the file has of it: itself, or the parts of a format.
    """

    key: str
    kind: Kind
    shape: tuple[int, ...]
    bytes: int
    carried: bool
    contents: Contents


@dataclass(frozen=True)
class Task:
    """An output file and what goes into it, in order.

    Attributes:
        source_bytes, bytes: of tensors that are read for it and that it holds.
    """

    file: str
    content: Sequence[Any]
    source_bytes: int
    bytes: int


class SourcePlanner(DefaultSavePlanner):
    """Resolves parts of DCP tensors from the weights of a Hugging Face directory, one at a time.

    Args:
        weights: of the directory.
        parts: what is resolved.
        progress: called with the source's bytes of each.
    """

    def __init__(self, weights: Weights, parts: Sequence[Part], progress: Progress) -> None:
        super().__init__()
        self._weights, self._progress = weights, progress
        self._parts = {part.item.index: part for part in parts}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of an item, in the dtype in which they are written."""
        part, data = self._parts[write_item.index], write_item.tensor_data
        # of few bits, but for fp8, values are all that DCP can hold
        readable = self._weights.tensors[part.key].dtype in DTYPES
        as_stored = readable and write_item.index.fqn.startswith(CARRIED)
        read = self._weights.read if as_stored else self._weights.values
        values = read(part.key, part.index).to(data.properties.dtype)
        self._progress(part.bytes)
        return values.view(data.chunk.sizes)


@dataclass(frozen=True)
class DcpWorker:
    """Writes files of a converted directory."""

    weights: Weights
    folder: Folder

    def work(self, task: Task, progress: Progress) -> dict[str, Any]:
        """Write one file and return its record: its manifest entry and the place of each chunk."""
        writer = DirectoryWriter(self.folder, task.file)
        planner = SourcePlanner(self.weights, task.content, progress)
        plan = SavePlan([part.item for part in task.content])
        *chunks, file = writer.write_data(plan, planner).value()
        places = [(chunk.storage_data.offset, chunk.storage_data.length) for chunk in chunks]
        return {"file": task.file, "places": places, **asdict(file.storage_data)}


class ToDcp:
    """A Hugging Face directory to a converted directory (checkpoint/converted.py).

    Args:
        source: the Hugging Face directory.
        staging: where files are written.
        part_elements: most elements of a tensor that a process holds at once, in rows.
        file_bytes: bytes of tensors in a file.

    Attributes:
        inputs: the directories that are read.
        notes: sentences for the user, after `plan`.
        worker: does the tasks.

    Raises:
        InputError: see `read_config` and `check_weights`.
    """

    def __init__(self, source: Path, staging: Path, part_elements: int, file_bytes: float) -> None:
        if is_dcp(source):
            raise InputError(f"{source} is a DCP directory already; give a Hugging Face directory")
        self.source, self.folder = source, Folder(staging)
        self.part_elements, self.file_bytes = part_elements, file_bytes
        self.model = meta_model(read_config(source))
        self.weights = check_weights(source, self.model)
        self.worker = DcpWorker(self.weights, self.folder)
        self.inputs: list[Path] = [source]
        self.notes: list[str] = []

    def plan(self) -> list[Task]:
        """Return the files to write, of tensors in the order in which they lie in the source's
        files.
        """
        parts = list(self._parts())
        groups = shares(parts, [part.bytes_written for part in parts], self.file_bytes)
        return [
            Task(
                f"__{i}_0.distcp",
                group,
                source_bytes=sum(part.bytes for part in group),
                bytes=sum(part.bytes_written for part in group),
            )
            for i, group in enumerate(groups)
        ]

    def _places(self) -> dict[str, Place]:
        """Return where the model's own weights go, by key."""
        stored, packed = self.weights.tensors, self.weights.packed
        state, places = self.model.state_dict(), {}
        for name, pieces in self.model.checkpoint_pieces().items():
            dtypes = {
                torch.float32 if piece.key in packed else DTYPES[stored[piece.key].dtype]
                for piece in pieces
            }
            # fp32 holds all of them exactly
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            shape = tuple(state[name].shape)
            for piece in pieces:
                places[piece.key] = Place(MODEL + name, shape, piece_box(piece).start, dtype)
        return places

    def _parts(self) -> Iterator[Part]:
        places, layers = self._places(), self.model.config.num_hidden_layers
        unknown, left_out = [], []
        packed = self.weights.packed
        values_of_few_bits = {key + form.suffixes[-2] for key, form in packed.items()}
        values_of_few_bits -= packed.keys()
        for key, tensor in self.weights.tensors.items():
            form = packed.get(key)
            if key in values_of_few_bits:  # they are read as the weight's
                continue
            if form is None and tensor.dtype not in DTYPES:
                raise InputError(
                    f"{self.source}: {key} has dtype {tensor.dtype}, which is not "
                    f"supported; remove it"
                )
            # of few bits, but for fp8, which DCP can hold
            dtype = DTYPES.get(tensor.dtype, torch.float32)
            if key not in places and key not in self.weights.parts and not is_mtp(key, layers):
                if not is_carried(key, layers):
                    left_out.append(key)
                    continue
                unknown.append(key)
            origin = (0,) * len(tensor.shape)
            place = places.get(key) or Place(CARRIED + key, tensor.shape, origin, dtype)
            for index in slices(tensor.shape, self.part_elements):
                elements = math.prod(i.stop - i.start for i in index)
                yield Part(key, index, elements * dtype.itemsize, place.item(index))
        if unknown:
            self.notes.append(_note(unknown))
        if left_out:
            self.notes.append(
                f"{len(left_out)} tensors are left out, since the model has them "
                f"twice: {listing(left_out, 5)}"
            )

    def finish(self, tasks: Sequence[Task], records: Mapping[str, Mapping[str, Any]]) -> None:
        """Write side files, `.metadata` and the manifest."""
        config = (self.source / "config.json").read_text(encoding="utf-8")
        writer = DirectoryWriter(self.folder, tasks[0].file, {"config.json": config})
        writer.others = copy_side_files(self.source, self.folder)
        plans, results = [], []
        for task in tasks:
            items = [part.item for part in task.content]
            names = {item.index.fqn: (item.index.fqn,) for item in items}
            plans.append(SavePlan(items, planner_data=names))
            record = records[task.file]
            results += [
                WriteResult(item.index, length, _StorageInfo(task.file, start, length))
                for item, (start, length) in zip(items, record["places"], strict=True)
            ]
            entry = FileEntry(record["bytes"], record["checksum"], record["algorithm"])
            results.append(WriteResult(MetadataIndex(task.file), entry.bytes, entry))
        _, metadata = DefaultSavePlanner().create_global_plan(plans)
        writer.finish(metadata, [results])


@dataclass(frozen=True)
class HfWorker:
    """Writes files of a Hugging Face directory.

    Attributes:
        weights, base_weights: of the model, and what the rest comes from.
        part_elements: most elements of a tensor that are held at once as values, in rows.
    """

    weights: Weights
    base_weights: Weights | None
    folder: Folder
    part_elements: int

    def work(self, task: Task, progress: Progress) -> dict[str, Any]:
        """Write one file and return its record: the bytes of it and of each of its tensors."""
        contents = merged(task.content)
        with SafetensorsWriter(self.folder, task.file, contents) as writer:
            for item in task.content:
                if isinstance(item.kind, torch.dtype):
                    self._write(writer, item, progress)
                else:
                    self._write_parts(writer, item, progress)
        keys = {key: tensor_bytes(*entry) for key, entry in contents.items()}
        return {"file": task.file, "bytes": self.folder.size(task.file), "keys": keys}

    def _write(self, writer: SafetensorsWriter, item: Item, progress: Progress) -> None:
        weights = self.base_weights if item.carried else self.weights
        for index in slices(item.shape, self.part_elements):
            values = weights.values(item.key, index)
            writer.write(item.key, values.to(item.kind))
            progress(_share(item, values))

    def _write_parts(self, writer: SafetensorsWriter, item: Item, progress: Progress) -> None:
        """Write a tensor in a format of few bits; with scales of the base where they fit.

        Its first part is written as it is made, the others are kept until that is complete.
        """
        base, form = self.base_weights, item.kind
        known = known_scales(base, item.key, form, item.contents)
        if item.carried and known is not None and item.contents.keys() <= base.tensors.keys():
            for part in item.contents:
                writer.write(part, base.read_whole(part))
            progress(item.bytes)
            return
        for part, values in form.constants(item.key, item.shape).items():
            writer.write(part, values)
        weights = base if item.carried else self.weights
        kept: dict[str, list[Tensor]] = {}
        for index in slices(item.shape, self.part_elements, multiple=form.rows):
            values = weights.values(item.key, index).float()
            first = index[0].start // form.rows
            known_rows = None if known is None else known[first : -(-index[0].stop // form.rows)]
            encoded = form.encode(values, known_rows, item.key)
            streamed = next(iter(encoded))
            writer.write(streamed, encoded.pop(streamed))
            for part, rows in encoded.items():
                kept.setdefault(part, []).append(rows)
            progress(_share(item, values))
        for part, rows in kept.items():
            writer.write(part, torch.cat(rows))


def merged(items: Sequence[Item]) -> Contents:
    """Return the contents of all items."""
    return {key: entry for item in items for key, entry in item.contents.items()}


def _share(item: Item, values: Tensor) -> int:
    """Return the source's bytes of a part of an item."""
    return item.bytes // max(1, math.prod(item.shape)) * values.numel()


class ToHf:
    """A converted directory or a training checkpoint to a Hugging Face directory, the one that
    `export` writes.

    Args:
        source: the DCP directory.
        staging: where files are written.
        dtype: a key of `EXPORT_DTYPES` (checkpoint/hf_directory.py).
        base: where everything but the model's weights comes from; None: `source`, or the model of a
            training checkpoint's run.
        part_elements: most elements of a tensor that a process holds at once, in rows.
        file_bytes: most bytes of tensors in a file.

    Attributes:
        inputs: the directories that are read.
        notes: sentences for the user, after `plan`.
        worker: does the tasks.

    Raises:
        InputError: no DCP directory, incomplete or of another model; a base that does not exist or
            does not fit.
    """

    def __init__(
        self,
        source: Path,
        staging: Path,
        dtype: str,
        base: Path | None,
        part_elements: int,
        file_bytes: float,
    ) -> None:
        if not is_dcp(source):
            raise InputError(
                f"{source} has no {METADATA}; give a converted directory or a training checkpoint"
            )
        base = base or default_base(source)
        self.base, self.folder, self.chat_template = base, Folder(staging), chat_template(source)
        self.part_elements, self.file_bytes = part_elements, file_bytes
        config = read_config(base)
        mtp = trained_mtp(source)
        self.model = meta_model(config, mtp)
        exported = exported_config(config, dtype, mtp)
        self.config, self.generation = with_ends(
            exported, read_generation_config(base), trained_ends(source)
        )
        self.kind = export_kind(self.config, dtype)
        self.base_weights: Weights | None = None
        if not base.samefile(source) and (is_dcp(base) or has_weights(base)):
            self.base_weights = check_weights(base, self.model)
        keys = self.base_weights.tensors if self.base_weights else ()
        self.pieces = self.model.checkpoint_pieces(keys)
        self.weights: Weights = ConvertedWeights(source, self.pieces)
        if base.samefile(source):
            self.base_weights = self.weights
        self.worker = HfWorker(
            self.weights,
            self.base_weights,
            self.folder,
            self.part_elements,
        )
        self.inputs: list[Path] = sorted({source, base})
        self.notes: list[str] = []

    def _item(self, key: str, kind: Kind, carried: bool) -> Item:
        stored = (self.base_weights if carried else self.weights).tensors[key]
        contents = contents_of(key, kind, stored.shape)
        return Item(key, kind, stored.shape, stored.bytes, carried, contents)

    def plan(self) -> list[Task]:
        """Return the files to write, of tensors in the model's order."""
        base, constants = self.base_weights, self.model.constants()
        items = []
        for name, pieces in self.pieces.items():
            for piece in pieces:
                kind = exported_kind(
                    piece.key,
                    self.kind,
                    base,
                    constant=name in constants,
                    quantised=self.model.is_quantised(piece.key),
                )
                items.append(self._item(piece.key, kind, carried=False))
        keys, unknown = [], []
        if base is not None:
            keys, unknown = carried_keys(base, self.model.depth, self.model.mtp == "drop")
        for key in keys:
            quantised = self.model.is_quantised(key)
            kind = carried_kind(key, self.kind, base, quantised=quantised)
            items.append(self._item(key, kind, carried=True))
        if unknown:
            self.notes.append(_note(unknown))
        in_file_order(items)  # refuses odd weights at once
        groups = shares(items, [size_of(item.contents) for item in items], self.file_bytes)
        return [
            _hf_task(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
            for i, group in enumerate(groups, start=1)
        ]

    def finish(self, tasks: Sequence[Task], records: Mapping[str, Mapping[str, Any]]) -> None:
        """Write side files, the index and config.json."""
        files = {key: file for file, record in records.items() for key in record["keys"]}
        total = sum(size for record in records.values() for size in record["keys"].values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: files[key] for key in sorted(files)},
        }
        copy_side_files(self.base, self.folder, self.chat_template)
        self.folder.write_text(INDEX, json.dumps(index, indent=2) + "\n")
        write_generation_config(self.generation, self.base, self.folder)
        self.folder.write_text("config.json", json.dumps(self.config, indent=2) + "\n")


def _hf_task(file: str, items: Sequence[Item]) -> Task:
    """Return the task of a file of these items, in an order in which each is aligned."""
    content = in_file_order(items)
    return Task(
        file,
        content,
        source_bytes=sum(item.bytes for item in content),
        bytes=sum(size_of(item.contents) for item in content),
    )


def _note(unknown: Sequence[str]) -> str:
    return (
        f"{len(unknown)} tensors that the model does not know are kept as they are: "
        f"{listing(unknown, 5)}"
    )


# --------------------------------------------------------------------------------------------------
# commands


def to_dcp(
    source: str | Path,
    out: str | Path,
    *,
    workers: int = 2,
    part_elements: int = PART_ELEMENTS,
    file_bytes: float = DCP_FILE_BYTES,
    progress: bool = True,
) -> list[str]:
    """Convert a Hugging Face directory to a converted directory `out`, which must not exist. See
    `ToDcp`.

    Args:
        workers: processes.
        progress: whether a bar is shown on stderr.

    Returns:
        Sentences for the user.

    Raises:
        InputError: see `ToDcp`; `out` exists, is being written, or has not enough room; a process
            was killed.
        OSError: `out` could not be written.
    """
    return _convert(ToDcp, Path(source), Path(out), (part_elements, file_bytes), workers, progress)


def to_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
    base: str | Path | None = None,
    workers: int = 2,
    part_elements: int = PART_ELEMENTS,
    max_shard_bytes: float = SHARD_BYTES,
    progress: bool = True,
) -> list[str]:
    """Convert a DCP directory to a Hugging Face directory `out`, which must not exist. See `ToHf`
    and `to_dcp`.
    """
    arguments = (dtype, None if base is None else Path(base), part_elements, max_shard_bytes)
    return _convert(ToHf, Path(source), Path(out), arguments, workers, progress)


def _convert(
    kind: type[ToDcp | ToHf],
    source: Path,
    out: Path,
    options: tuple[Any, ...],
    workers: int,
    progress: bool,
) -> list[str]:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists already; remove it or choose another output")
    target = Folder(out)
    staging = staging_of(target)
    with ExitStack() as stack:
        # a run that goes on must not remove what is being looked at
        stack.enter_context(read_lock(Folder(source)))
        conversion = kind(source, staging.path, *options)
        for path in conversion.inputs:
            if path.resolve() in (out.resolve(), *out.resolve().parents):
                raise InputError(
                    f"the output {out} lies in {path}, which is read; choose another output"
                )
            stack.enter_context(read_lock(Folder(path)))
        tasks = conversion.plan()
        state = [kind.__name__, options, tasks, [_state(path) for path in conversion.inputs]]
        journal = stack.enter_context(
            Journal(staging.path, hashlib.sha256(repr(state).encode()).hexdigest())
        )
        kept = len(journal.records)
        left = [task for task in tasks if task.file not in journal.records]
        bar = stack.enter_context(
            Bar(f"{source.name} -> {out.name}", sum(task.source_bytes for task in left), progress)
        )
        try:
            _check_room(staging.path, sum(task.bytes for task in left))
            for _, record in run(conversion.worker, left, workers, bar.add):
                journal.add(record)
        except InputError:
            if not journal.records:
                staging.remove()
            raise
        except OSError as error:
            raise OSError(
                f"{out} could not be written ({error}); mend that and give the same command again"
            ) from error
        conversion.finish(tasks, {task.file: journal.records[task.file] for task in tasks})
        (staging.path / Journal.NAME).unlink()
        publish(staging, target)
    again = (
        [f"{kept} of {len(tasks)} files were complete from an interrupted attempt"] if kept else []
    )
    size = sum(task.bytes for task in tasks)
    return [*again, *conversion.notes, f"{out}: {len(tasks)} files of weights, {size / 1e9:.3f} GB"]


def _state(directory: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a directory's files."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are to be "
            f"written; make room or "
            "choose an output elsewhere"
        )
