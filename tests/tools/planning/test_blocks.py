"""What blocks of a model do, against closed formulas: FLOPs, and bytes between ranks."""

from collections import Counter

import pytest

from tests.tiny import tiny_config, tiny_qwen3_config
from tools.benchmark_layouts import expected_bytes
from tools.planning.blocks import measure
from tools.planning.operations import (
    ATTENTION,
    BACKWARD,
    EMBEDDING,
    FORWARD,
    GROUPED,
    HEAD,
    ONCE,
    PRODUCT,
    RECOMPUTED,
)
from torchsft.config import Config, Data, Parallel, Precision, Train
from torchsft.models.families import build_model, read_model_config

TOKENS = 1024
SIZES = dict(vocab_size=1024, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
LATENT = tiny_config(**SIZES, num_hidden_layers=4).to_dict()
LATENT["architectures"] = ["DeepseekV3ForCausalLM"]
GROUPED_QUERY = tiny_qwen3_config(**SIZES, num_hidden_layers=4).to_dict()
GROUPED_QUERY["architectures"] = ["Qwen3MoeForCausalLM"]
MULTIPLY_ADDS = 2.0


# Widths that fp8 products have kernels for.
EVEN = LATENT | dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16)


def config_of(compute="bf16", checkpointing="none", rows=4, **parallel):
    return Config(
        data=Data(seq_len=TOKENS),
        train=Train(global_batch_size=rows, activation_checkpointing=checkpointing),
        parallel=Parallel(**{"dp_shard": 1} | parallel),
        precision=Precision(compute=compute),
    )


def flops(operations, *kinds):
    return sum(count * each.flops for each, count in operations.items() if each.kind in kinds)


def of_model(blocks, phase, *kinds):
    """FLOPs of a pass through the whole model."""
    names = [EMBEDDING, *blocks.layers, HEAD]
    return sum(
        flops(blocks.by_name[name].operations.get(phase, Counter()), *kinds) for name in names
    )


def recorded(jobs):
    return {name: measure(*job, **more) for name, (*job, more) in jobs.items()}


DOCUMENTS = {"documents": [512, 256, 256], "imbalance": 1.0}
LAYOUTS = [
    (2, {"dp_shard": 2, "ep": 2}, "none"),
    (4, {"dp_shard": 2, "tp": 2, "ep": 4}, "full"),
    (4, {"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "1F1B"}, "full"),
    (4, {"dp_shard": 2, "cp": 2, "ep": 2}, "none"),
]
FAMILIES = {"latent": LATENT, "grouped query": GROUPED_QUERY}


@pytest.fixture(scope="module")
def measured(ranks):
    """All that these tests measure, by name, in one process."""
    jobs = {}
    for name, found in FAMILIES.items():
        jobs[name] = config_of(), found, 1, DOCUMENTS
        jobs[f"{name} again"] = config_of(checkpointing="full"), found, 1, DOCUMENTS
    for number, (size, layout, mode) in enumerate(LAYOUTS):
        config = config_of("fp32", mode, rows=8, **layout)
        jobs[number] = config, LATENT, size, {"imbalance": 1.0}
    for compute in ("bf16", "blockwise", "float8"):
        jobs[compute] = config_of(compute), EVEN, 1, {}
    for mode in ("full", "none"):
        jobs[mode] = config_of("bf16", mode, dp_shard=2, ep=2), LATENT, 2, {}
    (found,) = ranks(1, recorded, jobs=jobs)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_formula_and_of_the_metrics(measured, family):
    """Products forward once and backward twice, all as `ModelConfig.flops` counts them, which MFU
    is made of; attention forward as there (values padded to the width of queries), backward 2.5
    times that, as scores are computed again.
    """
    blocks, again, found = measured[family], measured[f"{family} again"], FAMILIES[family]
    sizes = read_model_config(found)
    products = MULTIPLY_ADDS * TOKENS * sum(sizes.layer_costs())
    head = MULTIPLY_ADDS * TOKENS * sizes.head_cost
    # the head's two backward products are in its forward pass (models/loss.py)
    assert of_model(blocks, FORWARD, PRODUCT, GROUPED) == products + 3 * head
    assert of_model(blocks, BACKWARD, PRODUCT, GROUPED) == 2 * products
    pairs = (512**2 + 2 * 256**2) / 2
    attention = of_model(blocks, FORWARD, ATTENTION)
    heads, width, values, length = next(
        each.shape
        for each in blocks.by_name[blocks.layers[0]].operations[FORWARD]
        if each.kind == ATTENTION
    )
    assert (width, length) == (values, round(2 * pairs / TOKENS))
    assert attention == MULTIPLY_ADDS * pairs * heads * 2 * width * sizes.num_hidden_layers
    assert of_model(blocks, BACKWARD, ATTENTION) == 2.5 * attention
    if found is GROUPED_QUERY:  # where nothing is padded
        of_run = sizes.flops([512, 256, 256])
        assert of_run == 3 * (products + head + attention)
    # A repetition ends before what no gradient needs: the last product. (Shared experts are done
    # before routed ones where no rows travel.)
    assert of_model(again, RECOMPUTED, ATTENTION) == attention
    expert = sizes.hidden_size * SIZES["moe_intermediate_size"]
    last = {
        "dense": sizes.hidden_size * SIZES["intermediate_size"],
        "8 experts": expert * found["num_experts_per_tok"],
    }
    saved = sum(last[name] for name in again.layers)
    repeated = of_model(again, RECOMPUTED, PRODUCT, GROUPED)
    assert repeated == products - MULTIPLY_ADDS * TOKENS * saved
    assert of_model(again, BACKWARD, PRODUCT, GROUPED) == 2 * products


def test_the_products_of_latent_attention_are_these(measured):
    """Of DeepSeek-V3's dense layer by hand, as (outputs, inputs); tokens are rows."""
    found = Counter()
    for each, count in measured["latent"].by_name["dense"].operations[FORWARD].items():
        if each.kind == PRODUCT:
            assert each.shape[0] == TOKENS and each.dtype == "bf16"
            found[each.shape[1:]] += count
    config, heads = LATENT, LATENT["num_attention_heads"]
    query = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rank = config["kv_lora_rank"]
    assert found == Counter(
        [
            (config["q_lora_rank"], 64),
            (heads * query, config["q_lora_rank"]),
            (rank + config["qk_rope_head_dim"], 64),
            (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), rank),
            (64, heads * config["v_head_dim"]),
            (96, 64),
            (96, 64),
            (64, 96),
        ]
    )


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_collectives_send_what_the_layout_benchmark_counts(measured, number):
    """In fp32, as that benchmark runs; all-to-all within 2 %, for the rows' weights."""
    size, layout, mode = LAYOUTS[number]
    config, blocks = config_of("fp32", mode, rows=8, **layout), measured[number]
    model = build_model(LATENT)
    expected = expected_bytes(model, config.parallel, config.train, TOKENS, size)
    microbatches = 8 // config.parallel.dp_shard
    sent = Counter()
    for name in (EMBEDDING, *blocks.layers, HEAD):
        for phase, operations in blocks.by_name[name].operations.items():
            for each, count in operations.items():
                times = 1 if phase == ONCE else microbatches
                sent[each.kind] += times * count * each.bytes / config.parallel.pp
    for kind in ("all-gather", "reduce-scatter"):
        assert sent[kind] == pytest.approx(expected[kind], rel=0.01)
    assert sent["all-to-all"] == pytest.approx(expected["all-to-all"], rel=0.02)


def test_a_block_keeps_what_its_checkpoint_is(measured):
    """Full checkpointing keeps a layer's input and where its tokens go, in bf16; without, far
    more. What is gathered and sharded are its parameters.
    """
    full, none = measured["full"], measured["none"]
    dense = full.by_name["dense"]
    assert TOKENS * 64 * 2 <= dense.kept < TOKENS * 64 * 2 + 5000
    for name in full.layers:
        assert none.by_name[name].kept > 4 * full.by_name[name].kept
        assert full.by_name[name].working > 0
    model = build_model(LATENT)
    of_dense = sum(p.numel() for p in model.model.layers["0"].parameters())
    assert (dense.gathered, 2 * dense.parameters) == (of_dense, pytest.approx(of_dense, rel=0.01))
    moe, layer = full.by_name["8 experts"], model.model.layers["1"]
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    rest = sum(p.numel() for p in layer.parameters()) - experts
    assert moe.gathered == rest + experts // 2
    assert moe.exchange > 0 == dense.exchange


def by_dtype(blocks, phase):
    """FLOPs of products of the layers, by dtype and whether they are of experts."""
    found = Counter()
    for name in blocks.layers:
        for each, count in blocks.by_name[name].operations[phase].items():
            if each.kind in (PRODUCT, GROUPED):
                found[each.dtype, each.kind] += count * each.flops
    return found


def test_products_in_fp8_are_as_many_and_are_known_as_such(measured):
    """Emulated in fp32 on the meta device, as tests do; the router stays in fp32, hidden states and
    so attention are in bf16.
    """
    for phase in (FORWARD, BACKWARD):
        plain = by_dtype(measured["bf16"], phase)
        blockwise, float8 = (by_dtype(measured[name], phase) for name in ("blockwise", "float8"))
        assert set(plain) == {("bf16", PRODUCT), ("bf16", GROUPED), ("fp32", PRODUCT)}
        for found in (blockwise, float8):
            assert found["fp8", PRODUCT] == plain["bf16", PRODUCT]
            assert found["fp32", PRODUCT] == plain["fp32", PRODUCT]
        assert blockwise["fp8", GROUPED] == float8["bf16", GROUPED] == plain["bf16", GROUPED]
    hidden = {name: measured[name].hidden for name in ("bf16", "blockwise", "float8")}
    assert set(hidden.values()) == {TOKENS * 64 * 2}
