"""The invariance matrix: every layout of ranks computes the training step of one process.

Through the real `Trainer`: same weights, same rows, fp32. Compared with one process on one rank:
loss, norm, every element of every gradient, where every token is routed and, after three optimizer
steps, every parameter and correction bias; with and without the losses of routing.
"""

from __future__ import annotations

import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from tests.parallel.passes import on_nodes
from tests.tiny import tiny_qwen3_config, write_conversations, write_tiny_model
from torchsft.checkpoint import huggingface
from torchsft.config import (
    Checkpoint,
    Config,
    Data,
    InputError,
    Metrics,
    Model,
    Optim,
    Parallel,
    Precision,
    Train,
)
from torchsft.models.decoder import local
from torchsft.ops.repetition import repeating
from torchsft.parallel import activation_offload
from torchsft.parallel import compile as compiling
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

STEPS = 3
ROWS = 8  # of a step; an epoch fills about 6, so every step has microbatches without any document
AUX_LOSS = 0.05
Z_LOSS = 0.1
BIAS_UPDATE_RATE = 0.02
OPTIM = ("groups", "kind", "moments", "masters", "offload")
SCHEDULES = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


class SilentTrainer(Trainer):
    """Several layouts share an output directory: nothing is written."""

    def open_output(self) -> None:
        pass


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def config_for(directory: str, model: str = "model", **changes: Any) -> Config:
    """`changes`: fields of Parallel, some of Train and Optim, compute and output."""
    base = Path(directory)
    optim = {name: changes.pop(name) for name in OPTIM if name in changes}
    train = {
        "micro_batch_size": 1,
        "global_batch_size": ROWS,
        "activation_checkpointing": "none",
        "activation_checkpointing_every": 1,
        "selective_products": False,
        "stream_pieces": 8,
        "activation_offload": False,
        "freeze": (),
    }
    names = {"recipe": "float8_recipe", "experts": "experts"}
    recipe = {name: changes.pop(short) for short, name in names.items() if short in changes}
    train |= {name: changes.pop(name) for name in train.keys() & changes.keys()}
    model_options = {name: changes.pop(name) for name in ("mtp", "compile") if name in changes}
    compute, output = (
        changes.pop("compute", "fp32"),
        changes.pop("output", str(base / "unused-output")),
    )
    return Config(
        model=Model(path=str(base / model), **model_options),
        data=Data(
            train=(str(base / "train.jsonl"),),
            eval=changes.pop("eval", ()),
            seq_len=changes.pop("seq_len", 192),
        ),
        train=Train(steps=STEPS, **train),
        parallel=Parallel(**({"timeout_seconds": 60} | changes)),
        # A large eps keeps AdamW smooth: with a small one, rounding decides the direction of
        # elements without a gradient.
        optim=Optim(lr=1e-2, eps=1e-3, clip_norm=0.05, warmup_steps=1, schedule="linear", **optim),
        precision=Precision(compute=compute, **recipe),
        checkpoint=Checkpoint(export="none"),
        metrics=Metrics(tensorboard=False, progress=False),
        output=output,
    )


def run(config: Config, world: World) -> list[dict[str, Any]]:
    """A step with the losses of routing that changes nothing, then three without that do, and move
    the correction bias where there is one.

    Returns:
        [without, with] the losses of routing: losses, norms, where tokens were routed and gradients
        (after clipping) of the first step, the latter and the final weights as far as this rank has
        the layers.
    """
    trainer = SilentTrainer(config, world)
    moes = trainer.model.moe_layers()
    routing: dict[str, list[torch.Tensor]] = {name: [] for name in moes}
    # where activation checkpointing routes them
    again: dict[str, list[torch.Tensor]] = {name: [] for name in moes}

    def keep_routing(name: str, chosen: torch.Tensor) -> None:
        (again if repeating() else routing)[name].append(chosen.sort().values)

    for name, moe in moes.items():
        moe.observe = partial(keep_routing, name)
    gradients: list[dict[str, torch.Tensor]] = []
    update = trainer.optimizer.step

    def keep_gradients() -> None:
        gradients.append(
            {name: full(p.grad) for name, p in trainer.model.named_parameters() if p.requires_grad}
        )

    def keep_gradients_once_and_update() -> None:
        if len(gradients) == 1:
            keep_gradients()
        update()

    place = {axis: world.dense.get_local_rank(axis) for axis in world.dense.mesh_dim_names}
    common = {"place": place, "data_rank": world.data_rank}
    trainer.optimizer.step = keep_gradients
    first = next(trainer.loader)
    router = trainer.config.router
    if trainer.model.layer_experts():
        router.aux_loss, router.z_loss = AUX_LOSS, Z_LOSS
    balanced = common | reported([first], [trainer.train_step(first)[0]])
    microbatches = ROWS // (config.train.micro_batch_size * world.data_size)
    balanced["routing"] = {
        name: torch.cat(seen).unflatten(0, (microbatches, -1)) for name, seen in routing.items()
    }
    if config.train.activation_checkpointing != "none":
        assert all(
            torch.equal(torch.cat(again[name]).view_as(seen), seen)
            for name, seen in balanced["routing"].items()
            if (int(name) + 1) % config.train.activation_checkpointing_every == 0
        )
    router.aux_loss = router.z_loss = 0.0
    if any(moe.correction_bias is not None for moe in moes.values()):
        router.bias_update_rate = BIAS_UPDATE_RATE
    for moe in moes.values():
        del moe.observe
    trainer.optimizer.step = keep_gradients_once_and_update
    steps = [next(trainer.loader) for _ in range(STEPS)]
    without = common | reported(steps, [trainer.train_step(step)[0] for step in steps])
    state = {name: full(t) for name, t in trainer.model.state_dict().items()}
    balanced["evaluation"] = {}
    without["evaluation"] = trainer.evaluate() if trainer.run_data.eval_sets else {}
    if all(index == 0 for axis, index in place.items() if axis != "pp"):
        balanced["gradients"] = gradients[0]
        without |= {"gradients": gradients[1], "state": state}
    return [without, balanced]


def reported(steps: list[Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What this rank read, and what it says of the steps."""
    keys = {"losses": "loss", "norms": "grad_norm", "tokens": "tokens"}
    keys |= {"aux": "aux_loss", "z": "z_loss", "mtp": "mtp_loss"}
    ids = [step.sample_ids for step in steps]
    empty = sum(int(b.cu_seqlens[-1]) == 0 for step in steps for b in step.microbatches)
    return {name: [r.get(key) for r in records] for name, key in keys.items()} | {
        "ids": ids,
        "empty": empty,
    }


def train(directory: str, ranks_per_node: int = 0, **options: Any) -> list[dict[str, Any]]:
    """`run` on the calling ranks, of which a machine has some; 0: all."""
    if ranks_per_node:
        return on_nodes(ranks_per_node, train, directory=directory, **options)
    activation_offload.LEAST = 0  # what a tiny model keeps goes to the host too
    compiling.BACKEND = "aot_eager"  # all of torch.compile but the making of kernels
    config = config_for(directory, **options)
    with World(config.parallel, 0) as world:
        return run(config, world)


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks say, put together: every rank the same numbers, and each pipeline rank its
    layers.
    """
    # all ranks report the same
    numbers = ("losses", "norms", "tokens", "aux", "z", "mtp", "evaluation")
    assert len({str([r[key] for key in numbers]) for r in results}) == 1
    whole = {key: results[0][key] for key in numbers}
    for key in ("gradients", "state"):
        if not any(key in r for r in results):
            continue
        parts = [r[key] for r in results if key in r]
        whole[key] = {}
        for name, tensor in (item for part in parts for item in part.items()):
            # the one tensor that can be on two pipeline ranks, for MTP layers, is equal there
            shared = results[0]["mtp"][0] is not None and name == "model.embed_tokens.weight"
            assert name not in whole[key] or (shared and torch.equal(whole[key][name], tensor))
            whole[key][name] = tensor
    # Rows in the global order: data rank, microbatch, then the slices of a row.
    ordered = sorted(results, key=lambda r: (r["data_rank"], r["place"]["cp"], r["place"]["tp"]))
    readers = {
        rank: [r for r in ordered if r["data_rank"] == rank]
        for rank in {r["data_rank"] for r in results}
    }
    whole["routing"] = {}
    for name in sorted({name for r in results for name in r.get("routing", {})}):
        rows = [
            torch.cat([r["routing"][name] for r in part if name in r["routing"]], dim=1)
            for part in readers.values()
        ]
        whole["routing"][name] = torch.cat(rows)
    # Peers of a pipeline, tensor or context group read the same rows, data ranks one part each.
    assert all(len({str(r["ids"]) for r in part}) == 1 for part in readers.values())
    whole["ids"] = [
        [i for part in readers.values() for i in part[0]["ids"][step]]
        for step in range(len(results[0]["ids"]))
    ]
    whole["empty"] = sum(part[0]["empty"] for part in readers.values())
    return whole


def on_ranks(ranks, n: int, **options: Any) -> list[dict[str, Any]]:
    """[without, with] the losses of routing."""
    return [merged(list(results)) for results in zip(*ranks(n, train, **options), strict=True)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    write_tiny_model(directory / "model", num_hidden_layers=8, first_k_dense_replace=2)
    other = {
        "tie_word_embeddings": True,
        "q_lora_rank": None,
        "attention_bias": True,
        "n_group": 1,
        "topk_group": 1,
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    write_tiny_model(directory / "other", rope_parameters=yarn, **other)
    write_tiny_model(directory / "shallow")
    qwen3 = tiny_qwen3_config(num_hidden_layers=8, mlp_only_layers=[0, 5])
    write_tiny_model(directory / "qwen3", config=qwen3)
    dense = tiny_qwen3_config(dense=True, num_hidden_layers=8, attention_bias=True)
    write_tiny_model(directory / "qwen3-dense", config=dense)
    write_conversations(directory / "train.jsonl", 10)
    return str(directory)


@pytest.fixture(scope="module")
def one_process(inputs, ranks):
    return on_ranks(ranks, 1, directory=inputs)


def compare(result: dict[str, Any], reference: dict[str, Any], label: str = "") -> None:
    """fp32 sums in another order: 1e-6 of the loss and norm, 1e-5 of each tensor's largest
    gradient.
    """
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-6)
    if reference["aux"][0] is not None:
        assert result["aux"] == pytest.approx(reference["aux"], rel=1e-6)
        assert result["z"] == pytest.approx(reference["z"], rel=1e-6)
    if reference["mtp"][0] is not None:
        assert result["mtp"] == pytest.approx(reference["mtp"], rel=1e-6)
    assert result["evaluation"] == pytest.approx(reference["evaluation"], rel=1e-6)
    assert (result["tokens"], result["ids"]) == (reference["tokens"], reference["ids"])
    wrong, worst = [], 0.0
    assert result["gradients"].keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        got = result["gradients"][name]
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, error)
        if not error <= 1e-5:
            factor = (got * expected).sum() / expected.square().sum()
            wrong.append(f"{name}: error {error:.1e}, scaled by {factor:.4f}")
    print(f"{label}: worst gradient element {worst:.1e}")
    assert not wrong, "gradients differ:\n" + "\n".join(wrong)
    assert result.keys() == reference.keys()
    for name, expected in reference.get("state", {}).items():
        torch.testing.assert_close(
            result["state"][name],
            expected,
            rtol=0,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def layout(**sizes: Any) -> Any:
    """One row of the matrix; dp_shard 1 where it is not named. `n` ranks follow."""
    sizes = {"dp_shard": 1} | sizes
    n = math.prod(sizes.get(axis, 1) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))
    name = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size is True or size != 1)
    return pytest.param(n, sizes, id=name)


# Several rows a microbatch where ranks share its tokens: each of them computes every microbatch,
# which takes the test's time. With `ranks_per_node` tokens go to experts at two levels.
MATRIX = [
    # one axis alone
    *(layout(pp=pp, pp_schedule=schedule) for pp in (2, 4) for schedule in SCHEDULES),
    layout(dp_replicate=2),
    layout(dp_shard=2),
    layout(dp_shard=4),
    layout(cp=2),
    layout(cp=4, micro_batch_size=2),
    layout(tp=2),
    layout(tp=4, micro_batch_size=2),
    # pairs
    layout(pp=2, dp_replicate=2, pp_schedule="1F1B"),
    layout(pp=2, dp_shard=2),
    layout(pp=2, cp=2),
    layout(pp=2, tp=2),
    layout(dp_replicate=2, dp_shard=2),
    layout(dp_replicate=2, cp=2),
    layout(dp_replicate=2, tp=2, micro_batch_size=2),
    layout(dp_shard=2, cp=2),
    layout(dp_shard=2, tp=2, micro_batch_size=2),
    layout(cp=2, tp=2, micro_batch_size=2),
    layout(dp_shard=2, ep=2),
    layout(dp_shard=4, ep=2),
    layout(dp_shard=4, ep=4),
    layout(dp_shard=8, ep=4, ranks_per_node=2),
    layout(cp=2, ep=2),
    layout(tp=2, ep=2, micro_batch_size=2),
    # three and more
    *(layout(pp=2, dp_shard=2, ep=2, pp_schedule=schedule) for schedule in SCHEDULES),
    layout(pp=4, dp_shard=2, ep=2, pp_schedule="Interleaved1F1B"),
    layout(pp=4, dp_shard=2, ep=2, pp_schedule="ZBVZeroBubble"),
    layout(tp=2, dp_shard=2, ep=2, micro_batch_size=2),
    layout(tp=2, dp_shard=2, ep=4),
    layout(cp=2, dp_shard=2, ep=2),
    layout(cp=2, dp_shard=2, ep=4, ranks_per_node=2),
    layout(dp_replicate=2, dp_shard=2, ep=2),
    layout(dp_replicate=2, dp_shard=2, tp=2, ep=4, micro_batch_size=2),
    layout(pp=2, dp_replicate=2, dp_shard=2, ep=2),
    layout(pp=2, tp=2, ep=2),
    layout(pp=2, tp=2, ep=2, pp_schedule="ZBVZeroBubble"),
    layout(pp=2, tp=2, dp_shard=2, ep=2),
    layout(pp=2, tp=2, dp_shard=2, ep=4, pp_schedule="DualPipeV", ranks_per_node=2),
    layout(pp=2, cp=2, tp=2, ep=4, micro_batch_size=2),
    layout(pp=2, cp=2, dp_shard=2, ep=2, pp_schedule="InterleavedZeroBubble"),
    # microbatches
    layout(micro_batch_size=2),
    layout(micro_batch_size=4),
    layout(micro_batch_size=8),
    layout(dp_shard=2, micro_batch_size=4, ep=2),
    layout(pp=2, micro_batch_size=2, pp_schedule="1F1B"),
    layout(tp=2, cp=2, micro_batch_size=8, ep=2),
    # activation checkpointing
    layout(activation_checkpointing="full", activation_checkpointing_every=2),
    layout(
        dp_shard=2,
        tp=2,
        ep=4,
        micro_batch_size=4,
        activation_checkpointing="full",
        ranks_per_node=2,
    ),
    layout(pp=2, cp=2, ep=2, activation_checkpointing="full", pp_schedule="Interleaved1F1B"),
    layout(
        pp=2,
        dp_shard=2,
        ep=2,
        activation_checkpointing="selective",
        selective_products=True,
        activation_offload=True,
        pp_schedule="ZBVZeroBubble",
    ),
    layout(pp=2, activation_checkpointing="selective", pp_schedule="InterleavedZeroBubble"),
    layout(pp=2, tp=2, ep=2, activation_checkpointing="stream", pp_schedule="ZBVZeroBubble"),
    layout(
        pp=2,
        dp_shard=2,
        ep=2,
        activation_checkpointing="stream",
        stream_pieces=3,
        activation_offload=True,
        pp_schedule="ZBVZeroBubble",
    ),
    # compiled
    layout(dp_shard=2, compile=True),
    layout(cp=2, ep=2, compile=True, activation_checkpointing="selective"),
    # layers by hand
    layout(pp=2, pp_layers=(5, 3), pp_schedule="GPipe"),
    layout(pp=2, pp_layers=(1, 2, 1, 1, 2, 1), pp_schedule="Interleaved1F1B"),
]


@pytest.mark.parametrize(("n", "sizes"), MATRIX)
def test_step_does_not_depend_on_the_layout(ranks, inputs, one_process, n, sizes):
    results = on_ranks(ranks, n, directory=inputs, **sizes)
    for result, reference, label in zip(
        results, one_process, ("without", "with losses of routing"), strict=True
    ):
        compare(result, reference, label)
        if sizes.get("micro_batch_size", 1) > 1:
            continue  # the documents of several rows lie together: other places, same tokens
        assert result["routing"].keys() == reference["routing"].keys()
        for name, expected in reference["routing"].items():
            assert torch.equal(result["routing"][name], expected), f"layer {name} routes otherwise"


def test_the_batches_were_hard(inputs, one_process):
    """Microbatches without a document, gradients everywhere, an active clip, losses of routing
    that matter, and correction biases that fall and rise.
    """
    without, balanced = one_process
    assert without["empty"] >= STEPS
    assert max(without["norms"]) > 0.05
    for result in one_process:
        assert all(g.abs().max() > 0 for g in result["gradients"].values())
    assert (
        balanced["norms"][0] > 1.001 * without["norms"][0]
        or balanced["norms"][0] < 0.999 * without["norms"][0]
    )
    assert balanced["losses"][0] == without["losses"][0]  # reported apart
    before = load_file(Path(inputs, "model", "model.safetensors"))
    for name, bias in without["state"].items():
        if name.endswith("e_score_correction_bias"):
            moved = (bias - before[name]) / BIAS_UPDATE_RATE
            torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-4)
            assert moved.min() < 0 < moved.max() and moved.round().abs().max() <= STEPS


@pytest.mark.parametrize(
    ("n", "sizes"), [layout(dp_shard=4, ep=2), layout(cp=2, tp=2, ep=4, micro_batch_size=4)]
)
def test_a_tied_model_with_yarn_and_biases_and_without_q_lora_does_not_depend_on_the_layout_either(
    ranks, inputs, n, sizes
):
    options = {"directory": inputs, "model": "other"}
    for result, reference in zip(
        on_ranks(ranks, n, **sizes, **options), on_ranks(ranks, 1, **options), strict=True
    ):
        compare(result, reference)


# Grouped-query attention, layers of two kinds, no shared experts: what differs from DeepSeek-V3 by
# axis, and some together.
QWEN3_MATRIX = [
    layout(pp=2, pp_schedule="1F1B"),
    layout(pp=2, pp_schedule="Interleaved1F1B"),
    layout(pp=2, pp_schedule="ZBVZeroBubble"),
    layout(dp_replicate=2),
    layout(cp=2),
    layout(cp=4, micro_batch_size=2),  # more ranks than key/value heads
    layout(tp=2),
    layout(tp=4, micro_batch_size=2),
    layout(dp_shard=4, ep=2),
    layout(pp=2, tp=2, ep=2),
    layout(cp=2, tp=2, ep=4, micro_batch_size=2),
    layout(pp=2, dp_shard=2, ep=2, pp_schedule="DualPipeV"),
    layout(pp=2, cp=2, ep=2, activation_checkpointing="selective", pp_schedule="Interleaved1F1B"),
    layout(pp=2, compile=True, pp_schedule="1F1B"),
]


@pytest.fixture(scope="module")
def one_process_qwen3(inputs, ranks):
    return on_ranks(ranks, 1, directory=inputs, model="qwen3")


@pytest.mark.parametrize(("n", "sizes"), QWEN3_MATRIX)
def test_step_of_qwen3_does_not_depend_on_the_layout(ranks, inputs, one_process_qwen3, n, sizes):
    results = on_ranks(ranks, n, directory=inputs, model="qwen3", **sizes)
    for result, reference in zip(results, one_process_qwen3, strict=True):
        compare(result, reference)


@pytest.mark.parametrize(
    ("n", "sizes"), [layout(pp=2, tp=2, pp_schedule="1F1B"), layout(cp=2, dp_shard=2)]
)
def test_neither_does_that_of_a_dense_model_with_biases(ranks, inputs, n, sizes):
    options = {"directory": inputs, "model": "qwen3-dense"}
    for result, reference in zip(
        on_ranks(ranks, n, **sizes, **options), on_ranks(ranks, 1, **options), strict=True
    ):
        compare(result, reference)


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        layout(dp_shard=4, ep=4, ranks_per_node=2),
        layout(pp=2, dp_shard=2, ep=2, pp_schedule="Interleaved1F1B"),
        layout(pp=2, tp=2, pp_schedule="ZBVZeroBubble"),
        layout(cp=2, tp=2, ep=2, micro_batch_size=8),
    ],
)
def test_bf16_compute_stays_close_to_fp32_on_several_ranks(ranks, inputs, one_process, n, sizes):
    """bf16 keeps 8 bits: 2 % of the loss; gradients of the right size, which a wrong factor of 2 or
    ep would not be.
    """
    result = on_ranks(ranks, n, directory=inputs, compute="bf16", **sizes)[0]
    compare_bf16(result, one_process[0])


def test_so_does_bf16_compute_of_qwen3(ranks, inputs, one_process_qwen3):
    """Its router, which is no DeepSeek router, stays in fp32 too."""
    options = {"pp": 2, "tp": 2, "ep": 2, "pp_schedule": "1F1B", "compute": "bf16"}
    result = on_ranks(ranks, 4, directory=inputs, model="qwen3", **options)[0]
    compare_bf16(result, one_process_qwen3[0])


def compare_bf16(result, expected_result):
    assert result["losses"] == pytest.approx(expected_result["losses"], rel=0.02)
    assert result["losses"] != expected_result["losses"]
    for name, expected in expected_result["gradients"].items():
        got = result["gradients"][name]
        assert got.dtype == torch.float32
        assert (got * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.1), name
    for name, tensor in result["state"].items():
        assert tensor.dtype == torch.float32
        if name.endswith("e_score_correction_bias"):  # a few tokens are routed otherwise
            apart = (tensor - expected_result["state"][name]) / BIAS_UPDATE_RATE
            torch.testing.assert_close(apart, apart.round(), rtol=0, atol=1e-4)
            assert apart.round().abs().max() <= 2 * STEPS


def poison_one_rank(directory: str) -> dict[str, Any]:
    """Two steps; in the first, one element of an expert's gradient on the last rank becomes nan."""
    config = config_for(directory, ep=2)
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        before = {name: full(t) for name, t in trainer.model.state_dict().items()}
        weight = trainer.model.model.layers["2"].mlp.experts.down_proj

        def poison(parameter: nn.Parameter) -> None:
            local(parameter.grad).view(-1)[:1].fill_(float("nan"))

        if world.rank == world.size - 1:
            weight.register_post_accumulate_grad_hook(poison)
        record, _ = trainer.train_step(next(trainer.loader))
        unchanged = all(
            torch.equal(full(t), before[name]) for name, t in trainer.model.state_dict().items()
        )
        return {
            "norm": record["grad_norm"],
            "unchanged": unchanged,
            "counters": (trainer.counters.step, trainer.counters.updates, trainer.counters.skipped),
            "moments": max(
                local(value).abs().max().item()
                for state in trainer.optimizer.state.values()
                for value in state.values()
            ),
        }


def test_a_nan_on_one_rank_changes_nothing_on_any(ranks, inputs):
    for result in ranks(2, poison_one_rank, directory=inputs):
        assert math.isnan(result["norm"])
        assert result["unchanged"] and result["counters"] == (1, 0, 1) and result["moments"] == 0


def refused(directory: str, model: str = "model", **sizes: Any) -> str:
    try:
        config = config_for(directory, model=model, **sizes)
        with World(config.parallel, 0) as world:
            SilentTrainer(config, world)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("n", "options", "sentence"),
    [
        (
            3,
            {"ep": 3, "global_batch_size": 6},
            "model.layers.2.mlp has 8 experts, which do not divide over --parallel.ep 3 ranks",
        ),
        (
            3,
            {"global_batch_size": 6},
            "dim 1 of layer 2's experts.gate_up_proj is 32, which does not divide over the 3 ranks",
        ),
        (
            4,
            {"pp": 3},
            "multiply to 3, but there are 4 ranks; start 6 ranks or lower pp, dp_replicate, cp "
            "or tp (together 3)",
        ),
        (
            4,
            {"tp": 2, "ep": 3},
            "--parallel.ep is 3, but it must divide dp_shard * cp * tp = 4; "
            "set it to one of 1, 2, 4",
        ),
        (
            3,
            {"tp": 3},
            "num_attention_heads = 4, which --parallel.tp 3 x --parallel.cp 1 = 3 ranks "
            "do not divide; set",
        ),
        (
            3,
            {"cp": 3, "global_batch_size": 6},
            "num_attention_heads = 4, which --parallel.tp 1 x --parallel.cp 3 = 3 ranks",
        ),
        (
            2,
            {"pp": 2, "pp_schedule": "1F1B", "micro_batch_size": 8},
            "1F1B with 2 stages on --parallel.pp 2 cannot do 1 microbatch",
        ),
        (2, {"pp": 2, "pp_layers": (1, 2, 3)}, "--parallel.pp-layers"),
        (
            2,
            {"pp": 2, "pp_layers": (4, 5), "pp_schedule": "GPipe"},
            "--parallel.pp-layers is 4 5, together 9, but it must place 8",
        ),
        (2, {"pp": 2, "model": "other"}, "tie_word_embeddings"),
        (
            2,
            {"pp": 2, "model": "shallow"},
            "has 4 stages, the model 3 layers; set --parallel.pp to at most 1",
        ),
        (
            4,
            {"cp": 2, "dp_shard": 2, "seq_len": 191},
            "the 191 tokens of a microbatch do not divide over cp 2 x tp 1 ranks",
        ),
    ],
)
def test_impossible_layouts_are_refused_on_every_rank_with_numbers_and_a_neighbour(
    ranks, inputs, n, options, sentence
):
    told = ranks(n, refused, directory=inputs, **options)
    assert all(sentence in words for words in told), told[0]
    assert all(words.count(". ") == 0 for words in told)  # one sentence


def silent_peer(directory: str) -> tuple[str, float]:
    """Rank 1 loads for longer than a collective may take, and stops answering in the second step;
    what the other rank meets, and after how many seconds.
    """
    config = config_for(directory, pp=2, pp_schedule="1F1B", timeout_seconds=5)
    world = World(config.parallel, 0)
    _set_pg_timeout(timedelta(seconds=1))
    load_weights = huggingface.load_weights

    def load_late(*arguments: Any) -> None:
        time.sleep(2 * world.rank)
        load_weights(*arguments)

    huggingface.load_weights = load_late
    try:
        trainer = SilentTrainer(config, world)
    finally:
        huggingface.load_weights = load_weights
    _set_pg_timeout(timedelta(seconds=5))
    trainer.train_step(next(trainer.loader))
    began = time.monotonic()
    if world.rank == 1:
        time.sleep(12)
        return "", 0.0
    try:
        trainer.train_step(next(trainer.loader))
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def test_a_peer_may_load_late_but_not_stop_answering_in_a_step_for_longer_than_the_timeout(
    ranks, inputs
):
    error, seconds = ranks(2, silent_peer, directory=inputs)[0]
    assert "imed out" in error or "imeout" in error, error
    assert 4 < seconds < 12  # before the peer is back


def group_timeouts(directory: str) -> set[float]:
    """Seconds that a collective may take in each group of all meshes; reads torch-private
    options.
    """
    with World(config_for(directory, ep=2).parallel, 0) as world:
        groups = [
            g
            for mesh in (world.dense, world.parameter, world.expert, world.sequence)
            for g in mesh.get_all_groups()
        ]
        return {g._get_backend(world.device).options._timeout.total_seconds() for g in groups}


def test_the_timeout_reaches_every_group(ranks, inputs):
    assert ranks(4, group_timeouts, directory=inputs)[0] == {60.0}


def test_block_wise_fp8_through_a_zero_bubble_pipeline(ranks, inputs):
    """A microbatch has the tiles of one process there, so the numbers are the same."""
    options = {"directory": inputs, "compute": "blockwise", "seq_len": 128}
    reference = on_ranks(ranks, 1, **options)
    split = on_ranks(ranks, 2, pp=2, dp_shard=1, pp_schedule="ZBVZeroBubble", **options)
    for result, expected in zip(split, reference, strict=True):
        compare(result, expected)
