"""What a directory holds, whether it is undamaged, and where two differ: Hugging Face directories,
converted directories and training checkpoints, on either side."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.conversion.convert import PART_ELEMENTS, meta_model, slices
from tools.conversion.jobs import Bar, Progress, run, shares
from tools.conversion.training import TRAINER, is_training, trained_mtp
from torchsft.checkpoint.boxes import Box
from torchsft.checkpoint.converted import CARRIED, MODEL, is_dcp
from torchsft.checkpoint.hf_directory import Weights, is_model_key, is_mtp, read_config
from torchsft.checkpoint.huggingface import check_weights, open_weights
from torchsft.checkpoint.manifest import damaged, incomplete, read_manifest
from torchsft.checkpoint.publish import read_lock
from torchsft.checkpoint.reader import RangeReader
from torchsft.checkpoint.resume import differences
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.stored import PACKED_BYTES
from torchsft.checkpoint.weight_files import (
    DTYPE_NAMES,
    FP8,
    StoredTensor,
    WeightIndex,
    stored_format,
)
from torchsft.models.families import read_model_config
from torchsft.precision.formats import Fp8Blocks

TASK_BYTES = 1e9
# What says in config.json how numbers are stored.
_FORMAT = {"dtype", "torch_dtype", "quantization_config"}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Findings:
    """What a comparison comes to: `differences` are faults, `notes` are not; a sentence each."""

    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Side:
    """A directory of a comparison, and the config.json by which its tensors have Hugging Face keys;
    None: they are compared under their DCP names.
    """

    directory: Path
    config: Mapping[str, Any] | None

    def open(self) -> Weights | RawTensors:
        """Return its tensors."""
        if self.config is None:
            return RawTensors(self.directory)
        model = meta_model(self.config, trained_mtp(self.directory))
        return open_weights(self.directory, model.checkpoint_pieces())


class RawTensors:
    """The tensors of a DCP directory under their own names, with what a comparison needs of
    `WeightIndex`.
    """

    packed: Mapping[str, Any] = {}
    parts: Collection[str] = ()

    def __init__(self, directory: Path) -> None:
        self.reader = RangeReader(Folder(directory))
        self.tensors = {
            name: StoredTensor(name, tuple(t.size), DTYPE_NAMES[t.properties.dtype])
            for name, t in self.reader.tensors.items()
        }

    def values(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Return one slice of a tensor, in its stored dtype."""
        return self.reader.read(
            name, Box(tuple(i.start for i in index), tuple(i.stop - i.start for i in index))
        )

    read = values


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    tolerance: float = 0.0,
    workers: int = 2,
    part_elements: int = PART_ELEMENTS,
    progress: bool = True,
) -> Findings:
    """Check a directory, or compare two.

    Each is checked first: of DCP directories sizes and checksums of all files, of Hugging Face
    directories their headers. One directory alone must also have all weights that its config.json
    asks for. Two are compared by keys, shapes, dtypes, values and config.json; fp8 by bytes and
    scales where both sides have it, else by its fp32 values. A training checkpoint is compared with
    another one by all its tensors, with other directories by the model's weights.

    Args:
        tolerance: 0 compares bits and dtypes. Else values may differ by this share of the largest
            value of their tensor, and other dtypes are only noted.
        workers: processes.
        part_elements: most elements of a tensor that a process holds of either side.
        progress: whether bars are shown on stderr.

    Raises:
        InputError: a directory cannot be read at all.
    """
    sides = [Path(side) for side in (a, b) if side is not None]
    findings = Findings()
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(read_lock(Folder(side)))
        for side in sides:
            _check(side, findings, progress)
        if findings.differences:
            return findings
        if len(sides) == 1:
            if is_training(sides[0]):
                findings.notes.append(f"{sides[0]}: sizes and checksums of its files are right")
            else:
                check_weights(sides[0], meta_model(read_config(sides[0])))
                checked = (
                    "sizes and checksums of its files are right"
                    if is_dcp(sides[0])
                    else "its headers are sound"
                )
                findings.notes.append(
                    f"{sides[0]}: {checked}, and it holds the weights that its "
                    f"config.json describes"
                )
            return findings
        _compare_configs(*sides, tolerance, findings)
        one, other = _sides(*sides)
        _compare(one, other, tolerance, workers, part_elements, progress, findings)
    return findings


def _check(side: Path, findings: Findings, progress: bool) -> None:
    """Files of one side."""
    if not is_dcp(side):
        WeightIndex(side)
        return
    folder = Folder(side)
    if faults := incomplete(folder):
        findings.differences += [f"{side}: {fault}" for fault in faults]
        return
    with Bar(
        f"checksums of {side.name}",
        sum(entry.bytes for entry in read_manifest(folder).values()),
        progress,
    ) as bar:
        findings.differences += [f"{side}: {fault}" for fault in damaged(folder, bar.add)]
    RangeReader(folder)  # an InputError: a tensor is not complete


def _sides(a: Path, b: Path) -> tuple[Side, Side]:
    """Return how two directories are compared: a training checkpoint has no config.json of a model,
    so by that of the other.
    """
    if is_training(a) and is_training(b):
        return Side(a, None), Side(b, None)
    one = read_config(b if is_training(a) else a)
    other = read_config(a if is_training(b) else b)
    return Side(a, one), Side(b, other)


def _compare_configs(a: Path, b: Path, tolerance: float, findings: Findings) -> None:
    if is_training(a) != is_training(b):
        return
    one, other = read_config(a), read_config(b)
    if is_training(a):
        findings.notes += [
            f"of another run: {difference}" for difference in differences(one, other)
        ]
        return
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            values = [
                json.dumps(config[key]) if key in config else "absent" for config in (one, other)
            ]
            listed = findings.notes if tolerance and key in _FORMAT else findings.differences
            listed.append(f"config.json: {key} is {values[0]} in {a} and {values[1]} in {b}")


def _compare(
    a: Side,
    b: Side,
    tolerance: float,
    workers: int,
    part_elements: int,
    progress: bool,
    findings: Findings,
) -> None:
    """Compare keys, then the tensors that both sides have."""
    one, other = a.open(), b.open()
    keys, other_keys = _weight_keys(one), _weight_keys(other)
    _compare_keys(keys - other_keys, a, b, findings)
    _compare_keys(other_keys - keys, b, a, findings)
    common = [key for key in one.tensors if key in keys & other_keys]
    sizes = [one.tensors[key].bytes for key in common]
    tasks = shares(list(zip(common, sizes, strict=True)), sizes, TASK_BYTES)
    names = a.directory, b.directory
    comparison = _Comparison(names, (one, other), tolerance, part_elements)
    other_dtypes = []
    with Bar("comparing", sum(sizes), progress) as bar:
        for _, (differences, retyped) in run(comparison, tasks, workers, bar.add):
            findings.differences += differences
            other_dtypes += retyped
    if other_dtypes:
        findings.notes.append(f"other dtypes, compared by value: {_some(sorted(other_dtypes))}")
    total = f"{sum(sizes) / 1e9:.3f} GB of {a.directory}"
    findings.notes.append(f"{len(common)} tensors compared, {total}")


def _compare_keys(only: set[str], side: Side, lacking: Side, findings: Findings) -> None:
    """Note the keys that only `side` has: faults, unless the other can do without them."""
    training = is_training(lacking.directory)
    spare, faults = [], []
    for key in sorted(only):
        if side.config is None:
            is_spare = key.startswith("rng.")
        else:
            is_spare = _is_spare(key, side.config, training)
        (spare if is_spare else faults).append(key)
    if spare:
        findings.notes.append(f"{lacking.directory} has none of {_some(spare)}, and need not")
    if faults:
        findings.differences.append(f"only {side.directory} has {_some(faults)}")


def _weight_keys(weights: Weights | RawTensors) -> set[str]:
    """Return keys without the parts of weights of few bits."""
    return weights.tensors.keys() - weights.parts


def _is_spare(key: str, config: Mapping[str, Any], training: bool) -> bool:
    """Whether the side that lacks a key can do without it: a training checkpoint has only the
    model's own weights.
    """
    doubled = key.endswith("rotary_emb.inv_freq") or (
        key == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
    )
    layers = read_model_config(config).num_hidden_layers
    return doubled or (training and not is_model_key(key, layers))


def _some(names: Sequence[str], most: int = 5) -> str:
    """Their number and the first of them."""
    shown = ", ".join(names[:most])
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown}{', ...' * (len(names) > most)})"


class _Comparison:
    """Compares tensors of two sides in a process."""

    def __init__(
        self,
        names: tuple[Path, Path],
        sides: tuple[Weights | RawTensors, Weights | RawTensors],
        tolerance: float,
        part_elements: int,
    ) -> None:
        self.names, self.sides = names, sides
        # of two sides, and what is computed
        self.tolerance, self.part_elements = tolerance, max(1, part_elements // 4)

    def work(
        self, task: Sequence[tuple[str, int]], progress: Progress
    ) -> tuple[list[str], list[str]]:
        """Differences, a sentence each, and keys that have another dtype."""
        differences, retyped = [], []
        for key, size in task:
            one, other = (side.tensors[key] for side in self.sides)
            words = [one.dtype, other.dtype]
            if self.tolerance or words[0] != words[1]:  # of few bits on one side: by value
                words = ["F32" if word == FP8 or word in PACKED_BYTES else word for word in words]
            if one.shape != other.shape:
                differences.append(
                    f"{key}: shape {one.shape} in {self.names[0]} and {other.shape} "
                    f"in {self.names[1]}"
                )
            elif words[0] != words[1] and not self.tolerance:
                differences.append(
                    f"{key}: dtype {one.dtype} in {self.names[0]} and {other.dtype} "
                    f"in {self.names[1]}"
                )
            else:
                if one.dtype != other.dtype and self.tolerance:
                    retyped.append(key)
                differences += self._values(key, as_stored=words[0] == FP8)
            progress(size)
        return differences, retyped

    def _values(self, key: str, as_stored: bool) -> list[str]:
        if self.tolerance:
            return self._close(key)
        found = self._equal(key, as_stored)
        if key in self.sides[0].packed and key in self.sides[1].packed:
            one, other = (side.scales(key) for side in self.sides)
            same_form = one.shape == other.shape and one.dtype == other.dtype
            bits = _BITS[one.itemsize]
            if not same_form or not torch.equal(one.view(bits), other.view(bits)):
                found.append(f"{key}: its {self.sides[0].packed[key].name} scales differ")
        return found

    def _equal(self, key: str, as_stored: bool) -> list[str]:
        count, first, shape = 0, "", self.sides[0].tensors[key].shape
        for index in slices(shape, self.part_elements):
            one, other = (
                (side.read if as_stored else side.values)(key, index) for side in self.sides
            )
            bits = _BITS[one.itemsize]
            if torch.equal(one.contiguous().view(bits), other.contiguous().view(bits)):
                continue
            odd = one.view(bits) != other.view(bits)
            if not first:
                place = tuple(odd.nonzero()[0].tolist())
                values = one[place].item(), other[place].item()
                at = [i + part.start for i, part in itertools.zip_longest(place, index)]
                first = (
                    f"the first at {at}: {values[0]} in {self.names[0]} and {values[1]} in "
                    f"{self.names[1]}"
                )
            count += int(odd.sum())
        return [f"{key}: {count} of {math.prod(shape)} elements differ, {first}"] if count else []

    def _close(self, key: str) -> list[str]:
        largest, difference = 0.0, 0.0
        for index in slices(self.sides[0].tensors[key].shape, self.part_elements):
            one, other = (_wide(side.values(key, index)) for side in self.sides)
            if not one.numel():
                continue
            bounds = _bounds(one, other)
            if not all(map(math.isfinite, bounds)):
                alike = ~one.isfinite() & ((one == other) | (one.isnan() & other.isnan()))
                one, other = one.masked_fill(alike, 0), other.masked_fill(alike, 0)
                bounds = _bounds(one, other)
                if not all(map(math.isfinite, bounds)):
                    return [f"{key}: one of them has nan or inf where the other has not"]
            difference = max(difference, (one - other).abs_().max().item())
            largest = max(largest, *bounds)
        if difference <= self.tolerance * largest:
            return []
        return [
            f"{key}: values differ by up to {difference:.3g}, where the largest is {largest:.3g}"
        ]


def _bounds(*tensors: Tensor) -> list[float]:
    """Return sizes of the smallest and largest values; nan where there is one."""
    return [abs(bound.item()) for values in tensors for bound in values.aminmax()]


def _wide(values: Tensor) -> Tensor:
    """In fp32, or in fp64 where that may not hold the values."""
    return (
        values.float()
        if values.dtype.is_floating_point and values.itemsize <= 4
        else values.double()
    )


# --------------------------------------------------------------------------------------------------
# info


def info(directory: str | Path) -> list[str]:
    """Return lines that say what a directory holds, from headers alone.

    Raises:
        InputError: it cannot be read.
    """
    directory = Path(directory)
    config = read_config(directory)
    if is_dcp(directory):
        tensors = RawTensors(directory).tensors
        stacked = ()
    else:
        index = WeightIndex(directory)
        tensors, stacked = index.tensors, index.stacked
    kind = (
        "training checkpoint"
        if is_training(directory)
        else "converted directory"
        if is_dcp(directory)
        else "Hugging Face"
    )
    lines, text = [f"{directory}: {kind}"], config.get("text_config") or config
    if is_dcp(directory):
        lines += [f"  not complete: {fault}" for fault in incomplete(Folder(directory))]
    if is_training(directory):
        step = json.loads((directory / TRAINER).read_text(encoding="utf-8"))["step"]
        lines.append(
            f"  after step {step} of a run that began with "
            f"{(config.get('model') or {}).get('path')}"
        )
    else:
        lines.append(
            f"  {', '.join(config.get('architectures') or ['no architecture'])}, "
            f"{text.get('num_hidden_layers')} layers"
        )
    groups: dict[str, list[StoredTensor]] = {}
    for key, tensor in tensors.items():
        groups.setdefault(
            _group(key, is_dcp(directory), text.get("num_hidden_layers") or math.inf), []
        ).append(tensor)
    for group, members in groups.items():
        elements = sum(math.prod(tensor.shape) for tensor in members)
        sizes = Counter[str]()
        for tensor in members:
            sizes[tensor.dtype] += tensor.bytes
        listed = ", ".join(f"{dtype} {size / 1e9:.3f} GB" for dtype, size in sizes.most_common())
        lines.append(f"  {group}: {len(members)} tensors of {elements:,} elements; {listed}")
    if stacked:
        lines.append(
            f"  the experts are stored stacked, in {len(stacked)} tensors, and counted "
            f"one by one here"
        )
    if any(tensor.dtype == FP8 for tensor in tensors.values()):
        block = stored_format(directory, Fp8Blocks).block
        lines.append("  fp8 in blocks of {} x {}".format(*block))
    return lines


def _group(key: str, dcp: bool, layers: float) -> str:
    """Return what kind of tensor this is, in words."""
    if dcp and not key.startswith((MODEL, CARRIED)):
        return "optimizer" if key.startswith("optimizer.") else "random states"
    if dcp and key.startswith(MODEL):
        return "weights"
    key = key.removeprefix(CARRIED)
    if is_mtp(key, layers):
        return "MTP layers"
    if key.endswith((Fp8Blocks.scales, "weight_scale", "weight_shape", "_scales")):
        return "scales of quantised weights"
    return "weights" if is_model_key(key, layers) else "others"
