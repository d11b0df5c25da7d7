"""Loading, exporting, saving and restoring models that are spread over 4 ranks, in every layout, in
one launch.
"""

from __future__ import annotations

import json

import pytest
import torch

import torchsft
from tests.checkpoint.layouts import (
    LAYOUTS,
    RANKS,
    differing,
    differing_after_a_step,
    every_layout,
    everything,
    optimizer_for,
    update,
)
from tests.checkpoint.sources import read_tensors, same_bits, write_source
from torchsft.checkpoint import huggingface, state

# Over 4 ranks 271 rows divide unevenly, and 9 leave the last rank without any.
SIZES = {"vocab_size": 271, "q_lora_rank": 9}


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


@pytest.mark.parametrize("ep", LAYOUTS)
def test_every_layout_loads_the_same_weights(results, ep):
    assert [r[ep]["wrong"] for r in results] == [[]] * RANKS
    assert results[-1][ep]["empty"] > 0  # the case is there


@pytest.mark.parametrize("ep", LAYOUTS)
def test_each_rank_reads_only_its_part(results, source, ep):
    tensors = {k: t for k, t in read_tensors(source).items() if not k.startswith("model.layers.3.")}
    total = sum(t.nbytes for t in tensors.values())
    replicated = sum(t.nbytes for k, t in tensors.items() if k.endswith("e_score_correction_bias"))
    read = [r[ep]["read"] for r in results]
    assert sum(read) == total + (RANKS - 1) * replicated
    assert max(read) < 1.1 * total / RANKS


@pytest.mark.parametrize("ep", LAYOUTS)
def test_random_weights_do_not_depend_on_the_layout(results, ep):
    assert [r[ep]["wrong_initial"] for r in results] == [[]] * RANKS


@pytest.mark.parametrize("ep", LAYOUTS)
def test_every_layout_exports_what_one_process_exports(results, source, work, tmp_path, ep):
    huggingface.export(torchsft.load_model(source), tmp_path / "hf", "bf16", source)
    expected, found = read_tensors(tmp_path / "hf"), read_tensors(work / f"hf-{ep}")
    assert expected.keys() == found.keys() == read_tensors(source).keys()
    assert [key for key in expected if not same_bits(expected[key], found[key])] == []
    index = json.loads((work / f"hf-{ep}" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()


@pytest.mark.parametrize("ep", LAYOUTS)
def test_ranks_share_the_writing(results, work, ep):
    """No rank writes more than its quarter and one of the largest tensors."""
    tensors = read_tensors(work / f"hf-{ep}")
    total, largest = (
        sum(t.nbytes for t in tensors.values()),
        max(t.nbytes for t in tensors.values()),
    )
    written = [r[ep]["written"] for r in results]
    assert total <= sum(written) < 1.1 * total  # headers
    assert max(written) <= 1.1 * (total / RANKS + largest)


def test_experts_move_only_between_the_ranks_that_share_them(results):
    assert [r[4]["expert_peers"] for r in results] == [[], [], [], []]
    # ep is the inner axis: ranks 0 and 2 hold the same experts, as do 1 and 3.
    assert [r[2]["expert_peers"] for r in results] == [[2], [3], [0], [1]]


@pytest.mark.parametrize("ep", LAYOUTS)
def test_a_checkpoint_restores_into_every_layout(results, ep):
    for rank in results:
        assert rank[ep]["not_restored"] == [] and rank[ep]["extra"] == {"step": 2}
        assert rank[ep]["same_random_numbers"]
        assert rank[ep]["not_continued"] == []


def test_a_checkpoint_of_four_ranks_restores_on_one(results, source, work):
    saved, continued = torch.load(work / "snapshots.pt")
    model = torchsft.load_model(source)
    optimizer = optimizer_for(model)
    state.load(state.find_latest(work / "checkpoints")[0], model, optimizer)
    assert differing(everything(model, optimizer), saved) == []
    update(model, optimizer, 1)
    assert differing_after_a_step(everything(model, optimizer), continued) == []
