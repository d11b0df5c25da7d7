"""Frozen parameters and groups of parameters: every layout trains what one process trains, and
moves nothing else.

A job trains all cases on one set of ranks. What one process does is held to `transformers` in
tests/test_trainer.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed.test_layouts import SilentTrainer, config_for, full, layout
from tests.distributed.test_resume import train as train_leg
from tests.tiny import write_conversations, write_tiny_model
from torchsft.parallel.world import World

# What is frozen, groups. The model has four layers, the first of them dense.
CASES = {
    "the first stages": (["embeddings", "layers.0-1"], []),
    "all but embeddings and one layer": (["layers.0-1", "layers.3", "model.norm", "lm_head"], []),
    "all but the head": (["embeddings", "layers", "model.norm"], []),
    # by --router.train false, with the correction bias moving
    "the router": ([], ["experts:lr=2e-3,weight_decay=0", "*norm*:lr=0.05"]),
    "experts and some of each layer": (
        ["experts", "*_layernorm", "*.kv_a_proj_with_mqa", "*.q_b_proj", "*.shared_experts"],
        [],
    ),
}


def train(directory: str, **sizes: Any) -> dict[str, dict[str, Any]]:
    """Two steps of each case: numbers, gradients of the first step, parameters and moments at the
    end, as far as here.
    """
    results = {}
    sizes = {"seq_len": 128, "global_batch_size": 4} | sizes
    with World(config_for(directory, **sizes).parallel, 0) as world:
        for name, (freeze, groups) in CASES.items():
            config = config_for(directory, freeze=tuple(freeze), groups=tuple(groups), **sizes)
            config.data.workers = 0
            if name == "the router":
                config.router.train, config.router.bias_update_rate = False, 0.02
            results[name] = two_steps(SilentTrainer(config, world))
    return results


def two_steps(trainer: SilentTrainer) -> dict[str, Any]:
    before = {name: full(p) for name, p in trainer.model.named_parameters()}
    gradients: list[dict[str, torch.Tensor]] = []
    update = trainer.optimizer.step

    def keep_gradients_and_update() -> None:
        gradients.append(
            {n: full(p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
        update()

    backward: set[str] = set()  # layers whose output takes part in the backward pass
    for name, layer in trainer.model.model.layers.items():
        layer.register_forward_hook(
            lambda _, __, output, name=name: backward.update([name] if output.requires_grad else [])
        )
    trainer.optimizer.step = keep_gradients_and_update
    trainer.config.router.aux_loss = 0.05
    records = [trainer.train_step(next(trainer.loader))[0] for _ in range(2)]
    named = dict(trainer.model.named_parameters())
    still = sorted(name for name, p in named.items() if torch.equal(full(p), before[name]))
    state = {name: full(p) for name, p in named.items()}
    moments = {
        n: full(trainer.optimizer.state[p]["exp_avg"])
        for n, p in named.items()
        if p in trainer.optimizer.state
    }
    return {
        "numbers": [(r["loss"], r["grad_norm"], r["lr"], r["aux_loss"]) for r in records],
        "still": still,
        "backward": backward,
        "gradients": gradients[0],
        "state": state,
        "moments": moments,
    }


def on_ranks(ranks, n: int, **options: Any) -> dict[str, dict[str, Any]]:
    """Of each case what all ranks together have; a pipeline's ranks have a part each."""
    whole: dict[str, dict[str, Any]] = {}
    for of_rank in ranks(n, train, **options):
        for case, result in of_rank.items():
            empty = {key: {} for key in ("gradients", "state", "moments")}
            known = whole.setdefault(case, empty | {"still": set(), "backward": set()})
            assert known.setdefault("numbers", result["numbers"]) == result["numbers"]
            known["still"] |= set(result["still"])
            known["backward"] |= result["backward"]
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
    names = one_process["the router"]["state"].keys()
    frozen = {case: result["still"] for case, result in one_process.items()}
    assert frozen["all but the head"] == names - {"lm_head.weight"}
    assert frozen["the router"] == {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2, 3)}
    beginnings = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    backward = {case: sorted(result["backward"]) for case, result in one_process.items()}
    assert backward["the first stages"] == ["2", "3"] and backward["all but the head"] == []
    assert frozen["the first stages"] == {name for name in names if name.startswith(beginnings)}
    for result in one_process.values():
        assert result["gradients"].keys() == result["moments"].keys() == names - result["still"]
        assert all(moment.abs().max() > 0 for moment in result["moments"].values())
        norm = sum(float(g.double().square().sum()) for g in result["gradients"].values()) ** 0.5
        assert norm == pytest.approx(0.05, rel=1e-4)  # clipped, over what is trained


# Schedules that split the backward pass, frozen parts in FSDP's groups, replicated and partial
# gradients.
MATRIX = [
    layout(pp=2, pp_schedule="1F1B"),
    layout(pp=2, pp_schedule="InterleavedZeroBubble"),
    layout(pp=2, dp_shard=2, ep=2, pp_schedule="ZBVZeroBubble"),
    layout(dp_replicate=2),
    layout(cp=2, tp=2, ep=2, micro_batch_size=4, activation_checkpointing="full"),
]


@pytest.mark.parametrize(("n", "sizes"), MATRIX)
def test_no_layout_changes_what_is_frozen_or_how_the_rest_is_trained(
    ranks, inputs, one_process, n, sizes
):
    """fp32 sums in another order, as in test_layouts.py."""
    results = on_ranks(ranks, n, directory=inputs, **sizes)
    wrong = []
    for case, expected in one_process.items():
        result = results[case]
        assert (result["still"], result["backward"]) == (expected["still"], expected["backward"]), (
            case
        )
        for got, wanted in zip(result["numbers"], expected["numbers"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-5), case
        for key, tolerance in (("gradients", 1e-5), ("state", 1e-5), ("moments", 1e-4)):
            assert result[key].keys() == expected[key].keys(), (case, key)
            for name, tensor in expected[key].items():
                error = ((result[key][name] - tensor).abs().max() / tensor.abs().max()).item()
                if not error <= tolerance:
                    wrong.append(f"{case}: {key} of {name} by {error:.1e}")
    assert not wrong, "\n".join(wrong)


def test_a_run_in_two_layouts_is_the_run_in_one(ranks, inputs, tmp_path):
    """A rank of the first has nothing to train: its stage is frozen whole. The last leg comes back
    to it.
    """
    options = {
        "directory": inputs,
        "freeze": ("embeddings", "layers.0-1", "router"),
        "groups": ("*norm*:lr=0.05",),
    }
    options |= {"global_batch_size": 4}
    (whole,) = ranks(1, train_leg, output=str(tmp_path / "whole"), start=0, stop=4, **options)
    run = {"output": str(tmp_path / "run")} | options
    ranks(2, train_leg, start=0, stop=2, pp=2, pp_schedule="1F1B", **run)
    metadata = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-00000002").read_metadata()
    names = metadata.state_dict_metadata.keys()
    assert "optimizer.state.lm_head.weight.exp_avg" in names
    assert not [
        n
        for n in names
        if n.startswith("optimizer.")
        and any(part in n for part in (".gate.", ".layers.1.", "embed"))
    ]
    numbers = ranks(2, train_leg, start=2, stop=3, ep=2, **run)[0]["numbers"]
    results = ranks(2, train_leg, start=3, stop=4, pp=2, pp_schedule="1F1B", **run)
    numbers += results[0]["numbers"]
    assert numbers == [pytest.approx(step, rel=1e-5) for step in whole["numbers"][2:]]
    state = results[0]["state"] | results[1]["state"]
    assert state.keys() == whole["state"].keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, whole["state"][name], rtol=0, atol=2e-5, msg=name)
