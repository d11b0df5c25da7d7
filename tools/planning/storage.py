"""What a run keeps outside of GPUs: the host's copy of a checkpoint, and what is written to disk.

Sizes are those of the tensors that are written (torchsft/checkpoint/), which the meta device knows
without memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchsft.checkpoint.hf_directory import (
    check_export,
    contents_of,
    export_kind,
    exported_config,
    exported_kind,
)
from torchsft.checkpoint.weight_files import size_of
from torchsft.config import Checkpoint, Config, Optim
from torchsft.models.decoder import local
from torchsft.models.families import family_of, read_model_config
from torchsft.models.language_model import LanguageModel
from torchsft.parallel.memory import FP32, moment_bytes, pinned_bytes


def checkpoint_tensors(model: LanguageModel, optim: Optim) -> Iterator[tuple[Tensor, float]]:
    """Yield each tensor of a checkpoint, and its bytes for each element: of moments the parameter,
    in place of each of them; a parameter's step count is left out.

    Args:
        model: a rank's part, sharded; on any device.
        optim: of the run.
    """
    matrices = model.matrices() if optim.kind == "muon" else {}
    tensors = model.state_dict(keep_vars=True)
    if not model.first:  # MTP layers have a copy of the embedding, which the first stage writes
        tensors.pop("model.embed_tokens.weight", None)
    for name, tensor in tensors.items():
        yield tensor, tensor.dtype.itemsize
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            is_muons = name in matrices
            moments = 1 if is_muons else 2
            for _ in range(moments):
                yield tensor, moment_bytes(optim, tensor, is_muons) / moments


def checkpoint_bytes(model: LanguageModel, optim: Optim) -> int:
    """Count the bytes of a checkpoint that all ranks with this part of the model write together."""
    steps = sum(FP32 for parameter in model.parameters() if parameter.requires_grad)
    return steps + math.ceil(
        sum(each * tensor.numel() for tensor, each in checkpoint_tensors(model, optim))
    )


def copied_bytes(model: LanguageModel, optim: Optim, ranks: int) -> int:
    """Count the host memory that a rank's copy of what it writes takes, on average over `ranks`,
    which have this part of the model (torchsft/checkpoint/planning.py::HostStager).

    Of several ranks that hold the same, one copies it. What comes from a GPU is pinned.
    """
    total = 0.0
    for tensor, each in checkpoint_tensors(model, optim):
        size = math.ceil(each * local(tensor.detach()).numel())
        total += pinned_bytes(size, not optim.offload) * _parts(tensor) / ranks
    return math.ceil(total)


def _parts(tensor: Tensor) -> int:
    """Return in how many different parts ranks hold a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def checkpoints_kept(options: Checkpoint, steps: int | None) -> int | None:
    """Return how many checkpoints there are at most at one time, with the one that is being
    written; None: as many as are written, and nobody knows how many steps there will be.
    """
    every = options.every or steps
    written = steps and -(-steps // every)
    if (not options.keep or options.keep_every) and written is None:
        return None
    if not options.keep:
        return written
    kept = options.keep + options.keep_best + 1
    if options.keep_every:
        kept += steps // options.keep_every
    return kept if written is None else min(kept, written)


def export_bytes(config: Config, model_config: Mapping[str, Any]) -> int:
    """Count the bytes of an export's tensors; MTP layers that are not trained are taken over.

    Raises:
        InputError: a model of this kind is not exported in that format.
    """
    export, mtp = config.checkpoint.export, config.model.mtp
    if export == "none":
        return 0
    check_export(model_config, config)
    kind = export_kind(exported_config(model_config, export, mtp), export)
    read = read_model_config(model_config)
    with torch.device("meta"):
        whole = family_of(model_config)(
            read, mtp="train" if read.mtp_layers and mtp == "keep" else mtp
        )
    constants, total = whole.constants(), 0
    for name, pieces in whole.checkpoint_pieces().items():
        for piece in pieces:
            quantised = whole.is_quantised(piece.key)
            of_piece = exported_kind(
                piece.key, kind, None, constant=name in constants, quantised=quantised
            )
            total += size_of(contents_of(piece.key, of_piece, piece.hf_shape))
    return total
