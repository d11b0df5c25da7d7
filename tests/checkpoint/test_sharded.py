"""Loading, exporting, saving and restoring models that are spread over 4 ranks, in every layout, in one launch."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import torchsft
from tests.checkpoint.sources import read_tensors, same_bits, write_source
from torchsft.checkpoint import huggingface, state
from torchsft.checkpoint.weight_files import SafetensorsWriter
from torchsft.config import Optim, Parallel
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config, initial_value
from torchsft.parallel.apply import parallelize
from torchsft.parallel.world import World
from torchsft.precision.adamw import build_optimizer

RANKS = 4
# Over 4 ranks 271 rows divide unevenly, and 9 leave the last rank without any.
SIZES = {"vocab_size": 271, "q_lora_rank": 9}


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build(source, world, ep):
    """A materialised model whose memory is garbage."""
    world.expert = world._mesh({"pp": 1, "dp_replicate": 1, "edp": RANKS // ep, "ep": ep})
    with torch.device("meta"):
        model = DeepseekV3(DeepseekV3Config.from_hf(huggingface.read_config(source)))
    parallelize(model, world, torch.float32)
    model.to_empty(device="cpu")
    model.init_buffers()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    return model


def update(model, optimizer, steps):
    """Steps with gradients that follow from the weights alone, so that every layout makes the same ones."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() / 2
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model, optimizer):
    """Whole tensors by name: parameters, buffers, moments."""
    tensors = {name: full(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}:{key}": full(value) for key, value in optimizer.state[parameter].items()}
    return tensors


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def differing_after_steps(a, b):
    """As `differing`, but the fused AdamW rounds the last few elements of a shard (its scalar tail) in another way."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.allclose(a[name], b[name], rtol=1e-6, atol=1e-8)]


def optimizer_for(model):
    return build_optimizer(model, Optim(lr=1e-2))


def watched_export(*arguments, **options):
    """Export, and say with which ranks this one exchanged parts of experts (the only 3-d ones), and what it wrote."""
    peers, written = set(), []
    communicate, finish = dist.batch_isend_irecv, SafetensorsWriter.__exit__

    def watch_transfers(transfers):
        peers.update(transfer.peer for transfer in transfers if transfer.tensor.ndim == 3)
        return communicate(transfers)

    def watch_writer(writer, *error):
        finish(writer, *error)
        written.append(os.path.getsize(writer._file.name))

    dist.batch_isend_irecv, SafetensorsWriter.__exit__ = watch_transfers, watch_writer
    try:
        huggingface.export(*arguments, **options)
    finally:
        dist.batch_isend_irecv, SafetensorsWriter.__exit__ = communicate, finish
    return sorted(peers), sum(written)


def every_layout(source, work):
    """Runs on each rank; returns what the tests look at."""
    results = {}
    with World(Parallel(ep=1, timeout_seconds=60), 0) as world:
        reference = torchsft.load_model(source).state_dict()
        for ep in (1, 2, 4):
            model = build(source, world, ep)
            read = huggingface.load_weights(model, source)
            loaded = {name: full(tensor) for name, tensor in model.state_dict().items()}
            peers, written = watched_export(model, f"{work}/hf-{ep}", torch.bfloat16, source, max_shard_bytes=30_000)
            results[ep] = {
                "read": read,
                "wrong": differing(loaded, reference),
                "empty": sum(t.to_local().numel() == 0 for t in model.state_dict().values() if isinstance(t, DTensor)),
                "expert_peers": peers,
                "written": written,
            }
            huggingface.initialise_weights(model, 7, initial_value)
            results[ep]["wrong_initial"] = [
                name
                for name, tensor in model.state_dict().items()
                if not torch.equal(full(tensor), initial_value(name, tuple(tensor.shape), model.config, 7))
            ]

        model = build(source, world, ep=2)
        huggingface.load_weights(model, source)
        optimizer = optimizer_for(model)
        update(model, optimizer, 2)
        torch.manual_seed(100 + world.rank)
        saved = snapshot(model, optimizer)
        path = state.save(f"{work}/checkpoints", 2, model, optimizer, extra={"step": 2}, config={}, keep=1)
        drawn = torch.rand(3)
        update(model, optimizer, 1)
        continued = snapshot(model, optimizer)
        for ep in (1, 2, 4):
            model = build(source, world, ep)
            optimizer = optimizer_for(model)
            torch.manual_seed(0)
            results[ep]["extra"] = state.load(path, model, optimizer)
            results[ep]["same_random_numbers"] = torch.equal(torch.rand(3), drawn)
            results[ep]["not_restored"] = differing(snapshot(model, optimizer), saved)
            update(model, optimizer, 1)
            results[ep]["not_continued"] = differing_after_steps(snapshot(model, optimizer), continued)
        if world.is_main:
            torch.save((saved, continued), f"{work}/snapshots.pt")
    return results


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded") / "source"
    return write_source(directory, torch.float32, sharded=True, mtp=True, **SIZES)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def results(ranks, source, work):
    """One dictionary per rank, by ep."""
    return ranks(RANKS, every_layout, source=str(source), work=str(work))


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_layout_loads_the_same_weights(results, ep):
    assert [r[ep]["wrong"] for r in results] == [[]] * RANKS
    assert results[-1][ep]["empty"] > 0  # the case is there


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_each_rank_reads_only_its_part(results, source, ep):
    tensors = {k: t for k, t in read_tensors(source).items() if not k.startswith("model.layers.3.")}
    total = sum(t.nbytes for t in tensors.values())
    replicated = sum(t.nbytes for k, t in tensors.items() if k.endswith("e_score_correction_bias"))
    read = [r[ep]["read"] for r in results]
    assert sum(read) == total + (RANKS - 1) * replicated
    assert max(read) < 1.1 * total / RANKS


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_random_weights_do_not_depend_on_the_layout(results, ep):
    assert [r[ep]["wrong_initial"] for r in results] == [[]] * RANKS


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_layout_exports_what_one_process_exports(results, source, work, tmp_path, ep):
    huggingface.export(torchsft.load_model(source), tmp_path / "hf", torch.bfloat16, source)
    expected, found = read_tensors(tmp_path / "hf"), read_tensors(work / f"hf-{ep}")
    assert expected.keys() == found.keys() == read_tensors(source).keys()
    assert [key for key in expected if not same_bits(expected[key], found[key])] == []
    index = json.loads((work / f"hf-{ep}" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_ranks_share_the_writing(results, work, ep):
    """No rank writes more than its quarter and one of the largest tensors."""
    tensors = read_tensors(work / f"hf-{ep}")
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    written = [r[ep]["written"] for r in results]
    assert total <= sum(written) < 1.1 * total  # headers
    assert max(written) <= 1.1 * (total / RANKS + largest)


def test_experts_move_only_between_the_ranks_that_share_them(results):
    assert [r[4]["expert_peers"] for r in results] == [[], [], [], []]
    # ep is the inner axis: ranks 0 and 2 hold the same experts, as do 1 and 3.
    assert [r[2]["expert_peers"] for r in results] == [[2], [3], [0], [1]]


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_a_checkpoint_restores_into_every_layout(results, ep):
    for rank in results:
        assert rank[ep]["not_restored"] == [] and rank[ep]["extra"] == {"step": 2}
        assert rank[ep]["same_random_numbers"]
        assert rank[ep]["not_continued"] == []


def test_a_checkpoint_of_four_ranks_restores_on_one(results, source, work):
    saved, continued = torch.load(work / "snapshots.pt")
    model = torchsft.load_model(source)
    optimizer = optimizer_for(model)
    state.load(state.find_latest(work / "checkpoints"), model, optimizer)
    assert differing(snapshot(model, optimizer), saved) == []
    update(model, optimizer, 1)
    assert differing_after_steps(snapshot(model, optimizer), continued) == []
