"""A step of a pipeline, event by event: torch's real schedules say what each rank does in which
order, costs say how long it takes.

A rank begins an action when it is done with the one before and has received what it needs. Hidden
states and gradients travel beside what is computed. What FSDP2 gathers for a stage, once a step, is
gathered ahead by schedules of several stages a rank (one stage after the other), and beside the
first forward pass by the others; gradients are summed over ranks behind the last backward pass of a
stage, beside what follows. Ranks wait for each other before the optimizer, for the gradients' norm.

Private names of torch's schedules, all of which are in this file: `_step_microbatches`,
`_initialize_stage`, `_prepare_schedule_with_comms` and `_add_unshard_reshard`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from torchsft.parallel.stages import schedule_class

FORWARD, BACKWARD = "forward", "backward"
INPUT, WEIGHT = "input gradients", "weight gradients"
EXPOSED, OPTIMIZER, WAIT = "exposed communication", "optimizer", "wait"
GATHER, REDUCE, FREE = "gather", "reduce", "free"  # actions that are no events of their own
PASSES = (FORWARD, BACKWARD, INPUT, WEIGHT)
KINDS = {
    "FORWARD": FORWARD,
    "FULL_BACKWARD": BACKWARD,
    "BACKWARD_INPUT": INPUT,
    "BACKWARD_WEIGHT": WEIGHT,
    "UNSHARD": GATHER,
    "RESHARD": FREE,
}


@dataclass(frozen=True)
class Event:
    """What a pipeline rank does from `begin` to `end`, in seconds from the step's begin."""

    pp_rank: int
    kind: str
    stage: int | None
    microbatch: int | None
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end - self.begin


@dataclass(frozen=True)
class StageCost:
    """Seconds of a stage.

    Attributes:
        forward: pass of a microbatch.
        backward: pass of a microbatch, what is computed again with it.
        weights: those of `backward` that a schedule can do later; 0: none.
        gather: of its parameters, once.
        reduce: of their gradients over ranks, once.
    """

    forward: float
    backward: float
    weights: float = 0.0
    gather: float = 0.0
    reduce: float = 0.0


class Action(NamedTuple):
    """What a rank does next: a pass of a microbatch, or GATHER or REDUCE of a stage."""

    kind: str
    stage: int
    microbatch: int | None
    # whether what it makes is sent only when the next action is done too: of a forward and a
    # backward pass that torch takes for one action
    is_held: bool = False


class _Recorded:
    """A stage, as far as torch's schedules of one stage a rank see it, that notes what it is told
    to do.
    """

    is_last = has_backward = False

    def __init__(self, index: int, count: int) -> None:
        self.stage_index = self.group_rank = index
        self.num_stages = self.group_size = count
        self.actions: list[Action] = []

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        self.actions.append(Action(FORWARD, self.stage_index, microbatch))

    def backward_one_chunk(self, microbatch: int, **_: Any) -> None:
        self.actions.append(Action(BACKWARD, self.stage_index, microbatch))

    def no_messages(self, microbatch: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages

    def perform_reduce_grad(self, _: int) -> None:
        self.actions.append(Action(REDUCE, self.stage_index, None))


@lru_cache(maxsize=64)
def order(
    schedule: str, ranks: int, stages: int, microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """Return what each pipeline rank does, in order, by torch's schedule of that name.

    Args:
        schedule: of --parallel.pp-schedule; with one rank, it does not matter.
        ranks: of the pipeline.
        stages: of all ranks.
        microbatches: of a step.
    """
    if ranks == 1:
        passes = [Action(kind, 0, m) for m in range(microbatches) for kind in (FORWARD, BACKWARD)]
        return (tuple(passes),)
    kind = schedule_class(schedule)
    if issubclass(kind, PipelineScheduleMulti):
        return _order_of_several(kind, ranks, stages, microbatches)
    found = []
    for rank in range(ranks):
        stage = _Recorded(rank, ranks)
        with patch.object(kind, "_initialize_stage", lambda *_: None):
            kind(stage, microbatches, scale_grads=False)._step_microbatches()
        found.append(tuple(stage.actions))
    return tuple(found)


def _order_of_several(
    kind: type[PipelineScheduleMulti], ranks: int, stages: int, microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """Return the order of a schedule of several stages a rank."""
    place = {"num_stages": stages, "group_size": ranks, "group_rank": 0, "submod": None}
    local = [SimpleNamespace(stage_index=n, **place) for n in range(stages // ranks)]
    runtime = schedules._PipelineScheduleRuntime
    with patch.object(runtime, "_prepare_schedule_with_comms", lambda *_, **__: None):
        made = kind(local, microbatches, loss_fn=lambda *_: None, scale_grads=False)
    found = []
    for rank in range(ranks):
        actions: list[Action] = []
        backward_passes = dict.fromkeys(range(stages), 0)
        for each in schedules._add_unshard_reshard(made.pipeline_order[rank]):
            parts = each.sub_actions or (each,)
            for one in parts:
                name = KINDS[one.computation_type.name]
                stage = one.stage_index
                actions.append(Action(name, stage, one.microbatch_index, one is not parts[-1]))
                backward_passes[stage] += name in (BACKWARD, WEIGHT)
                if name in (BACKWARD, WEIGHT) and backward_passes[stage] == microbatches:
                    actions.append(Action(REDUCE, stage, None))
        found.append(tuple(each for each in actions if each.kind != FREE))
    return tuple(found)


@dataclass
class _Rank:
    """How far a rank is."""

    actions: deque[Action]
    clock: float = 0.0  # of what it computes
    network: float = 0.0  # of what it gathers and sums
    held: list[tuple[str, int, int | None]] = field(default_factory=list)  # passes not sent yet


def replay(
    actions: Sequence[Sequence[Action]],
    costs: Sequence[StageCost],
    transfer: float = 0.0,
    optimizer: float = 0.0,
) -> list[Event]:
    """Return the events of a step, of each rank in order and without gaps.

    Args:
        actions: of each rank, see `order`.
        costs: of each stage.
        transfer: seconds that hidden states need to another rank.
        optimizer: seconds of the update, gradients' norm and all.
    """
    rank_of = {each.stage: rank for rank, of_rank in enumerate(actions) for each in of_rank}
    ranks = [_Rank(deque(of_rank)) for of_rank in actions]
    done: dict[tuple[str, int, int | None], float] = {}  # when passes end
    sent: dict[tuple[str, int, int | None], float] = {}  # and when others have what they made
    gathered: dict[int, float] = {}  # when a stage is
    events: list[Event] = []

    def received(action: Action) -> float | None:
        """Return when the rank has what an action needs of others; None: not yet known."""
        kind, stage, microbatch, _ = action
        if kind == FORWARD:
            before = FORWARD, stage - 1, microbatch
        elif kind in (BACKWARD, INPUT):
            before = BACKWARD, stage + 1, microbatch
        else:
            return 0.0
        if not 0 <= before[1] < len(costs):
            return 0.0
        return (done if rank_of[before[1]] == rank_of[stage] else sent).get(before)

    def run(number: int, rank: _Rank, action: Action, ready: float) -> None:
        kind, stage, microbatch, is_held = action
        cost = costs[stage]
        if kind in (GATHER, REDUCE):
            begin = max(rank.clock if kind == REDUCE else 0.0, rank.network)
            rank.network = begin + (cost.gather if kind == GATHER else cost.reduce)
            if kind == GATHER:
                gathered[stage] = rank.network
            return
        begin = max(rank.clock, ready)
        if begin > rank.clock:
            events.append(Event(number, WAIT, None, None, rank.clock, begin))
        arrived = gathered.get(stage, 0.0)
        if arrived > begin:
            events.append(Event(number, EXPOSED, stage, None, begin, arrived))
            begin = arrived
        seconds = {
            FORWARD: cost.forward,
            BACKWARD: cost.backward,
            INPUT: cost.backward - cost.weights,
            WEIGHT: cost.weights,
        }[kind]
        end = begin + seconds
        events.append(Event(number, kind, stage, microbatch, begin, end))
        if kind == FORWARD and stage not in gathered:
            gathered[stage] = rank.network = begin + cost.gather
            if gathered[stage] > end:  # layer by layer, beside the first pass
                events.append(Event(number, EXPOSED, stage, None, end, gathered[stage]))
                end = gathered[stage]
        rank.clock = end
        key = BACKWARD if kind == INPUT else kind, stage, microbatch
        done[key] = end
        rank.held.append(key)
        if not is_held:
            sent.update(dict.fromkeys(rank.held, end + transfer))
            rank.held = []

    while any(rank.actions for rank in ranks):
        waiting = True
        for number, rank in enumerate(ranks):
            while rank.actions and (ready := received(rank.actions[0])) is not None:
                run(number, rank, rank.actions.popleft(), ready)
                waiting = False
        assert not waiting, "ranks wait for each other"
    for number, rank in enumerate(ranks):
        if rank.network > rank.clock:
            events.append(Event(number, EXPOSED, None, None, rank.clock, rank.network))
            rank.clock = rank.network
    together = max(rank.clock for rank in ranks)
    for number, rank in enumerate(ranks):
        if rank.clock < together:
            events.append(Event(number, WAIT, None, None, rank.clock, together))
        if optimizer:
            end = together + optimizer
            events.append(Event(number, OPTIMIZER, None, None, together, end))
    return sorted(events, key=lambda event: (event.pp_rank, event.begin, event.end))


def seconds_by_kind(events: Sequence[Event]) -> Mapping[str, float]:
    """Return the seconds of all ranks together, by kind."""
    found: dict[str, float] = {}
    for event in events:
        found[event.kind] = found.get(event.kind, 0.0) + event.seconds
    return found


def bubble(events: Sequence[Event]) -> float:
    """Return the share of all ranks' time in which they wait for each other."""
    found = seconds_by_kind(events)
    return found.get(WAIT, 0.0) / sum(found.values())
