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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.conversion.jobs import Bar, Journal, Progress, run, shares
from torchsft.checkpoint.boxes import Box, piece_box
from torchsft.checkpoint.converted import CARRIED, MODEL, ConvertedWeights, is_dcp
from torchsft.checkpoint.dcp_files import (
    METADATA,
    Chunk,
    ChunkWriter,
    write_manifest,
    write_metadata,
)
from torchsft.checkpoint.endings import read_generation_config, with_ends, write_generation_config
from torchsft.checkpoint.hf_directory import (
    Weights,
    carried_dtype,
    contents_of,
    copy_side_files,
    exported_config,
    exported_dtype,
    fp8_format,
    is_carried,
    is_mtp,
    read_config,
)
from torchsft.checkpoint.huggingface import check_weights
from torchsft.checkpoint.publish import publish, reading, staging_of
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.weight_files import (
    DTYPES,
    INDEX,
    SafetensorsWriter,
    file_order,
    has_weights,
    listing,
    size_of,
    tensor_bytes,
)
from torchsft.config import InputError
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.precision.blockwise import SCALE_SUFFIX, quantise, scale_key, scale_shape

PART_ELEMENTS = 1 << 24  # of a tensor; a worker holds them as read, as written and perhaps in fp32
DCP_FILE_BYTES = 1e9
SHARD_BYTES = 5e9
TRAINER = "trainer.json"
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def is_training(directory: str | Path) -> bool:
    """Whether a directory is a training checkpoint."""
    return is_dcp(directory) and (Path(directory) / TRAINER).is_file()


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


def meta_model(config: Mapping[str, Any]) -> LanguageModel:
    """The model of a config.json without memory: names and shapes."""
    with torch.device("meta"):
        return build_model(config)


@dataclass(frozen=True)
class Part:
    """A slice of a source tensor, which a worker holds.

    Attributes:
        key, index: of it in the source.
        bytes: of it there.
        name, shape, start: the DCP tensor that it goes into, and where it begins there.
        dtype: in which it is written.
    """

    key: str
    index: tuple[slice, ...]
    bytes: int
    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Item:
    """A tensor of a Hugging Face directory to be written; in fp8, with its scales.

    Attributes:
        bytes: in the source, without scales.
        carried: whether it comes from the base.
        contents: key -> dtype, shape of it and its scales.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int
    carried: bool
    contents: dict[str, tuple[torch.dtype, tuple[int, ...]]]


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
        self.inputs: list[Path] = [source]
        self.notes: list[str] = []

    def plan(self) -> list[Task]:
        """The files to write, of tensors in the order in which they lie in the source's files."""
        parts = list(self._parts())
        sizes = [
            math.prod(i.stop - i.start for i in part.index) * part.dtype.itemsize for part in parts
        ]
        groups = shares(list(zip(parts, sizes, strict=True)), sizes, self.file_bytes)
        return [
            Task(
                f"__{i}_0.distcp",
                [p for p, _ in group],
                sum(p.bytes for p, _ in group),
                sum(size for _, size in group),
            )
            for i, group in enumerate(groups)
        ]

    def _parts(self) -> Iterator[Part]:
        stored, fp8, layers = (
            self.weights.tensors,
            self.weights.fp8,
            self.model.config.num_hidden_layers,
        )
        state, places = self.model.state_dict(), {}
        for name, pieces in self.model.checkpoint_pieces().items():
            kinds = {
                torch.float32 if piece.key in fp8 else DTYPES[stored[piece.key].dtype]
                for piece in pieces
            }
            # which holds all of them exactly
            dtype = kinds.pop() if len(kinds) == 1 else torch.float32
            for piece in pieces:
                places[piece.key] = (
                    MODEL + name,
                    tuple(state[name].shape),
                    piece_box(piece).start,
                    dtype,
                )
        unknown, left_out = [], []
        for key, tensor in sorted(stored.items(), key=lambda item: (item[1].file, item[1].start)):
            if tensor.dtype not in DTYPES:
                raise InputError(
                    f"{self.source}: {key} has dtype {tensor.dtype}, which is not "
                    f"supported; remove it"
                )
            dtype = DTYPES[tensor.dtype]
            name, shape, start, target = places.get(
                key, (CARRIED + key, tensor.shape, (0,) * len(tensor.shape), dtype)
            )
            if key not in places and not key.endswith(SCALE_SUFFIX) and not is_mtp(key, layers):
                if not is_carried(key, layers):
                    left_out.append(key)
                    continue
                unknown.append(key)
            for index in slices(tensor.shape, self.part_elements):
                size = math.prod(i.stop - i.start for i in index) * dtype.itemsize
                row = len(start) - len(index)
                at = (
                    (*start[:row], start[row] + index[0].start, *start[row + 1 :])
                    if index
                    else start
                )
                yield Part(key, index, size, name, shape, at, target)
        if unknown:
            self.notes.append(_note(unknown))
        if left_out:
            self.notes.append(
                f"{len(left_out)} tensors are left out, since the model has them "
                f"twice: {listing(left_out, 5)}"
            )

    def work(self, task: Task, progress: Progress) -> dict[str, Any]:
        """Write one file; its record."""
        with ChunkWriter(self.folder, task.file) as writer:
            for part in task.content:
                read = self.weights.read if part.name.startswith(CARRIED) else self.weights.values
                values = read(part.key, part.index).to(part.dtype)
                box = Box(part.start, (1,) * (len(part.shape) - values.ndim) + tuple(values.shape))
                writer.write(part.name, part.shape, box, values.view(box.shape))
                progress(part.bytes)
        chunks = [
            (
                name,
                shape,
                str(dtype).removeprefix("torch."),
                chunk.box.start,
                chunk.box.shape,
                chunk.offset,
                chunk.length,
            )
            for name, shape, dtype, chunk in writer.written
        ]
        return {"file": task.file, "bytes": writer.size, "crc32": writer.crc32, "chunks": chunks}

    def finish(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Write side files, `.metadata` and the manifest."""
        folder = self.folder
        copy_side_files(self.source, folder)
        folder.write_text("config.json", (self.source / "config.json").read_text(encoding="utf-8"))
        written = []
        for file, record in records.items():
            for name, shape, dtype, start, extent, *place in record["chunks"]:
                chunk = Chunk(Box(tuple(start), tuple(extent)), file, *place)
                written.append((name, tuple(shape), getattr(torch, dtype), chunk))
        write_metadata(folder, written)
        files = {file: (record["bytes"], record["crc32"]) for file, record in records.items()}
        for path in folder.path.rglob("*"):
            name = path.relative_to(folder.path).as_posix()
            if path.is_file() and name not in files and name != Journal.NAME:
                data = path.read_bytes()
                files[name] = len(data), zlib.crc32(data)
        write_manifest(folder, files)


class ToHf:
    """A converted directory or a training checkpoint to a Hugging Face directory, the one that
    `export` writes.

    Args:
        source: the DCP directory.
        staging: where files are written.
        dtype: a key of `EXPORT_DTYPES`.
        base: where everything but the model's weights comes from; None: `source`, or the model of a
            training checkpoint's run.
        part_elements: most elements of a tensor that a process holds at once, in rows.
        file_bytes: most bytes of tensors in a file.

    Attributes:
        inputs: the directories that are read.
        notes: sentences for the user, after `plan`.

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
        self.base, self.folder, self.chat_template = base, Folder(staging), _chat_template(source)
        self.dtype, self.part_elements, self.file_bytes = (
            EXPORT_DTYPES[dtype],
            part_elements,
            file_bytes,
        )
        config = read_config(base)
        self.model, exported = meta_model(config), exported_config(config, self.dtype)
        self.config, self.generation = with_ends(
            exported, read_generation_config(base), trained_ends(source)
        )
        self.block, self.power_of_two = (
            fp8_format(self.config) if dtype == "fp8" else ((1, 1), False)
        )
        self.weights: Weights = ConvertedWeights(source, self.model.checkpoint_pieces())
        self.base_weights: Weights | None = None
        if base.samefile(source):
            self.base_weights = self.weights
        elif is_dcp(base) or has_weights(base):
            self.base_weights = check_weights(base, self.model)
        self.inputs: list[Path] = sorted({source, base})
        self.notes: list[str] = []

    def _item(self, key: str, dtype: torch.dtype, carried: bool) -> Item:
        stored = (self.base_weights if carried else self.weights).tensors[key]
        contents = contents_of(key, dtype, stored.shape, self.block)
        return Item(
            key,
            dtype,
            stored.shape,
            tensor_bytes(DTYPES[stored.dtype], stored.shape),
            carried,
            contents,
        )

    def plan(self) -> list[Task]:
        """The files to write, of tensors in the model's order."""
        base, layers, buffers = (
            self.base_weights,
            self.model.config.num_hidden_layers,
            dict(self.model.named_buffers()),
        )
        items = []
        for name, pieces in self.model.checkpoint_pieces().items():
            for piece in pieces:
                dtype = exported_dtype(
                    piece.key,
                    self.dtype,
                    base,
                    buffer=name in buffers,
                    quantised=self.model.is_quantised(piece.key),
                )
                items.append(self._item(piece.key, dtype, carried=False))
        candidates = [] if base is None else base.tensors
        keys = [
            key for key in candidates if is_carried(key, layers) and not key.endswith(SCALE_SUFFIX)
        ]
        for key in keys:
            quantised = self.model.is_quantised(key)
            dtype = carried_dtype(key, self.dtype, base, quantised=quantised)
            items.append(self._item(key, dtype, carried=True))
        if unknown := [key for key in keys if not is_mtp(key, layers)]:
            self.notes.append(_note(unknown))
        by_key = {item.key: item for item in items}
        # refuses odd fp8 weights at once
        file_order({key: entry for item in items for key, entry in item.contents.items()})
        sizes = [size_of(item.contents) for item in items]
        groups = shares(list(zip(items, sizes, strict=True)), sizes, self.file_bytes)
        tasks = []
        for i, group in enumerate(groups, start=1):
            order = file_order(
                {key: entry for item, _ in group for key, entry in item.contents.items()}
            )
            content = [by_key[key] for key in order if key in by_key]
            name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            tasks.append(
                Task(
                    name,
                    content,
                    sum(item.bytes for item in content),
                    sum(size for _, size in group),
                )
            )
        return tasks

    def work(self, task: Task, progress: Progress) -> dict[str, Any]:
        """Write one file; its record."""
        contents = {key: entry for item in task.content for key, entry in item.contents.items()}
        with SafetensorsWriter(self.folder, task.file, contents) as writer:
            for item in task.content:
                self._write(writer, item, progress)
        keys = {key: tensor_bytes(*entry) for key, entry in contents.items()}
        return {"file": task.file, "bytes": self.folder.size(task.file), "keys": keys}

    def _write(self, writer: SafetensorsWriter, item: Item, progress: Progress) -> None:
        """A tensor, part by part, and its scales."""
        weights, base = self.base_weights if item.carried else self.weights, self.base_weights
        quantised = item.dtype == torch.float8_e4m3fn
        known = (
            base.scales(item.key)
            if quantised and base is not None and item.key in base.fp8
            else None
        )
        as_it_is = quantised and item.carried and known is not None
        if known is not None and tuple(known.shape) != scale_shape(item.shape, self.block):
            known = None
        scales = []
        for index in slices(item.shape, self.part_elements, multiple=self.block[0]):
            if as_it_is:
                values = weights.read(item.key, index)
            else:
                values = weights.values(item.key, index)
                if quantised:
                    rows = slice(index[0].start // self.block[0], None)
                    values, scale = quantise(
                        values.float(),
                        self.block,
                        self.power_of_two,
                        None if known is None else known[rows],
                        item.key,
                    )
                    scales.append(scale)
            writer.write(item.key, values.to(item.dtype))
            progress(item.bytes // max(1, math.prod(item.shape)) * values.numel())
        if quantised:
            writer.write(scale_key(item.key), known if as_it_is else torch.cat(scales))

    def finish(self, records: Mapping[str, Mapping[str, Any]]) -> None:
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


def _note(unknown: Sequence[str]) -> str:
    return (
        f"{len(unknown)} tensors that the model does not know are kept as they are: "
        f"{listing(unknown, 5)}"
    )


def _chat_template(source: Path) -> str | None:
    """The chat template that a training checkpoint's run was given in place of its model's."""
    path = (
        (read_config(source).get("data") or {}).get("chat_template")
        if is_training(source)
        else None
    )
    if not path:
        return None
    from torchsft.data.tokenizer import read_chat_template  # imports transformers

    return read_chat_template(path)


def trained_ends(source: Path) -> list[int]:
    """Ids of the tokens that ended the turns trained so far; of a training checkpoint that knows
    them.
    """
    if not is_training(source):
        return []
    return json.loads((source / TRAINER).read_text(encoding="utf-8"))["extra"].get("end_tokens", [])


def default_base(source: Path) -> Path:
    """Where to-hf takes what is not in a DCP directory from, if not told.

    Raises:
        InputError: a training checkpoint whose run's model is not known or not there.
    """
    if not is_training(source):
        return source
    path = (read_config(source).get("model") or {}).get("path")
    if path is None or not Path(path).is_dir():
        was = (
            "its run's config.json names none"
            if path is None
            else f"that of its run, {path}, is not here"
        )
        raise InputError(
            f"{source} needs the Hugging Face directory that training began with, and "
            f"{was}; name it with --base"
        )
    return Path(path)


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
    arguments = (source, staging.path, *options)
    with ExitStack() as stack:
        # a run that goes on must not remove what is being looked at
        stack.enter_context(reading(Folder(source)))
        conversion = kind(*arguments)
        for path in conversion.inputs:
            if path.resolve() in (out.resolve(), *out.resolve().parents):
                raise InputError(
                    f"the output {out} lies in {path}, which is read; choose another output"
                )
            stack.enter_context(reading(Folder(path)))
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
            for _, record in run(kind, arguments, left, workers, bar.add):
                journal.add(record)
        except InputError:
            if not journal.records:
                staging.remove()
            raise
        except OSError as error:
            raise OSError(
                f"{out} could not be written ({error}); mend that and give the same command again"
            ) from error
        conversion.finish({task.file: journal.records[task.file] for task in tasks})
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
