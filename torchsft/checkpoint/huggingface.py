"""Hugging Face directories: safetensors weights into a (sharded) model and back; each rank reads
and writes only its part.

A model says where each Hugging Face tensor lies in its parameters (`model.checkpoint_pieces()`): a
`Piece` fills a box of one parameter. A rank holds a box of each too. Everything here is
intersections of these boxes, in the parameter's coordinates.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from torchsft.checkpoint import hf_directory
from torchsft.checkpoint.boxes import Box, local_box, piece_box, share_out
from torchsft.checkpoint.endings import read_generation_config, with_ends, write_generation_config
from torchsft.checkpoint.hf_directory import (
    Weights,
    contents_of,
    copy_side_files,
    open_weights,
    read_config,
)
from torchsft.checkpoint.publish import published, together
from torchsft.checkpoint.storage import Folder
from torchsft.checkpoint.stored import WEIGHT_DTYPES
from torchsft.checkpoint.weight_files import (
    INDEX,
    Contents,
    SafetensorsWriter,
    file_order,
    listing,
    size_of,
)
from torchsft.config import InputError
from torchsft.models.decoder import Piece, local
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.collectives import gather_objects, rank_and_size
from torchsft.precision.blockwise import BLOCK, SCALE_SUFFIX, quantise, scale_key, scale_shape

FP8 = torch.float8_e4m3fn


def check_weights(hf_dir: str | Path, model: LanguageModel) -> Weights:
    """Compare keys, shapes and dtypes of a Hugging Face or converted directory with what the model
    needs, from headers alone. Allowed although the model has no use for them: MTP layers and keys
    that no weight of the model could have (`export` carries both through), rotary `inv_freq`
    buffers, and an `lm_head.weight` that equals tied embeddings. `model`: whole, meta will do.
    An InputError: keys that are missing, unexpected or of another shape, all named; dtypes but
    bf16, fp16, fp32 and fp8.
    """
    pieces, layers = model.checkpoint_pieces(), model.config.num_hidden_layers
    index, found = open_weights(hf_dir, pieces), {}
    expected = {
        piece.key: piece.hf_shape for piece in itertools.chain.from_iterable(pieces.values())
    }
    for key, stored in index.tensors.items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            _check_tied(index)
        elif hf_directory.is_model_key(key, layers) and not key.endswith(SCALE_SUFFIX):
            found[key] = stored.shape
    if problem := hf_directory.mismatches(expected, found):
        raise InputError(
            f"{hf_dir}: weights do not fit config.json: {problem}; use the two that belong together"
        )
    most = model.config.mtp_layers
    more = {key.split(".")[2] for key in index.tensors if hf_directory.is_mtp(key, layers)}
    if most is not None and len(more) > most:
        said = (
            f"{layers} num_hidden_layers and {most} num_nextn_predict_layers; use the two that "
            f"belong together"
        )
        raise InputError(
            f"{hf_dir} holds {layers + len(more)} layers, but its config.json has {said}"
        )
    if odd := [
        f"{key} ({index.tensors[key].dtype})"
        for key in expected
        if index.tensors[key].dtype not in WEIGHT_DTYPES
    ]:
        raise InputError(
            f"{hf_dir}: {listing(odd)} must be bf16, fp16, fp32 or fp8 (e4m3); "
            f"convert the directory first"
        )
    return index


def _check_tied(index: Weights, rows: int = 4096) -> None:
    """Compare lm_head.weight with the embedding, `rows` rows at a time."""
    keys = "lm_head.weight", "model.embed_tokens.weight"
    head, embedding = map(index.tensors.get, keys)
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    parts = [(slice(i, i + rows),) for i in range(0, head.shape[0], rows)]
    if not same or not all(
        torch.equal(*(index.values(key, part) for key in keys)) for part in parts
    ):
        fault = "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them"
        raise InputError(
            f"{index.directory}: {fault}; set tie_word_embeddings to false there or "
            f"remove lm_head.weight"
        )


@torch.no_grad()
def load_weights(model: LanguageModel, index: Weights) -> int:
    """Fill all parameters and persistent buffers, in their dtypes; each rank reads only what it
    holds. Returns bytes read. `model`: materialised, whole or the part that this rank holds; of
    plain tensors or DTensors (see `shard_box`). `index`: from `check_weights` of the whole model. A
    tensor that holds nan or inf is an InputError.
    """
    pieces, before = model.checkpoint_pieces(), index.bytes_read
    # Not `named_parameters`: the hooks of `state_dict` put FSDP's parameters back into their
    # shards.
    for name, tensor in model.state_dict(keep_vars=True).items():
        box, mine, filled = local_box(tensor), local(tensor), 0
        for piece in pieces[name]:
            if (part := box & piece_box(piece)) is None:
                continue
            values = index.values(piece.key, part.within(piece.start)[-len(piece.hf_shape) :])
            # nan is both; isfinite is 10 times slower
            if not all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):
                raise InputError(
                    f"{index.directory}: {piece.key} holds nan or inf; download or convert it again"
                )
            mine[part.within(box.start)].copy_(values)  # leading dims of size 1 broadcast
            filled += values.numel()
        if filled != mine.numel():
            raise RuntimeError(
                f"{filled} of the {mine.numel()} local elements of {name} were loaded"
            )
    return index.bytes_read - before


@torch.no_grad()
def initialise_weights(model: LanguageModel, seed: int) -> None:
    """Random weights that do not depend on the layout: each rank keeps its box of the full value of
    each tensor. Every rank draws every full tensor, which suits small models (a layer's stacked
    experts of V3 are 30 GB).
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        full = model.initial_value(name, tuple(tensor.shape), seed)
        local(tensor).copy_(full[local_box(tensor).within((0,) * tensor.ndim)])


def load_model(
    hf_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LanguageModel:
    """Load a model from a directory on this process alone, in eval mode;
    the routing bias stays fp32. What cannot be used is an InputError (see `read_config` and
    `check_weights`).
    """
    with torch.device("meta"):
        # fp32 buffers stay fp32
        model = build_model(read_config(hf_dir)).to(dtype)
    index = check_weights(hf_dir, model)
    model.to_empty(device=device)
    model.init_buffers()
    load_weights(model, index)
    return model.eval()


@dataclass
class _Written:
    """One tensor of an export."""

    key: str
    contents: Contents  # what it is in the file, in fp8 its scales too
    # which ranks hold which part of it (parameter coordinates): one rank or several
    parts: Mapping[Box, Sequence[int]]
    # the parameter that it is a piece of; None for a tensor that is carried through from the source
    name: str | None = None
    piece: Piece | None = None
    owner: int = -1  # the rank that writes it
    file: int = -1  # the number of the file


@torch.no_grad()
def export(
    model: LanguageModel,  # what this rank holds; all ranks together hold every tensor
    out_dir: str | Path,  # the directory to write, or the URL of a folder
    # of the parameters (see `exported_dtype`); the routing bias keeps the source's, fp32 in
    # published ones
    dtype: torch.dtype,
    # the Hugging Face or converted directory that the run began with; its weights may be absent
    source_dir: str | Path,
    # ids of the tokens that ended trained turns: the exported eos ids name them too
    ends: Iterable[int] = (),
    max_shard_bytes: float = 5e9,  # size of a file, in bytes of tensors
    chat_template: str | None = None,  # the text of one that replaces those of the source
) -> None:
    """Write the model as a Hugging Face directory; collective over all ranks, or one process
    without a group.

    MTP layers, unknown tensors and other files come from the source, and in fp8
    (torch.float8_e4m3fn) the bytes of a block that still has its source's values. Each tensor is
    sent to the one rank that writes it, straight into its file: a rank holds its share of the model
    and the tensor in flight. `out_dir` appears, or is replaced, when all ranks have finished; a
    remote one is written in place, config.json last. A SharedError, on every rank: one could not
    write; a local directory stays as it was. A rank that fails otherwise raises at once; the others
    wait until they are ended. An InputError: `out_dir` is the source or no model directory; a
    source that cannot be used; what fp8 cannot hold.
    """
    source, target = Path(source_dir), Folder(out_dir)
    exported = hf_directory.exported_config(read_config(source), dtype)
    exported, generation = with_ends(exported, read_generation_config(source), ends)
    check_target(source, target)
    rank, ranks = rank_and_size()
    block, power_of_two = hf_directory.fp8_format(exported) if dtype == FP8 else (BLOCK, False)
    with torch.device("meta"):
        whole = model.family(model.config)
    tensors, buffers = model.state_dict(keep_vars=True), dict(whole.named_buffers())
    weights = open_weights(source, whole.checkpoint_pieces(), optional=True)
    plan = []
    for name, piece, parts in _pieces_and_holders(whole, tensors):
        kept = hf_directory.exported_dtype(
            piece.key,
            dtype,
            weights,
            buffer=name in buffers,
            quantised=model.is_quantised(piece.key),
        )
        plan.append(
            _Written(
                piece.key, contents_of(piece.key, kept, piece.hf_shape, block), parts, name, piece
            )
        )
    for key in _carried(weights, model.config.num_hidden_layers) if weights is not None else ():
        kept = hf_directory.carried_dtype(key, dtype, weights, quantised=model.is_quantised(key))
        contents = contents_of(key, kept, weights.tensors[key].shape, block)
        plan.append(_Written(key, contents, {Box((), ()): range(ranks)}))  # any rank can write it
    items, contents = {item.key: item for item in plan}, _merged(plan)
    plan = [items[key] for key in file_order(contents) if key in items]
    files = _assign(plan, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    with published(target) as folder:
        if dist.is_initialized():
            # NCCL sets up its communicator in the first collective: all ranks must join that, while
            # transfers need few.
            dist.all_reduce(next(map(local, tensors.values())).new_zeros(1))
        gathered = (
            (item, _gather(item, tensors[item.name], rank) if item.name in tensors else None)
            for item in plan
        )
        with together():
            try:
                with ExitStack() as stack:
                    writing = -1
                    for item, values in gathered:
                        if item.owner != rank:
                            continue
                        if item.file != writing:  # a rank's files come one after another
                            stack.close()
                            writing = item.file
                            writer = stack.enter_context(
                                SafetensorsWriter(folder, names[writing], _merged(files[writing]))
                            )
                        for key, part in _encoded(
                            item, values, block, power_of_two, weights
                        ).items():
                            writer.write(key, part)
            except OSError:
                for _ in gathered:  # the other ranks still send and receive
                    pass
                raise
        if rank == 0:
            weight_map = {key: names[item.file] for item in plan for key in item.contents}
            index = {
                "metadata": {"total_size": size_of(contents)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            copy_side_files(source, folder, chat_template)
            folder.write_text(INDEX, json.dumps(index, indent=2) + "\n")
            write_generation_config(generation, source, folder)
            folder.write_text("config.json", json.dumps(exported, indent=2) + "\n")


def check_target(source: Path, target: Folder) -> None:
    """Refuse to replace the source, or a directory that is no exported model."""
    if not target.remote and target.path.resolve() == source.resolve():
        raise InputError(f"the export directory {target} is also its source; choose another one")
    names = target.names()
    # The weights of an interrupted export lie in a remote folder without config.json.
    unfinished = target.remote and any(name.endswith(".safetensors") for name in names)
    if names and "config.json" not in names and not unfinished:
        raise InputError(
            f"{target} is not empty and holds no exported model; choose another "
            f"directory for the export"
        )


def _merged(items: Iterable[_Written]) -> Contents:
    return {key: entry for item in items for key, entry in item.contents.items()}


def _pieces_and_holders(
    model: LanguageModel, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Piece, dict[Box, list[int]]]]:
    """Of the whole `model` (on meta) each parameter's name, its pieces, and which ranks hold which
    part of a piece; collective, and in the same order on every rank. `tensors`: what this rank
    holds.
    """
    whole, pieces = model.state_dict(), model.checkpoint_pieces()
    if unknown := tensors.keys() - whole.keys():
        raise RuntimeError(f"{listing(sorted(unknown))} are no tensors of the model")
    held = [local_box(tensors[name]) if name in tensors else None for name in whole]
    # of equal boxes one object, which pickle stores once: 2 KB a rank for V3
    once = {box: box for box in held}
    boxes = zip(*gather_objects([once[box] for box in held]), strict=True)
    # The layers of a model are alike: V3's 44,544 expert tensors have 768 different boxes.
    known: dict[tuple[Box | None, ...], dict[Box, dict[Box, list[int]]]] = {}
    for (name, tensor), box_of_rank in zip(whole.items(), boxes, strict=True):
        holders: dict[Box, list[int]] = {}
        for rank, box in enumerate(box_of_rank):
            if box is not None:
                holders.setdefault(box, []).append(rank)
        if sum(math.prod(box.shape) for box in holders) != tensor.numel():
            raise RuntimeError(
                f"the ranks do not hold each of the {tensor.numel()} elements of "
                f"{name} once or in equal boxes"
            )
        parts = known.setdefault(box_of_rank, {})
        for piece in pieces[name]:
            filled = piece_box(piece)
            if filled not in parts:
                parts[filled] = {
                    part: ranks
                    for box, ranks in holders.items()
                    if (part := box & filled) is not None
                }
            yield name, piece, parts[filled]


def _carried(weights: Weights, layers: int) -> list[str]:
    """The source's tensors for which the model has no place; of unknown ones the first rank
    tells.
    """
    keys = [
        key
        for key in weights.tensors
        if hf_directory.is_carried(key, layers) and not key.endswith(SCALE_SUFFIX)
    ]
    unknown = [key for key in keys if not hf_directory.is_mtp(key, layers)]
    if unknown and rank_and_size()[0] == 0:
        print(
            f"note: unknown tensors of {weights.directory} are taken over as they are: "
            f"{listing(unknown)}",
            flush=True,
        )
    return keys


def _assign(plan: Sequence[_Written], max_shard_bytes: float) -> list[list[_Written]]:
    """Set `owner` and `file` of each tensor; the tensors of each file."""
    sizes = {item.key: size_of(item.contents) for item in plan}
    holders = {item.key: set(itertools.chain.from_iterable(item.parts.values())) for item in plan}
    owners = share_out({key: (size, holders[key]) for key, size in sizes.items()})
    files: list[list[_Written]] = []
    owner, size = -1, 0
    for item in sorted(plan, key=lambda item: owners[item.key]):
        item.owner = owners[item.key]
        if item.owner != owner or size + sizes[item.key] > max_shard_bytes:
            files.append([])
            owner, size = item.owner, 0
        files[-1].append(item)
        item.file = len(files) - 1
        size += sizes[item.key]
    return files


def _gather(item: _Written, tensor: Tensor, rank: int) -> Tensor | None:
    """The whole of one tensor on its owner, in the dtype in which it is written, for fp8 in fp32;
    None on the other ranks. Point to point between the ranks that hold a part (`tensor`); of
    several copies of the model, in the owner's own.
    """
    mine, origin, dtype = local(tensor), local_box(tensor).start, item.contents[item.key][0]
    dtype = torch.float32 if dtype == FP8 else dtype
    whole = mine.new_empty(piece_box(item.piece).shape, dtype=dtype) if rank == item.owner else None
    transfers, arriving = [], []
    # Each part lies on as many ranks, one of each copy, in the order of the ranks.
    copy = next(
        holders.index(item.owner) for holders in item.parts.values() if item.owner in holders
    )
    for part, holders in item.parts.items():
        sender = holders[copy]
        place = None if whole is None else whole[part.within(item.piece.start)]
        if sender == rank:
            values = mine[part.within(origin)].to(dtype)
            if place is None:
                transfers.append(dist.P2POp(dist.isend, values.contiguous(), item.owner))
            else:
                place.copy_(values)
        elif place is not None:
            # rows arrive where they belong
            values = place if place.is_contiguous() else place.new_empty(place.shape)
            transfers.append(dist.P2POp(dist.irecv, values, sender))
            arriving.append((place, values))
    for work in dist.batch_isend_irecv(transfers) if transfers else ():
        work.wait()
    for place, values in arriving:
        place.copy_(values)
    return whole


def _encoded(
    item: _Written,
    values: Tensor | None,
    block: tuple[int, int],
    power_of_two: bool,
    weights: Weights | None,
) -> dict[str, Tensor]:
    """What is written of a tensor, by key: `values` (None: those of the source's `weights`), in fp8
    with scales, of which those of the source are kept where they still give the values exactly.
    """
    dtype, shape = item.contents[item.key]
    known = weights.scales(item.key) if dtype == FP8 and weights is not None else None
    if values is None:
        if known is not None:  # in fp8 here and there
            return {item.key: weights.read_whole(item.key), scale_key(item.key): known}
        values = weights.values(item.key, ())
    if dtype != FP8:
        return {item.key: values.to(dtype)}
    same_model = known is not None and known.shape == scale_shape(shape, block)
    known = known.to(values.device) if same_model else None
    q, scale = quantise(values.float().reshape(shape), block, power_of_two, known, item.key)
    return {item.key: q, scale_key(item.key): scale}
