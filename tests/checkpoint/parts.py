"""What the ranks do in test_parts.py. Without `transformers`, whose import costs each rank
seconds.
"""

from __future__ import annotations

import os

import torch
from torch.distributed.tensor import DTensor

from tests.checkpoint.layouts import (
    checkpoint,
    everything,
    optimizer_for,
    update,
    watched_export,
    whole,
)
from torchsft.checkpoint import huggingface, state
from torchsft.config import InputError, Parallel
from torchsft.models.families import build_model, read_model_config
from torchsft.parallel.apply import parallelize
from torchsft.parallel.pipeline import reshard_after_forward, split
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.world import World


def build(source, parallel, world, **changes):
    """The part of the model that this rank holds, built as the trainer does; its memory is
    garbage.
    """
    config = huggingface.read_config(source) | changes
    plan = plan_stages(parallel, read_model_config(config), microbatches=8)
    pp_rank = world.dense.get_local_rank("pp")
    with torch.device("meta"):
        model = build_model(config, **plan.model_part(pp_rank))
        stages = split(model, plan, pp_rank)
    parallelize(stages, world, torch.float32, reshard_after_forward=reshard_after_forward(parallel))
    for stage in stages:
        stage.to_empty(device="cpu")
    model.init_buffers()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    return model


def meta_model(source):
    """The whole model that a directory describes, without memory."""
    with torch.device("meta"):
        return build_model(huggingface.read_config(source))


def load(source, model):
    return huggingface.load_weights(model, huggingface.check_weights(source, meta_model(source)))


def weights(source, work, name, dtype="bf16", **axes):
    """Load, export and initialise; the whole tensors of this rank's part each time, bytes read and
    written, and peers.
    """
    parallel = Parallel(**axes, timeout_seconds=60)
    with World(parallel, 0) as world:
        model = build(source, parallel, world)
        seen = {"read": load(source, model), "loaded": whole(model.state_dict())}
        # of experts that a rank shares with no other there are none
        seen["placements"] = {
            name: str(tensor.placements)
            for name, tensor in model.named_parameters()
            if isinstance(tensor, DTensor)
        }
        seen |= watched_export(model, f"{work}/{name}/hf", dtype, source, max_shard_bytes=30_000)
        huggingface.initialise_weights(model, 7)
        seen["initial"] = whole(model.state_dict())
        return seen


def save(source, directory, **axes):
    """Two updates and a checkpoint; parameters, buffers and moments of this rank's part."""
    parallel = Parallel(**axes, timeout_seconds=60)
    with World(parallel, 0) as world:
        model = build(source, parallel, world)
        load(source, model)
        optimizer = optimizer_for(model)
        update(model, optimizer, 2)
        torch.manual_seed(100 + world.rank)
        checkpoint(directory, world, model, optimizer)
        return whole(everything(model, optimizer)), torch.rand(3)


def restore(source, directory, **axes):
    """What a checkpoint made of this rank's part, another update of it, and a random number."""
    parallel = Parallel(**axes, timeout_seconds=60)
    with World(parallel, 0) as world:
        model = build(source, parallel, world)
        optimizer = optimizer_for(model)
        torch.manual_seed(0)
        assert state.load(state.find_latest(directory)[0], model, optimizer) == {"step": 2}
        drawn, restored = torch.rand(3), whole(everything(model, optimizer))
        update(model, optimizer, 1)
        return restored, whole(everything(model, optimizer)), drawn


def refusals(source, directory, models, **axes):
    """The sentences with which a checkpoint of another model is refused; `models`: what differs in
    each.
    """
    parallel = Parallel(**axes, timeout_seconds=60)
    sentences = []
    with World(parallel, 0) as world:
        for changes in models:
            model = build(source, parallel, world, **changes)
            try:
                state.load(state.find_latest(directory)[0], model, optimizer_for(model))
            except InputError as error:
                sentences.append(str(error))
    return sentences


def bytes_of(directory):
    """Size of a checkpoint's tensors on the disk."""
    return sum(
        entry.stat().st_size
        for entry in os.scandir(state.find_latest(directory)[0])
        if entry.name.endswith(".distcp")
    )
