"""Hugging Face directories: safetensors weights into a (sharded) model and back; each rank reads
and writes only its part.

A model says where each Hugging Face tensor lies in its parameters (`model.checkpoint_pieces()`): a
`Piece` fills a box of one parameter. A rank holds a box of each too. Everything here is
intersections of these boxes, in the parameter's coordinates.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchsft.checkpoint import hf_directory
from torchsft.checkpoint.boxes import Box, local_box, piece_box
from torchsft.checkpoint.endings import read_generation_config, with_ends, write_generation_config
from torchsft.checkpoint.hf_directory import (
    Kind,
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
    in_file_order,
    listing,
    size_of,
)
from torchsft.config import InputError
from torchsft.models.decoder import Piece, local
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.collectives import gather_objects, patient, rank_and_size
from torchsft.precision.formats import Format, Fp8Blocks


def check_weights(hf_dir: str | Path, model: LanguageModel) -> Weights:
    """Compare keys, shapes and dtypes of a Hugging Face or converted directory with what the model
    needs, from headers alone. Allowed although the model has no use for them: MTP layers and keys
    that no weight of the model could have (`export` carries both through), rotary `inv_freq`
    buffers, and an `lm_head.weight` that equals tied embeddings. `model`: whole, meta will do.

    Raises:
        InputError: keys that are missing, unexpected or of another shape, all named; dtypes but
            bf16, fp16, fp32 and fp8.
    """
    pieces, layers = model.checkpoint_pieces(), model.config.num_hidden_layers
    index, found = open_weights(hf_dir, pieces), {}
    shared = model.shared_keys()
    expected = {
        piece.key: piece.hf_shape for piece in itertools.chain.from_iterable(pieces.values())
    }
    for key, stored in index.tensors.items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            _check_tied(index)
        elif (
            hf_directory.is_model_key(key, model.depth)
            and key not in index.parts
            and key not in shared
        ):
            found[key] = stored.shape
    if problem := hf_directory.mismatches(expected, found):
        raise InputError(
            f"{hf_dir}: weights do not fit config.json: {problem}; use the two that belong together"
        )
    most = model.config.mtp_layers
    more = {
        key.partition("layers.")[2].partition(".")[0]
        for key in index.tensors
        if hf_directory.is_mtp(key, layers)
    }
    if most is not None and len(more) > most:
        raise InputError(
            f"{hf_dir} holds {layers + len(more)} layers, but its config.json has {layers} "
            f"num_hidden_layers and {most} MTP layers; use the two that belong together"
        )
    if odd := [
        f"{key} ({index.tensors[key].dtype})"
        for key in expected
        if key not in index.packed and index.tensors[key].dtype not in WEIGHT_DTYPES
    ]:
        raise InputError(
            f"{hf_dir}: {listing(odd)} must be bf16, fp16, fp32 or, as config.json describes it, "
            "fp8 (e4m3), INT4 or MXFP4; convert the directory first"
        )
    return index


def note_on_mtp(index: Weights, model: LanguageModel) -> str:
    """Say what it means if there are MTP layers that are kept; empty where there are none."""
    layers = model.config.num_hidden_layers
    if model.mtp != "keep" or not any(hf_directory.is_mtp(key, layers) for key in index.tensors):
        return ""
    return (
        "MTP layers are exported as they are: drafts of a server that uses them are accepted less "
        "often the more training changes the model, which slows it down; --model.mtp train trains "
        "them too"
    )


def check_moving_bias(index: Weights, model: LanguageModel) -> None:
    """Refuse a correction bias that training moves, but that an export, in the dtype of the source,
    would round.
    """
    pieces = model.checkpoint_pieces()
    for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
        for key in (piece.key for piece in pieces[name]):
            if (found := index.tensors[key].dtype) != "F32":
                raise InputError(
                    f"{index.directory}: {key} is {found}, which is too coarse for "
                    "--router.bias-update-rate; make it F32 or leave that option out"
                )


def _check_tied(index: Weights, rows: int = 4096) -> None:
    """Compare lm_head.weight with the embedding, `rows` rows at a time."""
    keys = "lm_head.weight", "model.embed_tokens.weight"
    head, embedding = map(index.tensors.get, keys)
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    parts = [(slice(i, i + rows),) for i in range(0, head.shape[0], rows)]
    if not same or not all(
        torch.equal(*(index.values(key, part) for key in keys)) for part in parts
    ):
        raise InputError(
            f"{index.directory}: lm_head.weight differs from model.embed_tokens.weight, but "
            "config.json ties them; set tie_word_embeddings to false there or remove "
            "lm_head.weight"
        )


@torch.no_grad()
def load_weights(model: LanguageModel, index: Weights) -> int:
    """Fill all parameters and persistent buffers, in their dtypes; each rank reads only what it
    holds. Returns bytes read. `model`: materialised, whole or the part that this rank holds; of
    plain tensors or DTensors (see `local_box`). `index`: from `check_weights` of the whole model. A
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


@dataclass(frozen=True)
class _Tensor:
    """One tensor of an export.

    Attributes:
        kind: the dtype or format in which it is exported.
        contents: what the file has of it: itself, or the parts of a format.
        parts: which ranks hold which part of it (parameter coordinates): one rank or several.
        name, piece: the parameter that it is a piece of; None for a tensor that is taken over from
            the source.
    """

    key: str
    kind: Kind
    contents: Contents
    parts: Mapping[Box, Sequence[int]]
    name: str | None = None
    piece: Piece | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return size_of(self.contents)

    @property
    def holders(self) -> set[int]:
        """The ranks that hold some of it."""
        return set(itertools.chain.from_iterable(self.parts.values()))


@dataclass(frozen=True)
class _File:
    """A file of an export: the rank that writes it, and its tensors in order."""

    name: str
    writer: int
    tensors: list[_Tensor]


@torch.no_grad()
def export(
    model: LanguageModel,
    out_dir: str | Path,
    dtype: str,
    source_dir: str | Path,
    ends: Iterable[int] = (),
    max_shard_bytes: float = 5e9,
    chat_template: str | None = None,
    through: torch.dtype = torch.float32,
) -> None:
    """Write the model as a Hugging Face directory; collective over all ranks, or one process
    without a group.

    MTP layers, unknown tensors and other files come from the source, and in formats of few bits the
    bytes of a group that still has its source's values. Each tensor is sent to the one rank that
    writes it, straight into its file: a rank holds its share of the model and the tensor in flight.
    `out_dir` appears, or is replaced, when all ranks have finished; a remote one is written in
    place, config.json last.

    Args:
        model: what this rank holds; all ranks together hold every tensor.
        out_dir: the directory to write, or the URL of a folder.
        dtype: of the parameters, a key of EXPORT_DTYPES (see `exported_kind`); the routing bias
            keeps the source's, fp32 in published ones.
        source_dir: the Hugging Face or converted directory that the run began with; its weights may
            be absent.
        ends: ids of the tokens that ended trained turns: the exported eos ids name them too.
        max_shard_bytes: size of a file, in bytes of tensors.
        chat_template: the text of one that replaces those of the source.
        through: of the weights that fp8 training quantised; an fp8 export quantises the same.

    Raises:
        SharedError: on every rank: one could not write; a local directory stays as it was. A rank
            that fails otherwise raises at once; the others wait until they are ended.
        InputError: `out_dir` is the source or no model directory; a source that cannot be used;
            what the format cannot hold.
    """
    source, target = Path(source_dir), Folder(out_dir)
    config = hf_directory.exported_config(read_config(source), dtype, model.mtp)
    config, generation = with_ends(config, read_generation_config(source), ends)
    check_target(source, target)
    kind = hf_directory.export_kind(config, dtype)
    if isinstance(kind, Fp8Blocks):
        kind = dataclasses.replace(kind, through=through)
    with torch.device("meta"):
        whole = model.family(model.config, mtp=model.mtp)
    held = model.state_dict(keep_vars=True)
    weights = open_weights(source, whole.checkpoint_pieces(), optional=True)
    tensors = in_file_order(
        [*_model_tensors(whole, held, weights, kind), *_carried_tensors(model, weights, kind)]
    )
    files = _assign(tensors, max_shard_bytes)
    with published(target) as folder:
        _write_files(folder, tensors, files, held, weights)
        if rank_and_size()[0] == 0:
            copy_side_files(source, folder, chat_template)
            folder.write_text(INDEX, json.dumps(_index(files), indent=2) + "\n")
            write_generation_config(generation, source, folder)
            folder.write_text("config.json", json.dumps(config, indent=2) + "\n")


def _model_tensors(
    whole: LanguageModel, held: Mapping[str, Tensor], weights: Weights | None, kind: Kind
) -> Iterator[_Tensor]:
    """Yield what is exported of the model's own tensors; collective.

    Args:
        whole: the whole model, on meta.
        held: the tensors of the part that this rank holds.
    """
    constants = whole.constants()
    pieces = whole.checkpoint_pieces(weights.tensors if weights else ())
    for name, piece, parts in _pieces_and_holders(whole, held, pieces):
        of_piece = hf_directory.exported_kind(
            piece.key,
            kind,
            weights,
            constant=name in constants,
            quantised=whole.is_quantised(piece.key),
        )
        contents = contents_of(piece.key, of_piece, piece.hf_shape)
        yield _Tensor(piece.key, of_piece, contents, parts, name, piece)


def _carried_tensors(
    model: LanguageModel, weights: Weights | None, kind: Kind
) -> Iterator[_Tensor]:
    """Yield what is exported of the source's tensors for which the model has no place. Any rank can
    write them.
    """
    if weights is None:
        return
    _, ranks = rank_and_size()
    for key in _carried(weights, model):
        of_key = hf_directory.carried_kind(key, kind, weights, quantised=model.is_quantised(key))
        contents = contents_of(key, of_key, weights.tensors[key].shape)
        yield _Tensor(key, of_key, contents, {Box((), ()): range(ranks)})


def _merged(tensors: Iterable[_Tensor]) -> Contents:
    """Return the contents of all tensors."""
    return {key: entry for tensor in tensors for key, entry in tensor.contents.items()}


def _index(files: Sequence[_File]) -> dict[str, Any]:
    """Return the content of the index file."""
    places = {key: file.name for file in files for key in _merged(file.tensors)}
    total = sum(tensor.size for file in files for tensor in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _write_files(
    folder: Folder,
    tensors: Sequence[_Tensor],
    files: Sequence[_File],
    held: Mapping[str, Tensor],
    weights: Weights | None,
) -> None:
    """Gather one tensor after another on the rank that writes it, which does; collective."""
    rank, _ = rank_and_size()
    file_of = {tensor.key: file for file in files for tensor in file.tensors}

    def gathered() -> Iterator[tuple[_Tensor, Tensor | None]]:
        for tensor in tensors:
            own = held.get(tensor.name)
            writer = file_of[tensor.key].writer
            yield tensor, None if own is None else _gather(tensor, own, writer)

    arriving = gathered()
    with together(), patient():  # senders wait for what their writer writes before
        try:
            with ExitStack() as stack:
                current = None
                for tensor, values in arriving:
                    file = file_of[tensor.key]
                    if file.writer != rank:
                        continue
                    if file is not current:  # a rank's files come one after another
                        stack.close()
                        current, contents = file, _merged(file.tensors)
                        writer = SafetensorsWriter(folder, file.name, contents)
                        output = stack.enter_context(writer)
                    for key, part in _encoded(tensor, values, weights).items():
                        output.write(key, part)
        except OSError:
            for _ in arriving:  # the other ranks still send and receive
                pass
            raise


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


def _pieces_and_holders(
    model: LanguageModel, tensors: Mapping[str, Tensor], pieces: Mapping[str, Sequence[Piece]]
) -> Iterator[tuple[str, Piece, dict[Box, list[int]]]]:
    """Of the whole `model` (on meta) each parameter's name, its `pieces`, and which ranks hold
    which part of a piece; collective, and in the same order on every rank. `tensors`: what this
    rank holds.
    """
    whole = model.state_dict()
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


def _carried(weights: Weights, model: LanguageModel) -> list[str]:
    """Return the keys of the source's tensors for which the model has no place; the first rank
    prints a note of unknown ones.
    """
    keys, unknown = hf_directory.carried_keys(weights, model.depth, model.mtp == "drop")
    if unknown and rank_and_size()[0] == 0:
        print(
            f"note: unknown tensors of {weights.directory} are taken over as they are: "
            f"{listing(unknown)}",
            flush=True,
        )
    return keys


def _choose_writers(tensors: Iterable[_Tensor]) -> dict[str, int]:
    """Choose the rank that writes each tensor: of those that hold some of it, the one with the
    fewest bytes so far. Tensors that few ranks hold come first (so an expert is gathered only over
    them), then large ones.
    """
    load: Counter[int] = Counter()
    writers = {}
    held = [(tensor.holders, tensor.size, tensor.key) for tensor in tensors]
    for ranks, size, key in sorted(held, key=lambda each: (len(each[0]), -each[1])):
        writer = min(ranks, key=lambda rank: (load[rank], rank))
        writers[key] = writer
        load[writer] += size
    return writers


def _assign(tensors: Sequence[_Tensor], max_shard_bytes: float) -> list[_File]:
    """Choose which rank writes each tensor, and put it into files."""
    writers = _choose_writers(tensors)
    groups: list[tuple[int, list[_Tensor]]] = []  # a writer, and the tensors of one of its files
    size = 0
    for tensor in sorted(tensors, key=lambda tensor: writers[tensor.key]):
        writer = writers[tensor.key]
        same_writer = bool(groups) and groups[-1][0] == writer
        if not same_writer or size + tensor.size > max_shard_bytes:
            groups.append((writer, []))
            size = 0
        groups[-1][1].append(tensor)
        size += tensor.size
    return [
        _File(f"model-{number:05d}-of-{len(groups):05d}.safetensors", *group)
        for number, group in enumerate(groups, start=1)
    ]


def _gather(tensor: _Tensor, own: Tensor, writer: int) -> Tensor | None:
    """Return the whole of one tensor on the rank that writes it, in the dtype in which it is
    written, or fp32 for a format of few bits; None on the other ranks. Point to point between the
    ranks that hold a part; of several copies of the model, in the writer's own.

    Args:
        own: this rank's part of the parameter.
    """
    rank, _ = rank_and_size()
    mine, origin = local(own), local_box(own).start
    dtype = tensor.kind if isinstance(tensor.kind, torch.dtype) else torch.float32
    whole = None
    if rank == writer:
        whole = mine.new_empty(piece_box(tensor.piece).shape, dtype=dtype)
    transfers, arriving = [], []
    # Each part lies on as many ranks, one of each copy, in the order of the ranks.
    copy = next(ranks.index(writer) for ranks in tensor.parts.values() if writer in ranks)
    for part, ranks in tensor.parts.items():
        sender = ranks[copy]
        place = None if whole is None else whole[part.within(tensor.piece.start)]
        if sender == rank:
            values = mine[part.within(origin)].to(dtype)
            if place is None:
                transfers.append(dist.P2POp(dist.isend, values.contiguous(), writer))
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


def _encoded(tensor: _Tensor, values: Tensor | None, weights: Weights | None) -> dict[str, Tensor]:
    """Return what is written of a tensor, by key: `values` (None: those of the source's `weights`),
    in a format of few bits with scales, of which those of the source are kept where they still give
    the values exactly.
    """
    key, kind = tensor.key, tensor.kind
    if isinstance(kind, torch.dtype):
        values = weights.values(key, ()) if values is None else values
        return {key: values.to(kind)}
    known = known_scales(weights, key, kind, tensor.contents)
    if values is None:
        if known is not None and tensor.contents.keys() <= weights.tensors.keys():
            return {part: weights.read_whole(part) for part in tensor.contents}
        values = weights.values(key, ())
    shape = tensor.piece.hf_shape if tensor.piece is not None else weights.tensors[key].shape
    known = None if known is None else known.to(values.device)
    encoded = kind.encode(values.float().reshape(shape), known, key)
    return kind.constants(key, shape) | encoded


def known_scales(
    weights: Weights | None, key: str, form: Format, contents: Contents
) -> Tensor | None:
    """Return the scales with which the source has a weight; None if it has it otherwise."""
    if weights is None or type(weights.packed.get(key)) is not type(form):
        return None
    known = weights.scales(key)
    return known if tuple(known.shape) == contents[key + form.scales][1] else None
