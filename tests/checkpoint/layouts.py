"""What the ranks do in test_sharded.py. Without `transformers`, whose import costs each rank
seconds.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

import torchsft
from torchsft.checkpoint import huggingface, state
from torchsft.checkpoint.weight_files import SafetensorsWriter
from torchsft.config import Optim, Parallel
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.optim.adamw import build_optimizer
from torchsft.parallel.apply import parallelize
from torchsft.parallel.groups import make_meshes
from torchsft.parallel.world import World

RANKS = 4
LAYOUTS = (1, 2, 4)  # sizes of ep


def build(source, world, ep):
    """A materialised model whose memory is garbage."""
    sizes = {"expert": {"pp": 1, "dp_replicate": 1, "edp": RANKS // ep, "ep": ep}}
    world.expert = make_meshes(sizes, "cpu", timedelta(seconds=60))["expert"]
    with torch.device("meta"):
        model = DeepseekV3(DeepseekV3Config.from_hf(huggingface.read_config(source)))
    parallelize([model], world, torch.float32)
    model.to_empty(device="cpu")
    model.init_buffers()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    return model


def update(model, optimizer, steps):
    """Steps with gradients that follow from the weights alone, so that every layout makes the same
    ones.
    """
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() / 2
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Parameters, buffers and moments by name."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}:{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def whole(tensors):
    """Copies of whole tensors, on every rank."""
    return {
        k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for k, t in tensors.items()
    }


def differing(tensors, whole, rtol=0.0, atol=0.0):
    """Names whose local shards differ from the ones that DTensor itself cuts from whole tensors."""
    assert tensors.keys() == whole.keys()
    names = []
    for name, tensor in tensors.items():
        expected = whole[name]
        if isinstance(tensor, DTensor):
            expected = distribute_tensor(
                expected, tensor.device_mesh, tensor.placements, src_data_rank=None
            ).to_local()
            tensor = tensor.to_local()
        if tensor.shape != expected.shape or not torch.allclose(
            tensor, expected, rtol=rtol, atol=atol
        ):
            names.append(name)
    return names


def differing_after_a_step(tensors, whole):
    """As `differing`, but the fused AdamW rounds the last few elements of a shard (its scalar tail)
    in another way.
    """
    return differing(tensors, whole, rtol=1e-6, atol=1e-8)


def optimizer_for(model):
    return build_optimizer(model, Optim(lr=1e-2))


def checkpoint(directory, world, model, optimizer):
    """Write one of step 2; its path."""
    checkpointer = state.Checkpointer(
        directory, mode="async", if_busy="wait", keep=1, group=world.writers
    )
    assert checkpointer.save(2, model, optimizer, extra={"step": 2}, config={})
    checkpointer.wait()
    (report,) = checkpointer.reports()
    assert report.error is None, report.error
    return report.path


def watched_export(*arguments, **options):
    """Export, and say with which ranks this one exchanged parts of experts (the only 3-d ones) and
    of anything, and what it wrote.
    """
    peers, written = [], []
    communicate, finish = dist.batch_isend_irecv, SafetensorsWriter.__exit__

    def watch_transfers(transfers):
        peers.extend((transfer.tensor.ndim, transfer.peer) for transfer in transfers)
        return communicate(transfers)

    def watch_writer(writer, *error):
        finish(writer, *error)
        written.append(writer._output.size)

    dist.batch_isend_irecv, SafetensorsWriter.__exit__ = watch_transfers, watch_writer
    try:
        huggingface.export(*arguments, **options)
    finally:
        dist.batch_isend_irecv, SafetensorsWriter.__exit__ = communicate, finish
    return {
        "expert_peers": sorted({peer for dims, peer in peers if dims == 3}),
        "peers": sorted({peer for _, peer in peers}),
        "written": sum(written),
    }


def every_layout(source, work):
    """Load, export, initialise, save and restore in each layout; returns what the tests look at, by
    ep.
    """
    results = {ep: {} for ep in LAYOUTS}
    with World(Parallel(ep=1, timeout_seconds=60), 0) as world:
        reference = torchsft.load_model(source).state_dict()
        for ep in LAYOUTS:
            model, seen = build(source, world, ep), results[ep]
            seen["read"] = huggingface.load_weights(model, huggingface.check_weights(source, model))
            tensors = model.state_dict()
            seen["wrong"] = differing(tensors, reference)
            seen["empty"] = sum(
                t.to_local().numel() == 0 for t in tensors.values() if isinstance(t, DTensor)
            )
            seen |= watched_export(model, f"{work}/hf-{ep}", "bf16", source, max_shard_bytes=30_000)
            huggingface.initialise_weights(model, 7)
            initial = {
                name: model.initial_value(name, tuple(t.shape), 7) for name, t in reference.items()
            }
            seen["wrong_initial"] = differing(model.state_dict(), initial)

        model = build(source, world, ep=2)
        huggingface.load_weights(model, huggingface.check_weights(source, model))
        optimizer = optimizer_for(model)
        update(model, optimizer, 2)
        torch.manual_seed(100 + world.rank)
        saved = whole(everything(model, optimizer))
        path = checkpoint(f"{work}/checkpoints", world, model, optimizer)
        drawn = torch.rand(3)
        update(model, optimizer, 1)
        continued = whole(everything(model, optimizer))
        for ep in LAYOUTS:
            model, seen = build(source, world, ep), results[ep]
            optimizer = optimizer_for(model)
            torch.manual_seed(0)
            seen["extra"] = state.load(path, model, optimizer)
            seen["same_random_numbers"] = torch.equal(torch.rand(3), drawn)
            seen["not_restored"] = differing(everything(model, optimizer), saved)
            update(model, optimizer, 1)
            seen["not_continued"] = differing_after_a_step(everything(model, optimizer), continued)
        if world.is_main:
            torch.save((saved, continued), f"{work}/snapshots.pt")
    return results
