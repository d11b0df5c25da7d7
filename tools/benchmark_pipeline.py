"""`tools/benchmark.py pipeline`: how long the ranks of a pipeline idle under each schedule, beside
its formula.

The runtime, its order of actions and its communication are real
(`torchsft.parallel.pipeline.Pipeline` over gloo); only a stage's arithmetic is not: it sleeps, one
unit for the forward pass, one for the gradient of its input and one for those of its weights. So
the ranks do not compete for this machine's cores, and a formula that assumes equal units applies.

The bubble of a rank is the share of the step in which it is in none of its actions; the step goes
from the first begin to the last end of an action on any rank, by a clock that the processes of a
machine share. The formulas are idle / (idle + work) for p ranks, m microbatches and v stages a
rank, all units equal:

    GPipe                  (p - 1) / (m + p - 1)          Huang et al., arXiv:1811.06965, section
                                                          2.3
    1F1B                   the same                       Narayanan et al., arXiv:2104.04473,
                                                          section 2.2.1
    Interleaved1F1B        (p - 1) / (v m + p - 1)        the same, section 2.2.2
    InterleavedZeroBubble  (p - 1) / (3 v m + p - 1)      ZB-H1's idle (p - 1)(F + I - W): Qi et
                                                          al., arXiv:2401.10241, table 2
    ZBVZeroBubble          (p - 1) / (3 v m + p - 1)      the same, section 6: a rank idles 0 from
                                                          its own begin to its own end, but ranks
                                                          begin p - 1 units apart, and a step with a
                                                          gradient norm ends for all of them
                                                          together
    DualPipeV              2 (p - 1) / (3 v m + 2 (p - 1))  idle (p - 1)(F&B + B - 3 W):
                                                            github.com/deepseek-ai/DualPipe,
                                                            "Pipeline Bubbles"; F&B = F + B here, as
                                                            torch computes one after the other

The column "its order" is the bubble that the very order of actions that ran would have if
communication took no time (with torch 2.11, where nothing is split, more than the formula for the
last three).
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import set_forkserver_preload
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.multiprocessing import start_processes

from tools.benchmark_step import SMALL
from torchsft.config import Parallel
from torchsft.data.batch import Batch
from torchsft.models.families import read_model_config
from torchsft.models.language_model import ModelConfig
from torchsft.ops import gradients_asked_for
from torchsft.parallel.pipeline import Pipeline
from torchsft.parallel.stages import plan_stages
from torchsft.parallel.torch_pipelining import weight_pass_possible
from torchsft.parallel.world import World

SCHEDULES = (
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)
TOKENS = 8


def on_ranks(n: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """Results of `function(**arguments)` on n ranks of this machine: processes with one thread and
    what torchrun would set.

    They are forked from one server process that has imported torch already. A rank that raises ends
    all of them.
    """
    set_forkserver_preload(["torchsft.trainer"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        start_processes(
            _rank, (n, port, directory, function, arguments), nprocs=n, start_method="forkserver"
        )
        return [pickle.loads(Path(directory, str(rank)).read_bytes()) for rank in range(n)]


def _rank(
    rank: int,
    n: int,
    port: int,
    directory: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    Path(directory, str(rank)).write_bytes(pickle.dumps(function(**arguments)))


class Action(NamedTuple):
    """What a rank computes at one time."""

    kind: str
    """F: forward, B: backward, I: backward to the input alone, W: to the weights alone."""
    stage: int
    microbatch: int


class Timed(NamedTuple):
    """An action that ran."""

    action: Action
    begin: float
    end: float
    """Seconds of a clock that all processes of the machine share."""


KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
# of a rank: actions; the results of those in one list are sent when the last is done
Order = list[list[Action]]


class _Work(torch.autograd.Function):
    """The identity, which takes a unit of time forward, and one for each gradient that a backward
    pass computes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, unit: float) -> Tensor:
        ctx.unit = unit
        time.sleep(unit)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        want_x, want_weight = gradients_asked_for(ctx)[:2]
        time.sleep(ctx.unit * (want_x + want_weight))
        # a contiguous gradient, as it is sent to another rank
        return (
            grad.contiguous() if want_x else None,
            grad.new_zeros(()) if want_weight else None,
            None,
        )


class StandIn(nn.Module):
    """A stage, as far as `Pipeline` sees it."""

    def __init__(self, config: ModelConfig, first: bool, last: bool, unit: float) -> None:
        super().__init__()
        self.config, self.first, self.last, self.unit = config, first, last, unit
        self.needs_embedding, self.depth = False, config.num_hidden_layers  # no MTP layers
        self.model = SimpleNamespace(layers={})
        self.embedding = nn.Parameter(torch.zeros(1, config.hidden_size)) if first else None
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Token ids [T] or hidden states [T, D] to hidden states or the loss."""
        x_TD = x if self.embedding is None else F.embedding(x, self.embedding)
        y_TD = _Work.apply(x_TD, self.weight, self.unit)
        return y_TD.sum() if self.last else y_TD

    def moe_layers(self) -> dict[str, nn.Module]:
        """Return nothing: there are no experts."""
        return {}


def _record(stage: Any, actions: list[Timed]) -> None:
    """Let a stage of a pipeline note when it begins and ends to compute."""

    def timed(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(microbatch: int, *args: Any, **options: Any) -> Any:
            begin = time.monotonic()
            result = method(microbatch, *args, **options)
            input_alone = kind == "B" and not options.get("full_backward", True)
            action = Action("I" if input_alone else kind, stage.stage_index, microbatch)
            actions.append(Timed(action, begin, time.monotonic()))
            return result

        return call

    for kind, name in (
        ("F", "forward_one_chunk"),
        ("B", "backward_one_chunk"),
        ("W", "backward_weight_one_chunk"),
    ):
        setattr(stage, name, timed(kind, getattr(stage, name)))


def _order(schedule: Any, rank: int, steps: Sequence[Sequence[Timed]]) -> Order:
    """Return what a rank computes in a step, of which several were recorded."""
    recorded = [timed.action for timed in steps[0]]
    assert all([timed.action for timed in step] == recorded for step in steps)
    if isinstance(schedule, PipelineScheduleSingle):  # torch 2.13 says another order than it does
        return [[action] for action in recorded]
    planned = [
        one.sub_actions or (one,) for one in schedule.pipeline_order[rank] if one is not None
    ]
    order = [
        [Action(KINDS[a.computation_type.name], a.stage_index, a.microbatch_index) for a in one]
        for one in planned
    ]
    assert [action for together in order for action in together] == recorded
    return order


def record_steps(
    cases: Sequence[tuple[str, int]], repeats: int, unit: float
) -> list[tuple[Order, list[list[Timed]]]]:
    """For each schedule and number of microbatches: what this rank is to do in a step, and when it
    did it in some.

    Args:
        cases: schedules and numbers of microbatches.
        repeats: steps that are recorded; one more comes before.
        unit: seconds.
    """
    size = int(os.environ["WORLD_SIZE"])
    config = read_model_config(
        SMALL | {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 2 * size}
    )
    nothing = torch.zeros(TOKENS, dtype=torch.int64)
    bounds = torch.zeros(1, dtype=torch.int32)
    batch = Batch(nothing, nothing, nothing.float(), nothing, bounds, max_seqlen=0, padding=TOKENS)
    results = []
    with World(Parallel(pp=size, timeout_seconds=60), 0) as world:
        for schedule, microbatches in cases:
            plan = plan_stages(Parallel(pp=size, pp_schedule=schedule), config, microbatches)
            last = len(plan.ranks) - 1
            stages = [
                StandIn(config, stage == 0, stage == last, unit).to(world.device)
                for stage in plan.local(world.rank)
            ]
            pipeline = Pipeline(
                stages,
                world,
                TOKENS,
                plan,
                schedule,
                microbatches=microbatches,
                dtype=torch.float32,
                first_trained=0,
            )
            actions: list[Timed] = []
            for stage in pipeline.stages:
                _record(stage, actions)
            steps = []
            for _ in range(repeats + 1):
                world.barrier()
                pipeline.step([batch] * microbatches, 1.0)
                steps.append(actions.copy())
                actions.clear()
            results.append((_order(pipeline.schedule, world.rank, steps), steps[1:]))
    return results


def bubbles(ranks: Sequence[Sequence[Timed]]) -> list[float]:
    """Share of a step in which each rank computes nothing."""
    seconds = step_seconds(ranks)
    return [1 - sum(a.end - a.begin for a in actions) / seconds for actions in ranks]


def step_seconds(ranks: Sequence[Sequence[Timed]]) -> float:
    """From the first begin to the last end on any rank."""
    return max(a.end for actions in ranks for a in actions) - min(
        a.begin for actions in ranks for a in actions
    )


def duration(action: Action, split: bool) -> int:
    """Units of time.

    Args:
        action: what is computed.
        split: whether I and W really are two passes. On stage 0 torch leaves both to W, as nobody
            waits for I.
    """
    if not split or action.stage == 0:
        return {"F": 1, "B": 2, "I": 0 if split else 2, "W": 2 if split else 0}[action.kind]
    return {"F": 1, "B": 2, "I": 1, "W": 1}[action.kind]


def ideal_bubble(ranks: Sequence[Order], split: bool = True) -> float:
    """Mean bubble of the ranks' orders where communication takes no time.

    Args:
        ranks: what each rank computes.
        split: see `duration`.
    """
    last = max(action.stage for order in ranks for together in order for action in together)

    def needs(kind: str, stage: int, microbatch: int) -> list[Action]:
        if kind == "W":
            return [Action("I", stage, microbatch)]
        if kind == "F":
            return [Action("F", stage - 1, microbatch)] if stage else []
        return [Action("F", stage, microbatch)] + (
            [Action("I", stage + 1, microbatch)] if stage < last else []
        )

    there: dict[Action, float] = {}  # when a result can be had: F, and I for B too
    free, following = [0.0] * len(ranks), [0] * len(ranks)
    while any(done < len(order) for done, order in zip(following, ranks, strict=True)):
        before = following.copy()
        for rank, order in enumerate(ranks):
            while following[rank] < len(order):
                together = order[following[rank]]
                needed = {need for action in together for need in needs(*action)}
                if not needed <= there.keys():
                    break
                free[rank] = max([free[rank], *(there[need] for need in needed)])
                free[rank] += sum(duration(action, split) for action in together)
                there |= {
                    action._replace(kind="I" if action.kind == "B" else action.kind): free[rank]
                    for action in together
                }
                following[rank] += 1
        assert following != before, "these orders wait for each other"
    work = [
        sum(duration(action, split) for together in order for action in together) for order in ranks
    ]
    return statistics.mean(1 - seconds / max(free) for seconds in work)


def formula(schedule: str, p: int, m: int, v: int) -> float:
    """Return the bubble of a schedule by the formula above."""
    idle = 2 * (p - 1) if schedule == "DualPipeV" else p - 1
    split = schedule in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    return idle / ((3 if split else 1) * v * m + idle)


def measure(
    p: int, cases: Sequence[tuple[str, int]], repeats: int, unit: float
) -> list[dict[str, Any]]:
    """Return a line of the table for each case, on p ranks: the step whose bubble is the median."""
    results = []
    ranks = on_ranks(p, record_steps, cases=cases, repeats=repeats, unit=unit)
    for case, (schedule, m) in enumerate(cases):
        orders = [rank[case][0] for rank in ranks]
        steps = [[rank[case][1][step] for rank in ranks] for step in range(repeats)]
        step = sorted(steps, key=lambda step: statistics.mean(bubbles(step)))[repeats // 2]
        stages = {timed.action.stage for rank in step for timed in rank}
        forward = [
            timed.end - timed.begin for rank in step for timed in rank if timed.action.kind == "F"
        ]
        results.append(
            {
                "schedule": schedule,
                "pp": p,
                "microbatches": m,
                "measured": statistics.mean(bubbles(step)),
                "formula": formula(schedule, p, m, len(stages) // p),
                "its_order": ideal_bubble(orders, weight_pass_possible()),
                "each_rank": bubbles(step),
                "each_step": [statistics.mean(bubbles(step)) for step in steps],
                "step_seconds": step_seconds(step),
                "forward_seconds": statistics.median(forward),
            }
        )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = [
        "schedule",
        "pp",
        "microbatches",
        "measured",
        "formula",
        "its order",
        "measured - its order",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in results:
        shares = [f"{100 * x:.1f} %" for x in (r["measured"], r["formula"], r["its_order"])]
        difference = f"{100 * (r['measured'] - r['its_order']):+.1f}"
        lines.append(
            f"| {r['schedule']} | {r['pp']} | {r['microbatches']} | {' | '.join(shares)} "
            f"| {difference} |"
        )
    return "\n".join(lines)


def run(
    json_path: Path | None, repeats: int, unit: float = 0.05, sizes: Sequence[int] = (2, 4)
) -> dict[str, Any]:
    """Measure every schedule on pipelines of these sizes, print the table, and write it as JSON."""
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "unit_seconds": unit,
        "load_before": os.getloadavg(),
    }
    report["results"] = []
    for p in sizes:
        cases = [(schedule, m) for schedule in SCHEDULES for m in (2 * p, 4 * p)]
        report["results"] += measure(p, cases, repeats, unit)
    report["load_after"] = os.getloadavg()
    print(table(report["results"]))
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    return report
