"""Loading, exporting, saving and restoring under pipeline and tensor parallelism and with replicas,
on 4 ranks.
"""

from __future__ import annotations

import collections

import pytest
import torch

import torchsft
from tests.checkpoint import parts
from tests.checkpoint.layouts import everything, optimizer_for, update
from tests.checkpoint.sources import read_tensors, same_bits, write_source
from torchsft.checkpoint import huggingface, state
from torchsft.config import InputError

RANKS = 4
# In a V the first pipeline rank has the first and the last stage: embedding, layers 0 and 3, head.
LAYOUTS = {
    "pp2-tp2": {"pp": 2, "tp": 2, "pp_schedule": "1F1B"},
    "pp2-ep2": {"pp": 2, "ep": 2, "pp_schedule": "ZBVZeroBubble"},
    "tp2-fsdp2-ep2": {"tp": 2, "ep": 2},
    "replicas-ep2": {"dp_replicate": 2, "ep": 2},
    "replicas-tp2-ep2": {"dp_replicate": 2, "tp": 2, "ep": 2},
}
SAVED = ["pp2-ep2", "tp2-fsdp2-ep2", "replicas-ep2"]

# 274 rows are 137 on each of two tensor-parallel ranks, which FSDP divides unevenly; so are the 9
# rows of q_a_proj.
SIZES = {"num_hidden_layers": 4, "vocab_size": 274, "q_lora_rank": 9}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("parts") / "source", torch.float32, sharded=True, mtp=True, **SIZES
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, ranks, source, work):
    """Name of the layout and what each rank saw."""
    name = request.param
    return name, ranks(
        RANKS, parts.weights, source=str(source), work=str(work), name=name, **LAYOUTS[name]
    )


@pytest.fixture(scope="module")
def checkpoints(ranks, source, work):
    """By layout: the directory and what each rank saved."""
    made = {}
    for name in SAVED:
        directory = str(work / name / "checkpoints")
        made[name] = (
            directory,
            ranks(RANKS, parts.save, source=str(source), directory=directory, **LAYOUTS[name]),
        )
    return made


def merged(dictionaries):
    """The union, where ranks that have the same tensor agree in every bit."""
    union = {}
    for tensors in dictionaries:
        for name, tensor in tensors.items():
            assert same_bits(union.setdefault(name, tensor), tensor), name
    return union


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def assert_close(found, expected):
    """The fused AdamW rounds the last few elements of a shard (its scalar tail) in another way."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8, msg=name)


def test_the_layouts_are_what_they_should_be(layout):
    """Ranks of a pipeline hold different tensors, and FSDP strides over what tensor parallelism has
    cut.
    """
    name, seen = layout
    names = [set(rank["loaded"]) for rank in seen]
    if name.startswith("pp2"):
        assert names[0] == names[1] and names[2] == names[3] and not names[0] & names[2]
    else:
        assert names[0] == names[1] == names[2] == names[3]
    if name == "pp2-ep2":
        assert {"model.embed_tokens.weight", "lm_head.weight"} < names[0]
    placements = seen[0]["placements"]["model.embed_tokens.weight"]
    assert ("StridedShard" in placements) == ("tp2" in name) and placements.count(
        "Replicate"
    ) == name.startswith("replicas")


def test_parts_load_the_weights_of_the_model(layout, source):
    _, seen = layout
    assert_same(merged(rank["loaded"] for rank in seen), torchsft.load_model(source).state_dict())


def test_each_rank_reads_only_what_it_holds(layout, source):
    """Every value is read once, and once more for each copy of it."""
    name, seen = layout
    whole = torchsft.load_model(source).state_dict()
    if name == "pp2-ep2":  # FSDP divides all but the routing bias over the two ranks of a stage
        copies = collections.Counter({key: 2 for key in whole if key.endswith("bias")})
        assert sum(rank["read"] for rank in seen) == sum(
            tensor.nbytes * (copies[key] or 1) for key, tensor in whole.items()
        )
    if name == "replicas-ep2":
        assert sum(rank["read"] for rank in seen[:2]) == sum(rank["read"] for rank in seen[2:])
    total = sum(tensor.nbytes for tensor in whole.values())
    assert max(rank["read"] for rank in seen) < 0.6 * total


def test_random_weights_do_not_depend_on_the_layout(layout, source):
    _, seen = layout
    model = torchsft.load_model(source)
    expected = {
        name: model.initial_value(name, tuple(t.shape), 7) for name, t in model.state_dict().items()
    }
    assert_same(merged(rank["initial"] for rank in seen), expected)


def test_parts_export_what_one_process_exports(layout, source, work, tmp_path):
    name, seen = layout
    huggingface.export(
        torchsft.load_model(source), tmp_path / "hf", torch.bfloat16, source, max_shard_bytes=30_000
    )
    expected, found = read_tensors(tmp_path / "hf"), read_tensors(work / name / "hf")
    assert expected.keys() == found.keys() == read_tensors(source).keys()
    assert [key for key in expected if not same_bits(expected[key], found[key])] == []
    assert huggingface.read_config(tmp_path / "hf") == huggingface.read_config(work / name / "hf")
    # No rank writes more than its quarter and one of the largest tensors.
    total, largest = sum(t.nbytes for t in found.values()), max(t.nbytes for t in found.values())
    assert max(rank["written"] for rank in seen) <= 1.1 * (total / RANKS + largest)


def test_an_export_moves_only_what_it_must(layout):
    """Nothing between stages and between replicas; of the experts nothing but the halves that two
    ranks have of each.
    """
    name, seen = layout
    neighbours = [[1], [0], [3], [2]]
    if name != "tp2-fsdp2-ep2":
        assert [rank["peers"] for rank in seen] == neighbours
    halves = {"pp2-tp2": neighbours, "tp2-fsdp2-ep2": [[2], [3], [0], [1]]}
    assert [rank["expert_peers"] for rank in seen] == halves.get(name, [[]] * RANKS)


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_holds_every_tensor_once(checkpoints, name):
    """Although replicas hold it twice: the files are not larger than one copy and its headers."""
    directory, saved = checkpoints[name]
    size = sum(tensor.nbytes for tensor in merged(tensors for tensors, _ in saved).values())
    random_states = RANKS * torch.get_rng_state().nbytes
    overhead = parts.bytes_of(directory) - size - random_states
    assert 0 < overhead < size


@pytest.mark.parametrize("name", SAVED)
def test_updates_do_not_depend_on_the_layout(checkpoints, source, name):
    model = torchsft.load_model(source)
    optimizer = optimizer_for(model)
    update(model, optimizer, 2)
    assert_close(
        merged(tensors for tensors, _ in checkpoints[name][1]), everything(model, optimizer)
    )


@pytest.mark.parametrize(
    ("name", "into"),
    [
        ("pp2-ep2", "tp2-fsdp2-ep2"),
        ("tp2-fsdp2-ep2", "pp2-ep2"),
        ("replicas-ep2", "pp2-tp2"),
        ("pp2-ep2", "replicas-ep2"),
    ],
)
def test_a_checkpoint_restores_into_another_layout(ranks, checkpoints, source, name, into):
    directory, saved = checkpoints[name]
    seen = ranks(RANKS, parts.restore, source=str(source), directory=directory, **LAYOUTS[into])
    assert_same(
        merged(restored for restored, _, _ in seen), merged(tensors for tensors, _ in saved)
    )
    assert [torch.equal(rank[2], drawn) for rank, (_, drawn) in zip(seen, saved, strict=True)] == [
        True
    ] * RANKS
    model = torchsft.load_model(source)
    optimizer = optimizer_for(model)
    update(model, optimizer, 3)
    assert_close(merged(continued for _, continued, _ in seen), everything(model, optimizer))


def test_every_rank_refuses_the_checkpoint_of_another_model_with_the_same_sentence(
    ranks, checkpoints, source
):
    """It names what any rank lacks; layers that another rank holds are not unexpected."""
    models = [{"num_hidden_layers": layers} for layers in (3, 5)] + [{"vocab_size": 300}, {}]
    directory, _ = checkpoints["pp2-ep2"]
    options = {
        "source": str(source),
        "directory": directory,
        "models": models,
        "pp": 2,
        "pp_schedule": "1F1B",
    }
    sentences = ranks(2, parts.refusals, **options)
    fewer, more, wider = sentences[0]  # and none for the model itself
    assert sentences[0] == sentences[1]
    assert "unexpected: model.model.layers.3." in fewer and "missing" not in fewer
    assert "missing: model.model.layers.4." in more and "unexpected" not in more
    assert (
        "6 of another shape" in wider
        and "model.lm_head.weight ((274, 32) instead of (300, 32))" in wider
    )


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_parts_restores_on_one_rank(checkpoints, source, name):
    directory, saved = checkpoints[name]
    model = torchsft.load_model(source)
    optimizer = optimizer_for(model)
    state.load(state.find_latest(directory)[0], model, optimizer)
    assert_same(everything(model, optimizer), merged(tensors for tensors, _ in saved))


def test_a_part_alone_is_not_exported_and_not_restored(checkpoints, source, tmp_path):
    """As if the other ranks of the pipeline were forgotten."""
    whole = torchsft.load_model(source)
    part = whole.part([0, 1], first=True, last=False)
    with pytest.raises(RuntimeError, match=r"do not hold .* elements of model\.layers\.2\."):
        huggingface.export(part, tmp_path / "hf", "bf16", source)
    with pytest.raises(InputError, match=r"130 unexpected: model\.model\.layers\.3\."):
        state.load(state.find_latest(checkpoints["pp2-ep2"][0])[0], part, optimizer_for(part))
    assert not (tmp_path / "hf").exists()
