"""One forward and backward pass of a tiny random model over several microbatches, on any layout of
ranks without a pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.families import tiny
from tests.tiny import tiny_config, tiny_qwen3_config
from torchsft.checkpoint.boxes import local_box
from torchsft.config import Parallel, Precision
from torchsft.models.decoder import seeded_normal
from torchsft.models.families import build_model
from torchsft.models.language_model import LanguageModel
from torchsft.models.loss import Objective
from torchsft.parallel.apply import parallelize
from torchsft.parallel.gradients import global_norm, sum_summands
from torchsft.parallel.world import World

TOKENS = 96
# Bounds of 2 and 4 ranks (every 24 tokens) fall into documents; padding on one rank alone, on most,
# everywhere, nowhere.
DOCUMENTS = ((5, 40, 1, 33, 2), (30,), (), (7, 89))


def build(qwen3: bool = False, family: str = "", **changes: Any) -> LanguageModel:
    """A tiny model on the meta device, DeepSeek-V3 or Qwen3, with changes to tests/tiny.py's sizes;
    or a `family` of tests/families.py.
    """
    config = tiny_qwen3_config(**changes) if qwen3 else tiny_config(**changes)
    if family:
        config = tiny(family, **changes)
    described = config.to_dict() | {"architectures": None}  # model_type tells
    with torch.device("meta"):
        return build_model(described, loss_chunk=20)  # does not divide the tokens of any rank


def value(name: str, shape: torch.Size) -> torch.Tensor:
    """Random weights, norms and biases that depend on their name alone."""
    normal = seeded_normal(name, tuple(shape), 0.15, seed=0)
    return 1 + normal if "norm" in name else normal


def fill(model: LanguageModel) -> None:
    """Give a model on meta memory and values, on whatever mesh it lies."""
    model.to_empty(device="cpu")
    model.init_buffers()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            box = local_box(tensor)
            mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            mine.copy_(value(name, tensor.shape)[box.within([0] * tensor.ndim)])


def microbatch(number: int) -> dict[str, Any]:
    """Keyword arguments of the model: ragged documents, some labels missing, ragged weights."""
    lengths = DOCUMENTS[number]
    draw = torch.Generator().manual_seed(number)
    tokens, labels = torch.randint(272, (2, TOKENS), generator=draw)
    weights = torch.rand(TOKENS, generator=draw).mul(2)
    weights[torch.rand(TOKENS, generator=draw) < 0.3] = 0
    weights[sum(lengths) :] = 0
    return {
        "tokens": tokens,
        "labels": torch.where(weights == 0, -100, labels),
        "loss_weights": weights,
        "positions": torch.cat(
            [
                *(torch.arange(n) for n in lengths),
                torch.zeros(TOKENS - sum(lengths), dtype=torch.int64),
            ]
        ),
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "max_seqlen": max(lengths, default=0),
    }


def on_nodes(ranks_per_node: int, call: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function, on ranks of a pool as if each machine had some of them."""
    local_rank = int(os.environ["RANK"]) % ranks_per_node
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks_per_node), "LOCAL_RANK": str(local_rank)}
    return call(**arguments)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def training_pass(
    parallel: dict[str, int],
    balance: float = 0.0,
    compute: torch.dtype = torch.float32,
    precision: Precision | None = None,
    objective: tuple[float, float] = (0.0, 0.0),
    **changes: Any,
) -> dict[str, Any]:
    """Loss sum, gradients, their norm and expert loads of all microbatches together; for `ranks`.

    Args:
        parallel: mesh sizes.
        balance: factor of the balance loss.
        compute: dtype of the passes.
        precision: number format of products.
        objective: label smoothing and factor of the z-loss.
        changes: to the tiny model; see `build`.
    """
    with World(Parallel(timeout_seconds=60, **parallel), 0) as world:
        model = build(**changes)
        parallelize([model], world, compute, precision=precision)
        fill(model)
        model.objective = Objective(*objective)
        for moe in model.moe_layers().values():
            moe.balance_scale = balance
        mine = [
            microbatch(number) for number in range(world.data_rank, len(DOCUMENTS), world.data_size)
        ]
        loss = torch.zeros((), dtype=torch.float64)
        for batch in mine:
            batch_loss = model(**batch)
            batch_loss.backward()
            loss += batch_loss.detach()
        sum_summands(model.parameters(), world.parameter["tp"], world.device, {})
        loss /= world.dense["tp"].size()  # the ranks of a tensor group return the same sum
        moes = model.moe_layers().values()
        none = torch.zeros(0)  # of a dense model
        loads = torch.stack([moe.expert_load for moe in moes]) if moes else none
        balances = torch.stack([moe.balance_loss for moe in moes]) if moes else none
        sums = model.objective_sums / world.dense["tp"].size()
        for total in (loss, loads, balances, sums):
            dist.all_reduce(total)
        gradients = {name: full(p.grad) for name, p in model.named_parameters()}
        norm = global_norm(model.parameters()).item()
        model.eval()
        batch = microbatch(0)
        del batch["labels"], batch["loss_weights"]
        with torch.no_grad():
            logits = model(**batch, logits_at=torch.tensor([3, 80, 30]))
    result = {"loss": loss.item(), "norm": norm, "sums": sums.tolist()}
    if world.rank == 0:
        result |= {"gradients": gradients, "loads": loads, "balances": balances, "logits": logits}
    return result


def compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """fp32 sums in another order: 1e-6 of the loss and the norm, 1e-5 of each gradient's largest
    element; returns these.
    """
    # every rank says the same
    assert {(r["loss"], r["norm"]) for r in results} == {(results[0]["loss"], results[0]["norm"])}
    result = results[0]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert result["norm"] == pytest.approx(expected["norm"], rel=1e-6)
    assert result["sums"] == pytest.approx(expected["sums"], rel=1e-6)
    assert torch.equal(result["loads"], expected["loads"])
    torch.testing.assert_close(result["balances"], expected["balances"], rtol=1e-6, atol=0)
    torch.testing.assert_close(result["logits"], expected["logits"], rtol=0, atol=1e-5)
    assert result["gradients"].keys() == expected["gradients"].keys()
    errors, wrong = {}, []
    for name, reference in expected["gradients"].items():
        got = result["gradients"][name]
        assert reference.abs().max() > 0, name
        errors[name] = ((got - reference).abs().max() / reference.abs().max()).item()
        if not errors[name] <= 1e-5:
            factor = (got * reference).sum() / reference.square().sum()
            wrong.append(f"{name}: error {errors[name]:.1e}, scaled by {factor:.4f}")
    assert not wrong, "gradients differ:\n" + "\n".join(wrong)
    return errors
