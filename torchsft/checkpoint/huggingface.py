"""Hugging Face directories: safetensors weights into a (sharded) model and back; each rank reads and writes only its
part.

A model says where each Hugging Face tensor lies in its parameters (`model.checkpoint_pieces()`): a `Piece` fills a box
of one parameter. A rank holds a box of each parameter too. Everything here is intersections of these two kinds of
boxes, in the parameter's coordinates.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchsft.checkpoint.boxes import Box, local_box, piece_box
from torchsft.checkpoint.publish import gather_objects, published, rank_and_size, write_text
from torchsft.checkpoint.weight_files import (
    DTYPES,
    INDEX,
    WEIGHT_DTYPES,
    SafetensorsWriter,
    WeightIndex,
    listing,
    read_json_object,
    tensor_bytes,
)
from torchsft.config import InputError
from torchsft.models.decoder import Piece
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config

# What an export takes over from its source besides config.json. Python files belong to the configuration's `auto_map`
# (other tools may need them); they are copied, never run.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "additional_chat_templates/*.jinja")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors_and_pieces(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[Piece]]]:
    """Parameters and persistent buffers by name, and their pieces.

    `state_dict` rather than `named_parameters`: its hooks put FSDP's parameters back into their shards.
    """
    tensors, pieces = model.state_dict(keep_vars=True), model.checkpoint_pieces()
    if tensors.keys() != pieces.keys():
        names = sorted(tensors.keys() ^ pieces.keys())
        raise RuntimeError(f"checkpoint_pieces() and state_dict() disagree on {listing(names)}")
    return tensors, pieces


# -------------------------------------------------------------------------------------------------------------- reading


def read_config(hf_dir: str | Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        InputError: no such directory or file, or not a JSON object.
    """
    path = Path(hf_dir) / "config.json"
    if not path.parent.is_dir():
        raise InputError(f"model directory {path.parent} does not exist; give a Hugging Face directory")
    if not path.is_file():
        raise InputError(f"{path.parent} has no config.json; give a Hugging Face model directory")
    return read_json_object(path)


def check_weights(hf_dir: str | Path, model: DeepseekV3) -> WeightIndex:
    """Compare keys, shapes and dtypes of a directory with what the model needs, from headers alone.

    Keys that may be there although the model has no use for them: multi-token-prediction layers (`model.layers.{i}.`
    from `num_hidden_layers` up, which `export` carries through), rotary `inv_freq` buffers, and in a model with tied
    embeddings an `lm_head.weight` that equals them.

    Args:
        model: whole, on any device, meta included.

    Raises:
        InputError: missing, unexpected and misshapen keys, all named; weights that are not bf16, fp16 or fp32; see
            `WeightIndex`.
    """
    index = WeightIndex(hf_dir)
    tensors, pieces = _tensors_and_pieces(model)
    for name, tensor in tensors.items():
        boxes = [piece_box(piece) for piece in pieces[name]]
        if sum(math.prod(b.shape) for b in boxes) != tensor.numel() or len({b.start for b in boxes}) != len(boxes):
            raise RuntimeError(f"the pieces of {name} do not cover its {tensor.numel()} elements exactly once")
    expected = {piece.key: piece.hf_shape for piece in itertools.chain.from_iterable(pieces.values())}
    spare = {key for key in index.tensors if _is_spare(key, model.config.num_hidden_layers)}
    if model.config.tie_word_embeddings and "lm_head.weight" in index.tensors:
        _check_tied(index)
        spare.add("lm_head.weight")
    found = {key: stored.shape for key, stored in index.tensors.items() if key not in spare}
    if problem := mismatches(expected, found):
        raise InputError(f"{hf_dir}: weights do not fit config.json: {problem}; use the two that belong together")
    odd = [f"{key} ({index.tensors[key].dtype})" for key in expected if index.tensors[key].dtype not in WEIGHT_DTYPES]
    if odd:
        raise InputError(f"{hf_dir}: {listing(odd)} must be bf16, fp16 or fp32; convert the directory first")
    return index


def _is_spare(key: str, layers: int) -> bool:
    """True for what a complete directory may hold beyond the model: MTP layers and rotary buffers."""
    return _is_mtp(key, layers) or key.endswith("rotary_emb.inv_freq")


def _is_mtp(key: str, layers: int) -> bool:
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return match is not None and int(match[1]) >= layers


def _check_tied(index: WeightIndex, rows: int = 4096) -> None:
    """Compare lm_head.weight with the embedding, `rows` rows at a time."""
    head, embedding = index.tensors["lm_head.weight"], index.tensors.get("model.embed_tokens.weight")
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or not all(
        torch.equal(index.read("lm_head.weight", part), index.read("model.embed_tokens.weight", part))
        for part in ((slice(i, i + rows),) for i in range(0, head.shape[0], rows))
    ):
        raise InputError(
            f"{index.directory}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there or remove lm_head.weight"
        )


def mismatches(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...] | None]) -> str:
    """What is missing, unexpected and of another shape, in words; empty where the two agree."""
    groups = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} ({found[key]} instead of {shape})" for key, shape in expected.items() if found.get(key, shape) != shape
        ],
    }
    return "; ".join(f"{len(keys)} {word}: {listing(keys)}" for word, keys in groups.items() if keys)


@torch.no_grad()
def load_weights(model: DeepseekV3, index: WeightIndex) -> int:
    """Fill all parameters and persistent buffers from a directory; each rank reads only the slices that it holds.

    Args:
        model: materialised, whole or the part that this rank holds; parameters are plain tensors or DTensors on any mesh (see
            `shard_box`). Values are converted to each parameter's dtype.
        index: from `check_weights` of the whole model.

    Returns:
        Bytes that this rank read.

    Raises:
        InputError: a tensor holds nan or inf.
    """
    tensors, pieces = _tensors_and_pieces(model)
    read = 0
    for name, tensor in tensors.items():
        box, local, filled = local_box(tensor), _local(tensor), 0
        for piece in pieces[name]:
            part = box & piece_box(piece)
            if part is None:
                continue
            values = index.read(piece.key, part.within(piece.start)[-len(piece.hf_shape) :])
            if not values.isfinite().all():
                raise InputError(f"{index.directory}: {piece.key} holds nan or inf; download or convert it again")
            local[part.within(box.start)].copy_(values)  # leading dims of size 1 broadcast
            filled += values.numel()
            read += values.nbytes
        if filled != local.numel():
            raise RuntimeError(f"{filled} of the {local.numel()} local elements of {name} were loaded")
    return read


@torch.no_grad()
def initialise_weights(
    model: DeepseekV3, seed: int, initial_value: Callable[[str, tuple[int, ...], DeepseekV3Config, int], Tensor]
) -> None:
    """Random weights that do not depend on the layout: each rank keeps its box of the full value of each tensor.

    Every rank draws every full tensor, which suits small models (a layer's stacked experts of V3 are 30 GB).

    Args:
        model: materialised, as in `load_weights`.
        initial_value: (name, global shape, model.config, seed) -> full value, fp32 on the CPU.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        box = local_box(tensor)
        full = initial_value(name, tuple(tensor.shape), model.config, seed)
        _local(tensor).copy_(full[box.within((0,) * tensor.ndim)])


def load_model(hf_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DeepseekV3:
    """Load a DeepSeek-V3-architecture model from a Hugging Face directory on this process alone, in eval mode.

    Args:
        dtype: of the parameters; the routing bias stays fp32.

    Raises:
        InputError: configuration or weights cannot be used (see `check_weights`).
    """
    with torch.device("meta"):
        model = DeepseekV3(DeepseekV3Config.from_hf(read_config(hf_dir))).to(dtype)  # fp32 buffers stay fp32
    index = check_weights(hf_dir, model)
    model.to_empty(device=device)
    model.init_buffers()
    load_weights(model, index)
    return model.eval()


# -------------------------------------------------------------------------------------------------------------- writing


@dataclass
class _Written:
    """One tensor of an export.

    Attributes:
        parts: which ranks hold which part of it (parameter coordinates); a part can lie on several ranks.
        name, piece: the parameter that it is a piece of; None for a tensor that is carried through from the source.
        owner: the rank that writes it, into `file`.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[Box, Sequence[int]]
    name: str | None = None
    piece: Piece | None = None
    owner: int = -1
    file: str = ""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return tensor_bytes(self.dtype, self.shape)


@torch.no_grad()
def export(
    model: DeepseekV3,
    out_dir: str | Path,
    dtype: torch.dtype,
    source_dir: str | Path,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write the model as a Hugging Face directory; collective over all ranks, or one process without a group.

    Parameters are written in `dtype`, the routing bias in fp32. MTP layers are carried through from `source_dir`
    unchanged (its rotary buffers and a duplicate of tied embeddings are not), as are generation config, tokenizer, chat
    templates and Python files; config.json is the source's with the new dtype. `source_dir` needs no weights.

    The ranks tell each other which box of each parameter they hold (2 KB a rank for V3); what there is to write, and which
    rank writes it, follows on each rank from that and the configuration. Each tensor is sent to the one rank that writes it,
    from the ranks that hold parts of it, tensor by tensor and straight into its file: a rank never holds more than its share
    of the model and the tensor in flight. `out_dir` appears, or is replaced, only when all ranks have finished.

    Args:
        model: what this rank holds, of a pipeline only some layers; all ranks together hold every tensor.
        out_dir: the directory to write.
        dtype: of the parameters in it.
        source_dir: the Hugging Face directory that the run began with.
        max_shard_bytes: size of a file, in bytes of tensors.

    Raises:
        InputError: `out_dir` is the source or something that is no model directory; see `read_config` and
            `WeightIndex`.
    """
    source, target = Path(source_dir), Path(out_dir)
    config = read_config(source)
    if target.resolve() == source.resolve():
        raise InputError(f"the export directory {target} is also its source; choose another one")
    if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
        raise InputError(f"{target} is not empty and holds no exported model; choose another directory for the export")
    rank, ranks = rank_and_size()
    has_weights = any(source.glob("*.safetensors"))
    source_index = WeightIndex(source) if has_weights else None
    tensors = model.state_dict(keep_vars=True)
    plan = _pieces_to_write(model.config, tensors, dtype)
    if source_index is not None:
        plan += _carried(source_index, model.config.num_hidden_layers, ranks)
    _choose_owners(plan, ranks)
    files = _lay_out(plan, ranks, max_shard_bytes)
    with published(target) as staging:
        if dist.is_initialized():
            # NCCL sets up its communicator in the first collective: all ranks must join that, while transfers need few.
            dist.all_reduce(next(map(_local, tensors.values())).new_zeros(1))
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    SafetensorsWriter(staging / name, {item.key: (item.dtype, item.shape) for item in members})
                )
                for name, members in files.items()
                if members[0].owner == rank
            }
            for item in plan:
                values = None
                if item.piece is None:
                    if item.owner == rank:
                        values = source_index.read_whole(item.key)
                elif item.name in tensors:
                    values = _gather(item, tensors[item.name], rank)
                if values is not None:
                    writers[item.file].write(item.key, values)
        if rank == 0:
            index = {
                "metadata": {"total_size": sum(item.bytes for item in plan)},
                "weight_map": {item.key: item.file for item in sorted(plan, key=lambda item: item.key)},
            }
            write_text(staging / INDEX, json.dumps(index, indent=2) + "\n")
            write_text(staging / "config.json", json.dumps(_exported_config(config, dtype), indent=2) + "\n")
            _copy_side_files(source, staging)


def _pieces_to_write(config: DeepseekV3Config, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[_Written]:
    """Every piece of every tensor of the whole model, in the same order on every rank; collective.

    Buffers keep their dtype: the routing bias is fp32 on every path.

    Args:
        tensors: what this rank holds.
    """
    with torch.device("meta"):
        whole, pieces = _tensors_and_pieces(DeepseekV3(config))
    if unknown := tensors.keys() - whole.keys():
        raise RuntimeError(f"{listing(sorted(unknown))} are no tensors of the model")
    # The layers of a model are alike: V3's 44,544 expert tensors have 768 different boxes.
    known: dict[tuple[Box | None, ...], dict[Box, dict[Box, list[int]]]] = {}
    plan = []
    for (name, tensor), box_of_rank in zip(whole.items(), _boxes_of_ranks(whole, tensors), strict=True):
        holders: dict[Box, list[int]] = {}
        for rank, box in enumerate(box_of_rank):
            if box is not None:
                holders.setdefault(box, []).append(rank)
        if sum(math.prod(box.shape) for box in holders) != tensor.numel():
            raise RuntimeError(f"the ranks do not hold each of the {tensor.numel()} elements of {name} once or in equal boxes")
        parts = known.setdefault(box_of_rank, {})
        for piece in pieces[name]:
            filled = piece_box(piece)
            if filled not in parts:
                common = {box & filled: ranks for box, ranks in holders.items()}
                parts[filled] = {box: ranks for box, ranks in common.items() if box is not None}
            kept = dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
            plan.append(_Written(piece.key, piece.hf_shape, kept, parts[filled], name, piece))
    return plan


def _boxes_of_ranks(names: Iterable[str], tensors: Mapping[str, Tensor]) -> Iterable[tuple[Box | None, ...]]:
    """For each name the box that each rank holds of it, by rank, or None where it holds none; collective."""
    held = [local_box(tensors[name]) if name in tensors else None for name in names]
    once = {box: box for box in held}  # of equal boxes one object, which pickle stores once
    return zip(*gather_objects([once[box] for box in held]), strict=True)


def _carried(index: WeightIndex, layers: int, ranks: int) -> list[_Written]:
    """The source's MTP tensors, which any rank can write."""
    plan = []
    for key, stored in index.tensors.items():
        if not _is_mtp(key, layers):
            continue
        if stored.dtype not in DTYPES:
            raise InputError(f"{index.directory}: {key} has dtype {stored.dtype}, which cannot be exported")
        whole = Box((0,) * len(stored.shape), stored.shape)
        plan.append(_Written(key, stored.shape, DTYPES[stored.dtype], {whole: list(range(ranks))}))
    return plan


def _choose_owners(plan: Sequence[_Written], ranks: int) -> None:
    """Give each tensor to the rank with the fewest bytes so far among those that hold a part of it.

    Tensors that few ranks hold come first, then large ones. So an expert is gathered only over the ranks that share it.
    """
    written = [0] * ranks
    holders = [sorted(set(itertools.chain.from_iterable(item.parts.values()))) for item in plan]
    for i in sorted(range(len(plan)), key=lambda i: (len(holders[i]), -plan[i].bytes, i)):
        plan[i].owner = min(holders[i], key=lambda rank: (written[rank], rank))
        written[plan[i].owner] += plan[i].bytes


def _lay_out(plan: Sequence[_Written], ranks: int, max_shard_bytes: float) -> dict[str, list[_Written]]:
    """Set `file` of each tensor; file name -> its tensors, all of one owner."""
    by_owner: list[list[_Written]] = [[] for _ in range(ranks)]
    for item in plan:
        by_owner[item.owner].append(item)
    groups: list[list[_Written]] = []
    for items in by_owner:
        size = math.inf
        for item in items:
            if size + item.bytes > max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(item)
            size += item.bytes
    files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}
    for name, group in files.items():
        for item in group:
            item.file = name
    return files


def _gather(item: _Written, tensor: Tensor, rank: int) -> Tensor | None:
    """Bring the parts of one tensor together on its owner, in the dtype in which it is written.

    Point to point, so that only the ranks that hold a part take part; of several copies of the model, the owner's own. All
    ranks go through the tensors in the same order.

    Args:
        tensor: this rank's part of the parameter.

    Returns:
        The whole box on the owner; None elsewhere.
    """
    local, origin = _local(tensor), local_box(tensor).start
    whole = local.new_empty(piece_box(item.piece).shape, dtype=item.dtype) if rank == item.owner else None
    transfers, arriving = [], []
    # Each part lies on as many ranks, one of each copy, in the order of the ranks.
    copy = next(holders.index(item.owner) for holders in item.parts.values() if item.owner in holders)
    for part, holders in item.parts.items():
        sender = holders[copy]
        if sender == rank:
            values = local[part.within(origin)].to(item.dtype)
            if whole is None:
                transfers.append(dist.P2POp(dist.isend, values.contiguous(), item.owner))
            else:
                whole[part.within(item.piece.start)].copy_(values)
        elif whole is not None:
            values = local.new_empty(part.shape, dtype=item.dtype)
            transfers.append(dist.P2POp(dist.irecv, values, sender))
            arriving.append((part, values))
    for work in dist.batch_isend_irecv(transfers) if transfers else ():
        work.wait()
    for part, values in arriving:
        whole[part.within(item.piece.start)].copy_(values)
    return whole


def _exported_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with the exported dtype, under the name(s) that it uses, and without a quantisation."""
    exported = {key: value for key, value in config.items() if key != "quantization_config"}
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return exported | dict.fromkeys(names, str(dtype).removeprefix("torch."))


def _copy_side_files(source: Path, target: Path) -> None:
    """Copy everything that is not weights: see SIDE_FILES."""
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
