"""Pipelines of every schedule against the same model on one process; balance against brute force;
what is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.models.oracle import VOCABULARY, packed
from tests.tiny import tiny_config
from torchsft.checkpoint.huggingface import initialise_weights
from torchsft.config import InputError, Parallel, Train
from torchsft.data.batch import Batch
from torchsft.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from torchsft.parallel import fsdp
from torchsft.parallel import stages as planning
from torchsft.parallel.apply import parallelize
from torchsft.parallel.compute_copies import ComputeCopies
from torchsft.parallel.pipeline import build_pipeline, reshard_after_forward, split
from torchsft.parallel.stages import (
    StagePlan,
    balance,
    microbatches_in_flight,
    plan_stages,
    schedule_class,
)
from torchsft.parallel.torch_pipelining import Stage, _single_actions
from torchsft.parallel.world import World

SCHEDULES = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]
TOKENS = 24
# of each microbatch: one has none
DOCUMENTS = [[24], [5, 7], [], [1, 1, 20], [10, 3], [2], [11, 12], [6, 6, 6, 6]]
WEIGHT = 17.0
BALANCE = 1e-3
PROMPT = {
    "tokens": torch.arange(13),
    "positions": torch.cat([torch.arange(9), torch.arange(4)]),
    "cu_seqlens": torch.tensor([0, 9, 13], dtype=torch.int32),
    "max_seqlen": 9,
    "logits_at": torch.tensor([8, 12]),
}


def model_config(layers: int = 8, **changes: Any) -> DeepseekV3Config:
    hf = tiny_config(vocab_size=VOCABULARY, num_hidden_layers=layers, **changes)
    return DeepseekV3Config.from_hf(hf.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]})


def batches(count: int, data_rank: int = 0) -> list[Batch]:
    documents = [DOCUMENTS[i % len(DOCUMENTS)] for i in range(count)]
    return [
        Batch(**packed(d, TOKENS - sum(d), seed=100 * data_rank + i), padding=TOKENS - sum(d))
        for i, d in enumerate(documents)
    ]


def set_balance_loss(model: DeepseekV3) -> None:
    for moe in model.moe_layers().values():
        moe.balance_scale = BALANCE


def update(model: DeepseekV3) -> None:
    """Change every parameter, as an optimizer would: what was gathered before is stale."""
    with torch.no_grad():
        for p in model.parameters():
            p.grad = None
            p.mul_(0.9)


def one_process(microbatches: int, data_size: int) -> dict[str, Any]:
    """Without any parallelism: loss and gradients, loss of one batch more and logits; loss and
    gradients after an update.
    """
    model = DeepseekV3(model_config())
    initialise_weights(model, 0)
    set_balance_loss(model)
    rows = [batch for rank in range(data_size) for batch in batches(microbatches, rank)]
    result: dict[str, Any] = {}
    for when in ("first", "again"):
        loss = 0.0
        for batch in rows:
            one = model(**batch.model_inputs())
            (one / WEIGHT).backward()
            loss += one.item()
        result[when] = {
            "loss": loss,
            "gradients": {name: p.grad for name, p in model.named_parameters()},
        }
        if when == "first":
            model.eval()
            with torch.no_grad():
                result["evaluated"] = sum(
                    model(**batch.model_inputs()).item() for batch in batches(microbatches + 1)
                )
                result["logits"] = model(**PROMPT)
            model.train()
            update(model)
    result["load"] = {name: moe.expert_load for name, moe in model.moe_layers().items()}
    return result


@dataclass
class Case:
    """A layout and how it is run."""

    parallel: Parallel
    microbatches: int
    dtype: torch.dtype = torch.float32
    checkpointing: str = "none"


def build(case: Case, world: World) -> tuple[DeepseekV3, Any, StagePlan]:
    config = model_config()
    plan = plan_stages(case.parallel, config, case.microbatches)
    with torch.device("meta"):
        pp_rank = world.dense.get_local_rank("pp")
        model = DeepseekV3(config, **plan.model_part(pp_rank))
        stages = split(model, plan, pp_rank)
    parallelize(
        stages,
        world,
        case.dtype,
        activations=Train(activation_checkpointing=case.checkpointing),
        reshard_after_forward=reshard_after_forward(case.parallel),
    )
    sizes = {"microbatches": case.microbatches, "tokens": TOKENS, "dtype": case.dtype}
    pipeline = build_pipeline(stages, plan, case.parallel, world, **sizes)
    for stage in stages:
        stage.to_empty(device=world.device)
        stage.init_buffers()
    initialise_weights(model, 0)
    set_balance_loss(model)
    return model, pipeline, plan


def step(model: DeepseekV3, pipeline: Any, rows: list[Batch]) -> dict[str, Any]:
    loss = pipeline.step(rows, WEIGHT).item()
    gradients = ((name, p.grad) for name, p in model.named_parameters())
    return {
        "loss": loss,
        "gradients": {
            name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients
        },
    }


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """On every rank, of every case: a step, evaluation and logits, an update, and a step again."""
    results = []
    with World(cases[0].parallel, 0) as world:
        for case in cases:
            model, pipeline, plan = build(case, world)
            computed: collections.Counter[str] = collections.Counter()
            for name, layer in model.model.layers.items():
                layer.self_attn.register_forward_pre_hook(
                    lambda *_, name=name, computed=computed: computed.update([name])
                )
            rows = batches(case.microbatches, world.data_rank)
            result = {
                "first": step(model, pipeline, rows),
                "computed": dict(computed),
                "ranks": plan.ranks,
            }
            result["evaluated"] = pipeline.evaluate(batches(case.microbatches + 1)).item()
            result["nothing"] = pipeline.evaluate([]).item()
            result["logits"] = pipeline.logits(**PROMPT)
            update(model)
            result["again"] = step(model, pipeline, rows)
            result["load"] = {
                name: moe.expert_load.clone() for name, moe in model.moe_layers().items()
            }
            if case.parallel.pp > 1:
                placed = pipeline.stages[0].stage_index_to_group_rank
                result["torch_ranks"] = tuple(placed[stage] for stage in range(len(placed)))
                with pytest.raises(
                    InputError, match=f"over 25 tokens, but in this layout one has {TOKENS};"
                ):
                    pipeline.logits(**(PROMPT | {"tokens": torch.zeros(25, dtype=torch.int64)}))
            results.append(result)
    return results


def merged(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients of all pipeline ranks; ranks of one stage have the same ones."""
    return {name: gradient for result in results for name, gradient in result["gradients"].items()}


def largest_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """Relative to the tensor's largest entry, and of which tensor."""
    assert gradients.keys() == reference.keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return max(
        (((gradients[n] - g).abs().max() / g.abs().max()).item(), n) for n, g in reference.items()
    )


def compare(case: Case, results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """fp32 rounds 2^-24; sums of 24 x 8 tokens through 8 layers stay within the bounds below where
    nothing is wrong.
    """
    copies = case.parallel.dp_shard
    for when in ("first", "again"):
        assert sum(r[when]["loss"] for r in results) == pytest.approx(
            reference[when]["loss"], rel=1e-6
        )
        error, name = largest_error(
            merged([r[when] for r in results]), reference[when]["gradients"]
        )
        print(f"{case.parallel.pp_schedule} pp {case.parallel.pp} {when}: {error:.1e} ({name})")
        assert error <= 1e-5, (when, name)
    assert sum(r["evaluated"] for r in results) / copies == pytest.approx(
        reference["evaluated"], rel=1e-6
    )
    assert all(r["nothing"] == 0 for r in results)
    for name, load in reference["load"].items():  # of the two steps: evaluation does not count
        assert sum(r["load"][name] for r in results if name in r["load"]).equal(load)
    for r in results:
        torch.testing.assert_close(r["logits"], reference["logits"], rtol=0, atol=1e-5)
        assert r.get("torch_ranks", r["ranks"]) == r["ranks"]
    last = results[0]["ranks"][-1]
    tellers = [rank for rank, r in enumerate(results) if r["first"]["loss"] != 0]
    # the loss is known where the last stage is
    assert tellers == list(range(last * copies, (last + 1) * copies))


def check(ranks: Any, cases: list[Case]) -> list[list[dict[str, Any]]]:
    parallel = cases[0].parallel
    by_case = list(zip(*ranks(parallel.pp * parallel.dp_shard, run, cases=cases), strict=True))
    references = {
        m: one_process(m, parallel.dp_shard) for m in {case.microbatches for case in cases}
    }
    for case, results in zip(cases, by_case, strict=True):
        compare(case, results, references[case.microbatches])
    return by_case


def parallel_of(schedule: str, pp: int = 2, **others: Any) -> Parallel:
    return Parallel(
        **({"pp": pp, "pp_schedule": schedule, "dp_shard": 1, "timeout_seconds": 60} | others)
    )


@pytest.mark.parametrize("pp", [2, 4])
def test_every_schedule_computes_the_step_of_one_process(ranks, pp):
    """Before and after an evaluation and an update; evaluation and logits too."""
    check(ranks, [Case(parallel_of(schedule, pp), 2 * pp) for schedule in SCHEDULES])


def test_pipelines_of_sharded_experts_compute_the_step_of_one_process(ranks):
    check(
        ranks,
        [
            Case(parallel_of(schedule, 2, dp_shard=2, ep=2), 4)
            for schedule in ("1F1B", "ZBVZeroBubble", "DualPipeV")
        ],
    )


def test_without_a_pipeline_the_step_is_that_of_one_process(ranks):
    check(ranks, [Case(Parallel(dp_shard=2, ep=2, timeout_seconds=60), 3)])


def test_layers_placed_by_hand_and_few_microbatches(ranks):
    """Three stages a rank, one stage a rank, stages of nothing but embedding or head, fewer
    microbatches than ranks.
    """
    check(
        ranks,
        [
            Case(parallel_of("Interleaved1F1B", pp_layers=(1, 2, 1, 2, 1, 1)), 3),
            Case(parallel_of("InterleavedZeroBubble", pp_layers=(3, 5)), 1),
            Case(parallel_of("ZBVZeroBubble", pp_layers=(0, 4, 4, 0)), 1),
            Case(parallel_of("GPipe", pp_layers=(0, 8)), 1),
        ],
    )


def test_layers_that_are_computed_again_are_so_once(ranks):
    """torch's own weight pass would compute a layer again for each of its parameters (14 times
    here).
    """
    cases = [
        Case(parallel_of(schedule), 4, checkpointing="full")
        for schedule in ("1F1B", "ZBVZeroBubble", "DualPipeV")
    ]
    for case, results in zip(cases, check(ranks, cases), strict=True):
        twice = {str(layer): 2 * case.microbatches for layer in range(8)}
        assert {name: n for result in results for name, n in result["computed"].items()} == twice


def step_in_bf16(schedules: list[str]) -> list[dict[str, Any]]:
    results = []
    with World(parallel_of(schedules[0]), 0) as world:
        for schedule in schedules:
            model, pipeline, _ = build(Case(parallel_of(schedule), 12, dtype=torch.bfloat16), world)
            buffers = watch_receive_buffers(pipeline.stages)
            results.append(step(model, pipeline, batches(12)) | buffers)
    return results


def watch_receive_buffers(stages: list[Stage]) -> dict[str, int]:
    """Count the bytes that stages receive into, of what is alive at one time the most."""
    alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
    counted = {"most": 0, "all": 0}
    for stage in stages:

        def place(infos: Any, *, fresh: bool, before: Any = stage._place) -> None:
            before(infos, fresh=fresh)
            for info in infos:
                if fresh and info.buffer is not None:
                    alive[counted["all"]] = info.buffer
                    counted["all"] += info.buffer.nbytes
            sizes = [buffer.nbytes for buffer in alive.values()]
            counted["most"] = max(counted["most"], sum(sizes))

        stage._place = place
    return counted


def test_weight_gradients_in_bf16_are_summed_in_fp32(ranks):
    """The weight passes of DualPipeV come several in a row, and torch would add them up in bf16
    (7e-4 off where 2 are).

    What is added is the same in both schedules, so only fp32 sums in another order may differ.
    """
    whole, split_in_two = zip(*ranks(2, step_in_bf16, schedules=["1F1B", "DualPipeV"]), strict=True)
    error, name = largest_error(merged(split_in_two), merged(whole))
    assert error <= 1e-6, name
    # By 1F1B rank 1 receives 12 inputs of microbatches, rank 0 as many gradients. What is alive:
    # the one at work and the one that comes.
    hidden = TOKENS * model_config().hidden_size * 2
    for result in whole:
        assert result["all"] == 12 * hidden and result["most"] <= 2 * hidden
    # By DualPipeV each rank receives both for its two stages, but the turn is on one rank.
    for result in split_in_two:
        print({name: result[name] / hidden for name in ("most", "all")})
        assert result["most"] <= result["all"] / 3


def steps_of_lone_experts(parallel: Parallel, modes: list[str]) -> list[dict[str, Any]]:
    """Gradients in bf16 of two steps, an evaluation and an update between, as it is and with all
    experts in FSDP2; and how many copies of experts then outlive the step.
    """
    results = []
    with World(parallel, 0) as world:
        for mode in modes:
            for is_alone in (fsdp._is_alone, lambda *_: False):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(fsdp, "_is_alone", is_alone)
                    case = Case(parallel, 2 * parallel.pp, torch.bfloat16, mode)
                    model, pipeline, _ = build(case, world)
                rows, gradients = batches(case.microbatches, world.data_rank), {}
                for when in ("first", "again"):
                    found = step(model, pipeline, rows)["gradients"]
                    gradients |= {f"{when} {name}": g.clone() for name, g in found.items()}
                    pipeline.evaluate(rows[:1])
                    update(model)
                reads = [moe.experts.read for moe in model.moe_layers().values()]
                alone = [each for each in reads if isinstance(each, ComputeCopies)]
                assert not any(each.kept for each in alone)
                results.append({"mode": mode, "alone": len(alone), "gradients": gradients})
    return results


@pytest.mark.parametrize(
    ("parallel", "modes"),
    [
        (Parallel(dp_shard=2, ep=2, timeout_seconds=60), ["none", "stream"]),
        (parallel_of("DualPipeV"), ["none", "full"]),
        (parallel_of("1F1B"), ["none"]),
    ],
    ids=["ep", "DualPipeV", "1F1B"],
)
def test_experts_of_one_rank_have_the_gradients_that_fsdp_gives_them(ranks, parallel, modes):
    """Bit by bit: sums over microbatches are in fp32 in both. Of `stream`, whose pieces FSDP gets
    as one sum that is rounded, but for that (2^-8 of the largest entry).
    """
    for results in ranks(2, steps_of_lone_experts, parallel=parallel, modes=modes):
        for own, gathered in zip(results[::2], results[1::2], strict=True):
            assert own["alone"] > 0 and gathered["alone"] == 0
            assert own["gradients"].keys() == gathered["gradients"].keys()
            for name, gradient in own["gradients"].items():
                expected = gathered["gradients"][name]
                assert gradient.dtype == torch.float32
                if own["mode"] == "stream":
                    error = (gradient - expected).abs().max()
                    assert error <= 2**-8 * expected.abs().max(), name
                else:
                    assert gradient.equal(expected), (own["mode"], name)


# ---------------------------------------------------------------- plans


def brute_force(costs: list[int], stages: int, first: int, last: int) -> tuple[int, int]:
    """Lowest largest stage, and the lowest sum of squares among those, over all ways to cut."""
    found = []
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])]
        sums[0] += first
        sums[-1] += last
        found.append((max(sums), sum(s * s for s in sums)))
    return min(found)


def test_balance_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        count = 1 + trial % 9
        stages = 1 + int(torch.randint(count, (), generator=generator))
        *costs, first, last = torch.randint(1, 20, (count + 2,), generator=generator).tolist()
        counts = balance(tuple(costs), stages, first, last)
        assert sum(counts) == count and min(counts) >= 1 and len(counts) == stages
        ends = [0, *itertools.accumulate(counts)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        sums[0] += first
        sums[-1] += last
        assert (max(sums), sum(s * s for s in sums)) == brute_force(costs, stages, first, last)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 2}])
def test_costs_are_the_matrix_entries_that_a_token_meets(changes):
    """Counted from the parameters: each entry of a matrix is one multiply-add, of the experts K of
    E are met.
    """
    config = model_config(3, **changes)
    with torch.device("meta"):
        model = DeepseekV3(config)
    met = config.num_experts_per_tok / config.n_routed_experts
    for layer, cost in zip(model.model.layers.values(), config.layer_costs(), strict=True):
        matrices = [p for p in layer.parameters() if p.ndim > 1]
        # 3 dims: stacked experts
        assert cost == sum(p.numel() * (met if p.ndim == 3 else 1) for p in matrices)
    assert config.head_cost == model.lm_head.weight.numel()
    assert 0 < config.embedding_cost < min(config.layer_costs())


def deepseek_v3(**changes: Any) -> DeepseekV3Config:
    return dataclasses.replace(
        model_config(61),
        hidden_size=7168,
        vocab_size=129280,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        **changes,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 8, 16])
def test_every_layer_of_v3_is_on_one_rank(schedule, pp):
    config = deepseek_v3()
    plan = plan_stages(parallel_of(schedule, pp), config, 64)
    assert [layer for stage in plan.layers for layer in stage] == list(range(61))
    parts = [plan.model_part(rank) for rank in range(pp)]
    assert sorted(layer for part in parts for layer in part["layers"]) == list(range(61))
    assert sum(part["first"] for part in parts) == sum(part["last"] for part in parts) == 1
    assert parts[0]["first"] and parts[0 if schedule in planning.V_SHAPED else pp - 1]["last"]
    # 61 layers, and a head that costs as much as 1.6 of them, in as many stages: the best cannot be
    # better than an even share.
    costs = [sum(config.layer_costs()[layer] for layer in stage) for stage in plan.layers]
    costs[-1] += config.head_cost
    assert max(costs) <= sum(costs) / len(costs) + max(config.layer_costs())


REFUSED = [
    (
        parallel_of("1F1B", 4),
        3,
        "cannot do 3 microbatches a step, but 4; set --train.global-batch-size to 4 times "
        "--train.micro-batch-size",
    ),
    (
        parallel_of("DualPipeV", 2, dp_shard=2, dp_replicate=3),
        3,
        "but 4; set --train.global-batch-size to 24 times --train.micro",
    ),
    (parallel_of("Interleaved1F1B", 2), 5, "cannot do 5 microbatches a step, but 6;"),
    (parallel_of("InterleavedZeroBubble", 4), 9, "cannot do 9 microbatches a step, but 10;"),
    (
        parallel_of("ZBVZeroBubble", 8),
        16,
        "has 16 stages, the model 8 layers; set --parallel.pp to at most 4 or --par",
    ),
    (
        parallel_of("GPipe", 16),
        16,
        "has 16 stages, the model 8 layers; set --parallel.pp to at most 8$",
    ),
    (
        parallel_of("1F1B", 2, pp_layers=(4, 3)),
        4,
        "is 4 3, together 7, but it must place 8 layers .* give 2, such as 4 4$",
    ),
    (
        parallel_of("Interleaved1F1B", 2, pp_layers=(4, 0, 0, 4)),
        4,
        "none of the middle stages empty; give 4, such as 2 2 2 2$",
    ),
    (
        parallel_of("ZBVZeroBubble", 2, pp_layers=(4, 4)),
        4,
        "has 2 number.s., .* has 4 stage.s.; give 4, such as 2 2 2 2$",
    ),
    (
        parallel_of("Interleaved1F1B", 2, pp_layers=(2, 2, 2, 1, 1)),
        4,
        "has 5 number.s., .* has 4 stage.s.; give 4, such as",
    ),
    (
        Parallel(dp_shard=1, pp_layers=(4, 4)),
        4,
        "has 2 number.s., .* has 1 stage.s.; give 1, such as 8$",
    ),
    (
        parallel_of("Interleaved1F1B", 8, pp_layers=(1,) * 16),
        16,
        "together 16, but it must place 8 layers .*; leave it out$",
    ),
]


@pytest.mark.parametrize("schedule", SCHEDULES[2:])
@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (2, 4), (4, 8), (4, 16)])
def test_no_fewer_microbatches_are_in_flight_than_foreseen(schedule, pp, microbatches):
    """In torch's order; of two stages a rank each counts half."""
    parallel = parallel_of(schedule, pp)
    if schedule == "DualPipeV" and microbatches < 2 * pp:
        return
    plan = plan_stages(parallel, model_config(), microbatches)
    for rank in range(pp):
        stages = [
            Mock(
                stage_index=index,
                num_stages=2 * pp,
                group_size=pp,
                group_rank=rank,
                stage_index_to_group_rank=dict(enumerate(plan.ranks)),
            )
            for index in plan.local(rank)
        ]
        order = schedule_class(schedule)(stages, microbatches, loss_fn=max).pipeline_order[rank]
        names = [one.computation_type.name for one in _single_actions(order)]
        changes = [
            (name == "FORWARD") - (name in ("FULL_BACKWARD", "BACKWARD_INPUT")) for name in names
        ]
        most = max(itertools.accumulate(changes)) / 2
        foreseen = microbatches_in_flight(parallel, rank, microbatches)
        assert 1 <= foreseen <= most <= foreseen + pp


@pytest.mark.parametrize(("parallel", "microbatches", "message"), REFUSED)
def test_impossible_plans_are_refused_with_a_remedy(parallel, microbatches, message):
    with pytest.raises(InputError, match=message):
        plan_stages(parallel, model_config(), microbatches)


@pytest.mark.parametrize(
    ("parallel", "microbatches"),
    [
        (parallel_of("1F1B", 4), 4),
        (parallel_of("DualPipeV", 2, dp_shard=2, dp_replicate=3), 4),
        (parallel_of("Interleaved1F1B", 2), 6),
        (parallel_of("InterleavedZeroBubble", 4), 10),
        (parallel_of("ZBVZeroBubble", 4), 16),
        (parallel_of("GPipe", 8), 16),
        (parallel_of("1F1B", 2, pp_layers=(4, 4)), 4),
        (parallel_of("ZBVZeroBubble", 2, pp_layers=(2, 2, 2, 2)), 4),
        (Parallel(dp_shard=1, pp_layers=(8,)), 4),
    ],
)
def test_the_remedies_work(parallel, microbatches):
    plan_stages(parallel, model_config(), microbatches)


def test_tied_embeddings_and_unknown_schedules_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"tie_word_embeddings.*set --parallel.pp 1"):
        plan_stages(parallel_of("1F1B"), model_config(tie_word_embeddings=True), 4)
    plan_stages(Parallel(dp_shard=1), model_config(tie_word_embeddings=True), 4)

    def without_it(name: str) -> type:
        raise ValueError(f"Unknown schedule name '{name}'")

    monkeypatch.setattr(planning, "get_schedule_class", without_it)
    with pytest.raises(
        InputError,
        match=r"--parallel.pp-schedule DualPipeV does not exist .* to "
        r"Interleaved1F1B",
    ):
        plan_stages(parallel_of("DualPipeV"), model_config(), 8)
