"""Grouped-query attention over ranks: the training pass of one process, whether key/value heads are
split over ranks or shared by several.
"""

from types import SimpleNamespace

import pytest

from tests.parallel.passes import build, compare, training_pass
from torchsft.config import InputError
from torchsft.parallel.sequence import check_sizes

MODELS = {
    "as Qwen3-MoE": {},
    "biases, one key/value head": {"attention_bias": True, "num_key_value_heads": 1},
    "dense and tied, as many key/value heads": {
        "dense": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
    },
}
LAYOUTS = [
    {"tp": 2},
    {"tp": 4},
    {"cp": 2},
    {"cp": 4},
    {"tp": 2, "cp": 2},
    {"tp": 2, "dp_shard": 2},
]


@pytest.fixture(scope="module")
def one_process(ranks):
    return {
        name: ranks(1, training_pass, parallel={}, balance=3.0, qwen3=True, **changes)[0]
        for name, changes in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_loss_and_gradients_do_not_depend_on_the_layout(ranks, one_process, name, parallel):
    size = 4 if len(parallel) > 1 else max(parallel.values())
    if "dense" not in MODELS[name] and size == 4:
        parallel = parallel | {"ep": 2}
    results = ranks(size, training_pass, parallel=parallel, balance=3.0, qwen3=True, **MODELS[name])
    compare(results, one_process[name])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_norms_over_all_heads_count_each_head_once_where_ranks_share_them(ranks, kv_heads):
    """Also where other tensor groups have other tokens."""
    changes = {"family": "minimax_m2", "num_key_value_heads": kv_heads, "balance": 3.0}
    (expected,) = ranks(1, training_pass, parallel={}, **changes)
    for parallel in ({"tp": 4}, {"tp": 2, "cp": 2, "ep": 2}):
        compare(ranks(4, training_pass, parallel=parallel, **changes), expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "cp", "sentence"),
    [
        (12, 4, 6, 1, "num_key_value_heads = 4, which --parallel.tp 6 and then --parallel.cp 1"),
        (12, 6, 2, 2, "num_key_value_heads = 6, which --parallel.tp 2 and then --parallel.cp 2"),
        (12, 4, 5, 1, "num_attention_heads = 12, which --parallel.tp 5 x --parallel.cp 1"),
    ],
)
def test_heads_that_do_not_divide_are_refused_with_sizes_that_do(heads, kv_heads, tp, cp, sentence):
    config = build(
        qwen3=True,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=240,
        intermediate_size=240,
    ).config
    axes = {"dp_shard": 1, "cp": cp, "tp": tp}
    sizes = {axis: SimpleNamespace(size=lambda n=n: n) for axis, n in axes.items()}
    with pytest.raises(InputError, match=sentence) as error:
        check_sizes(config, SimpleNamespace(dense=sizes))
    assert "; set --parallel.tp" in str(error.value)
