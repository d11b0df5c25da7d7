"""The reduced matrix for every family: each axis alone, pp x ep x dp, tp x ep and cp x ep compute
the training step of one process; a checkpoint continues on another layout.
"""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint import parts
from tests.checkpoint.sources import same_bits
from tests.distributed.test_layouts import compare, merged, train
from tests.families import TINY, tiny
from tests.tiny import write_conversations, write_tiny_model
from torchsft.models.families import read_model_config

AXES = [
    {"pp": 2, "pp_schedule": "1F1B"},
    {"dp_replicate": 2},
    {"dp_shard": 2},
    {"cp": 2},
    {"tp": 2},
]
TOGETHER = [
    {"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "Interleaved1F1B"},
    {"tp": 2, "dp_shard": 2, "ep": 4},
    {"cp": 2, "tp": 2, "ep": 2},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("families")
    write_conversations(directory / "train.jsonl", 6)
    for family in TINY:
        # a pipeline cannot have tied embeddings
        config = tiny(family, tie_word_embeddings=False)
        write_tiny_model(directory / family, config=config)
    return directory


def train_in_turn(layouts, **options):
    """`train` in each layout; for `ranks`."""
    return [train(**options, **{"dp_shard": 1} | layout) for layout in layouts]


def runs(ranks, n, layouts, **options):
    """Of each layout: [without, with] the balance loss, the ranks' results put together."""
    of_ranks = ranks(n, train_in_turn, layouts=layouts, **options)
    return [
        [merged(list(results)) for results in zip(*of_layout, strict=True)]
        for of_layout in zip(*of_ranks, strict=True)
    ]


@pytest.mark.parametrize("family", TINY)
def test_a_step_does_not_depend_on_the_layout(ranks, inputs, family):
    options = {"directory": str(inputs), "model": family, "seq_len": 192}
    options |= {"micro_batch_size": 2, "global_batch_size": 4}
    config = read_model_config(tiny(family).to_dict())
    has_experts = any(map(config.is_moe, range(config.num_hidden_layers)))
    alone = AXES + ([{"dp_shard": 2, "ep": 2}] if has_experts else [])
    together = [
        {axis: size for axis, size in layout.items() if axis != "ep" or has_experts}
        for layout in TOGETHER
    ]
    ((expected,),) = [runs(ranks, 1, [{}], **options)]
    for n, layouts in ((2, alone), (4, together)):
        for layout, results in zip(layouts, runs(ranks, n, layouts, **options), strict=True):
            for result, reference in zip(results, expected, strict=True):
                compare(result, reference, label=f"{family} {layout}")


@pytest.mark.parametrize("family", TINY)
def test_a_checkpoint_continues_on_another_layout(ranks, inputs, tmp_path, family):
    source, directory = str(inputs / family), str(tmp_path)
    saved = ranks(2, parts.save, source=source, directory=directory, tp=2)
    pipeline = {"pp": 2, "pp_schedule": "1F1B"}
    restored = ranks(2, parts.restore, source=source, directory=directory, **pipeline)
    found = {name: tensor for whole, _, _ in restored for name, tensor in whole.items()}
    expected = saved[0][0]
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], torch.as_tensor(expected[name])) for name in expected)
