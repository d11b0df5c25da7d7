"""Every layout of ranks computes the training step of one process.

Through the real `Trainer`: same weights, same rows, fp32. Compared with one process on one rank: loss, norm, every element of
every gradient and, after three optimizer steps, every parameter.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.tiny import write_conversations, write_tiny_model
from torchsft.config import Checkpoint, Config, Data, InputError, Metrics, Model, Optim, Parallel, Precision, Train
from torchsft.parallel.world import World
from torchsft.trainer import Trainer

STEPS = 3


class SilentTrainer(Trainer):
    """Several layouts share an output directory: nothing is written."""

    def open_output(self) -> None:
        pass


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def config_for(directory: str, ep: int, micro_batch_size: int = 1, model: str = "model", **changes: Any) -> Config:
    """8 rows a step; the last rows of the third step are padding, so that some microbatch has no document at all."""
    base = Path(directory)
    return Config(
        model=Model(path=str(base / model)),
        data=Data(train=(str(base / "train.jsonl"),), seq_len=192),
        train=Train(steps=STEPS, global_batch_size=changes.pop("global_batch_size", 8), micro_batch_size=micro_batch_size),
        parallel=Parallel(ep=ep, timeout_seconds=60),
        # A large eps keeps AdamW smooth: with a small one, rounding decides the direction of elements without a gradient.
        optim=Optim(lr=1e-2, eps=1e-3, clip_norm=0.05, warmup_steps=1, schedule="linear"),
        checkpoint=Checkpoint(export="none"),
        metrics=Metrics(tensorboard=False, progress=False),
        output=changes.pop("output", str(base / "unused-output")),
        **changes,
    )


def train(directory: str, ep: int, compute: str = "fp32", **options: Any) -> dict[str, Any]:
    """A few steps on the calling ranks; the gradients are those of the first step, after clipping."""
    config = config_for(directory, ep, precision=Precision(compute=compute), **options)
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        gradients: dict[str, torch.Tensor] = {}
        update = trainer.optimizer.step

        def keep_gradients_and_update() -> None:
            if not gradients:
                gradients.update((name, full(p.grad)) for name, p in trainer.model.named_parameters())
            update()

        trainer.optimizer.step = keep_gradients_and_update
        records, empty, ids = [], 0, []
        for _ in range(STEPS):
            step = next(trainer.loader)
            empty += sum(int(b.cu_seqlens[-1]) == 0 for b in step.microbatches)
            ids.append(step.sample_ids)
            records.append(trainer.train_step(step)[0])
        state = {name: full(t) for name, t in trainer.model.state_dict().items()}
    result = {"ids": ids, "empty": empty, "losses": [r["loss"] for r in records], "norms": [r["grad_norm"] for r in records]}
    if world.rank == 0:
        result |= {"gradients": gradients, "state": state, "tokens": [r["tokens"] for r in records]}
    return result


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    write_tiny_model(directory / "model")
    other = {"tie_word_embeddings": True, "q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1}
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    write_tiny_model(directory / "other", rope_parameters=yarn, **other)
    write_conversations(directory / "train.jsonl", 36)
    return str(directory)


@pytest.fixture(scope="module")
def one_process(inputs, ranks):
    return ranks(1, train, directory=inputs, ep=1, micro_batch_size=8)[0]


def compare(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """fp32 sums in another order: 1e-6 of the loss and norm, 1e-5 of each tensor's largest gradient."""
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-6)
    assert result["tokens"] == reference["tokens"]
    wrong = []
    for name, expected in reference["gradients"].items():
        got = result["gradients"][name]
        error = (got - expected).abs().max() / expected.abs().max()
        if not error <= 1e-5:
            factor = (got * expected).sum() / expected.square().sum()
            wrong.append(f"{name}: error {error:.1e}, scaled by {factor:.4f}")
    assert not wrong, "gradients differ:\n" + "\n".join(wrong)
    for name, expected in reference["state"].items():
        torch.testing.assert_close(result["state"][name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("world_size", "ep"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_step_does_not_depend_on_the_layout(ranks, inputs, one_process, world_size, ep):
    results = ranks(world_size, train, directory=inputs, ep=ep)
    compare(results[0], one_process)
    assert len({tuple(r["losses"] + r["norms"]) for r in results}) == 1  # all ranks report the same
    for step, expected in enumerate(one_process["ids"]):  # the ranks read disjoint parts of the same global batch
        assert [i for r in results for i in r["ids"][step]] == expected


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_step_does_not_depend_on_accumulation(ranks, inputs, one_process, micro_batch_size):
    compare(ranks(1, train, directory=inputs, ep=1, micro_batch_size=micro_batch_size)[0], one_process)


def test_the_batches_were_hard(one_process, ranks, inputs):
    """Some microbatch has no document, gradients exist everywhere and the clip was active."""
    assert max(one_process["norms"]) > 0.05
    assert all(g.abs().max() > 0 for g in one_process["gradients"].values())
    assert ranks(1, train, directory=inputs, ep=1, micro_batch_size=1)[0]["empty"] > 0


def test_a_tied_model_with_yarn_and_without_q_lora_does_not_depend_on_the_layout_either(ranks, inputs):
    options = {"directory": inputs, "model": "other"}
    compare(ranks(4, train, ep=2, **options)[0], ranks(1, train, ep=1, **options)[0])


def test_bf16_compute_stays_close_to_fp32_on_several_ranks(ranks, inputs, one_process):
    """bf16 keeps 8 bits: 2 % of the loss; gradients of the right size, which a wrong factor of 2 or ep would not be."""
    result = ranks(4, train, directory=inputs, ep=2, compute="bf16")[0]
    assert result["losses"] == pytest.approx(one_process["losses"], rel=0.02)
    assert result["losses"] != one_process["losses"]
    for name, expected in one_process["gradients"].items():
        got = result["gradients"][name]
        assert got.dtype == torch.float32
        assert (got * expected).sum() / expected.square().sum() == pytest.approx(1, abs=0.1), name
    for name, tensor in result["state"].items():
        assert tensor.dtype == torch.float32
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, one_process["state"][name])


def poison_one_rank(directory: str) -> dict[str, Any]:
    """Two steps; in the first, one element of an expert's gradient on the last rank becomes nan."""
    config = config_for(directory, ep=2)
    with World(config.parallel, 0) as world:
        trainer = SilentTrainer(config, world)
        before = {name: full(t) for name, t in trainer.model.state_dict().items()}
        weight = trainer.model.model.layers["1"].mlp.experts.down_proj
        if world.rank == world.size - 1:
            weight.register_post_accumulate_grad_hook(lambda p: p.grad.to_local().view(-1)[:1].fill_(float("nan")))
        record, _ = trainer.train_step(next(trainer.loader))
        unchanged = all(torch.equal(full(t), before[name]) for name, t in trainer.model.state_dict().items())
        return {
            "norm": record["grad_norm"],
            "unchanged": unchanged,
            "counters": (trainer.step, trainer.updates, trainer.skipped),
            "moments": len(trainer.optimizer.state),
        }


def test_a_nan_on_one_rank_changes_nothing_on_any(ranks, inputs):
    for result in ranks(2, poison_one_rank, directory=inputs):
        assert math.isnan(result["norm"])
        assert result["unchanged"] and result["counters"] == (1, 0, 1) and result["moments"] == 0


def refused(directory: str, ep: int) -> str:
    config = config_for(directory, ep, global_batch_size=6)
    with World(config.parallel, 0) as world:
        try:
            SilentTrainer(config, world)
        except InputError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("ep", "sentence"),
    [
        (3, "model.layers.1.mlp has 8 experts, which do not divide over --parallel.ep 3 ranks"),
        (1, "dim 1 of layer 1's experts.gate_up_proj is 32, which does not divide over the 3 ranks"),
    ],
)
def test_experts_that_do_not_divide_are_refused_on_every_rank(ranks, inputs, ep, sentence):
    assert all(sentence in told for told in ranks(3, refused, directory=inputs, ep=ep))


def group_timeouts(directory: str) -> set[float]:
    """Seconds that a collective may take in each group of both meshes; reads torch-private options."""
    with World(config_for(directory, ep=2).parallel, 0) as world:
        groups = [*world.dense.get_all_groups(), *world.expert.get_all_groups()]
        return {g._get_backend(world.device).options._timeout.total_seconds() for g in groups}


def test_the_timeout_reaches_every_group(ranks, inputs):
    assert ranks(4, group_timeouts, directory=inputs)[0] == {60.0}
