"""Frozen parameters and groups of parameters: every layout trains what one process trains, and moves nothing else.

A job trains all cases on one set of ranks. What one process does is held to `transformers` in tests/optim/test_selection.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import SilentTrainer, config_for, full, layout
from tests.tiny import write_conversations, write_tiny_model
from torchsft.parallel.world import World

# What is frozen, groups. The model has four layers, the first of them dense.
CASES = {
    "the first stages": ([], ["embeddings", "layers.0-1"]),
    "nothing at the beginning but the last stage": ([], ["model.norm", "lm_head", "layers.2-3"]),
    "a stage in the middle": ([], ["layers.1-2"]),
    "all layers": ([], ["layers"]),
    "all but the head": ([], ["embeddings", "layers", "model.norm"]),
    "the router": (["experts:lr=2e-3", "*norm*:lr=0.05"], ["router"]),
    "the experts": (["embeddings:weight_decay=0.5,lr=1e-3"], ["experts"]),
    "some of each layer": (
        [],
        ["*_layernorm", "*.kv_a_proj_with_mqa", "*.q_b_proj", "*.o_proj", "*.down_proj", "*.shared_experts"],
    ),
    "what the router's input needs": ([], ["embeddings", "*.self_attn", "*.input_layernorm", "layers.0", "experts"]),
    "groups alone": (["layers.0-1:lr=1e-3", "layers:weight_decay=0", "*:lr=2e-2,weight_decay=0.3"], []),
}


def train(directory: str, **sizes: Any) -> dict[str, dict[str, Any]]:
    """Two steps of each case: numbers, gradients of the first step, parameters and moments at the end, as far as here."""
    results = {}
    sizes = {"seq_len": 128, "global_batch_size": 4} | sizes
    with World(config_for(directory, **sizes).parallel, 0) as world:
        for name, (groups, freeze) in CASES.items():
            config = config_for(directory, **sizes)
            config.train.freeze, config.optim.groups = tuple(freeze), tuple(groups)
            config.data.workers = 0
            results[name] = two_steps(SilentTrainer(config, world))
    return results


def two_steps(trainer: SilentTrainer) -> dict[str, Any]:
    before = {name: full(p) for name, p in trainer.model.named_parameters()}
    gradients: list[dict[str, torch.Tensor]] = []
    update = trainer.optimizer.step

    def keep_gradients_and_update() -> None:
        gradients.append({n: full(p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None})
        update()

    trainer.optimizer.step = keep_gradients_and_update
    trainer.config.train.aux_loss = 0.05
    records = [trainer.train_step(next(trainer.loader))[0] for _ in range(2)]
    named = dict(trainer.model.named_parameters())
    still = sorted(name for name, p in named.items() if torch.equal(full(p), before[name]))
    state = {name: full(p) for name, p in named.items()}
    moments = {n: full(trainer.optimizer.state[p]["exp_avg"]) for n, p in named.items() if p in trainer.optimizer.state}
    return {
        "numbers": [(r["loss"], r["grad_norm"], r["lr"], r["aux_loss"]) for r in records],
        "still": still,
        "gradients": gradients[0],
        "state": state,
        "moments": moments,
        "groups": sorted((g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups if g["params"]),
    }


def on_ranks(ranks, n: int, **options: Any) -> dict[str, dict[str, Any]]:
    """Of each case what all ranks together have; a pipeline's ranks have a part each."""
    whole: dict[str, dict[str, Any]] = {}
    for of_rank in ranks(n, train, **options):
        for case, result in of_rank.items():
            known = whole.setdefault(case, {key: {} for key in ("gradients", "state", "moments")} | {"still": set()})
            assert known.setdefault("numbers", result["numbers"]) == result["numbers"]
            known["still"] |= set(result["still"])
            for key in ("gradients", "state", "moments"):
                known[key] |= result[key]
    return whole


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("freeze")
    write_tiny_model(directory / "model", num_hidden_layers=4)
    write_conversations(directory / "train.jsonl", 10)
    return str(directory)


@pytest.fixture(scope="module")
def one_process(inputs, ranks):
    return on_ranks(ranks, 1, directory=inputs)


def test_what_is_frozen_is_left_alone_and_all_else_is_trained(one_process):
    names = one_process["groups alone"]["state"].keys()
    assert not one_process["groups alone"]["still"]
    frozen = {case: result["still"] for case, result in one_process.items()}
    assert all(frozen[case] for case in CASES if CASES[case][1])
    assert frozen["all but the head"] == names - {"lm_head.weight"}
    assert frozen["the router"] == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2, 3)}
    experts = {f"model.layers.{i}.mlp.experts.{part}_proj" for i in (1, 2, 3) for part in ("gate_up", "down")}
    assert frozen["the experts"] == experts
    for result in one_process.values():
        assert result["gradients"].keys() == result["moments"].keys() == names - result["still"]
        assert all(moment.abs().max() > 0 for moment in result["moments"].values())
        norm = sum(float(g.double().square().sum()) for g in result["gradients"].values()) ** 0.5
        assert norm == pytest.approx(0.05, rel=1e-4)  # clipped, over what is trained


# Schedules that split the backward pass, frozen parts in FSDP's groups, replicated and partial gradients.
MATRIX = [
    *(layout(pp=2, pp_schedule=schedule) for schedule in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")),
    layout(pp=4, pp_schedule="GPipe"),
    layout(dp_shard=2, ep=2),
    layout(dp_replicate=2, dp_shard=2),
    layout(cp=2, tp=2, ep=2, micro_batch_size=2),
    layout(tp=2, activation_checkpointing="full", micro_batch_size=2),
    layout(pp=2, dp_shard=2, ep=2, pp_schedule="ZBVZeroBubble"),
    layout(pp=2, tp=2, pp_schedule="Interleaved1F1B"),
]


@pytest.mark.parametrize(("n", "sizes"), MATRIX)
def test_no_layout_changes_what_is_frozen_or_how_the_rest_is_trained(ranks, inputs, one_process, n, sizes):
    """fp32 sums in another order, as in test_layouts.py."""
    results = on_ranks(ranks, n, directory=inputs, **sizes)
    wrong = []
    for case, expected in one_process.items():
        result = results[case]
        assert result["still"] == expected["still"], case
        for got, wanted in zip(result["numbers"], expected["numbers"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-5), case
        for key, tolerance in (("gradients", 1e-5), ("state", 1e-5), ("moments", 1e-4)):
            assert result[key].keys() == expected[key].keys(), (case, key)
            for name, tensor in expected[key].items():
                error = ((result[key][name] - tensor).abs().max() / tensor.abs().max()).item()
                if not error <= tolerance:
                    wrong.append(f"{case}: {key} of {name} by {error:.1e}")
    assert not wrong, "\n".join(wrong)
