"""Steps of pipelines, replayed, against closed formulas and against what passes need."""

import itertools

import pytest

from tools.planning import replay
from tools.planning.replay import (
    BACKWARD,
    EXPOSED,
    FORWARD,
    INPUT,
    OPTIMIZER,
    PASSES,
    WAIT,
    WEIGHT,
    Action,
    StageCost,
    bubble,
    order,
)
from torchsft.parallel.stages import V_SHAPED

# Idle / (idle + work) of p ranks, m microbatches and v stages a rank, where the forward pass, the
# gradient of its input and that of its weights take a unit each: tools/benchmark_pipeline.py has
# the sources. Where nothing is split, a unit is a third of both passes.
FORMULAS = {
    "GPipe": lambda p, m, v: (p - 1) / (m + p - 1),
    "1F1B": lambda p, m, v: (p - 1) / (m + p - 1),
    "Interleaved1F1B": lambda p, m, v: (p - 1) / (v * m + p - 1),
    "InterleavedZeroBubble": lambda p, m, v: (p - 1) / (3 * v * m + p - 1),
    "ZBVZeroBubble": lambda p, m, v: (p - 1) / (3 * v * m + p - 1),
    "DualPipeV": lambda p, m, v: 2 * (p - 1) / (3 * v * m + 2 * (p - 1)),
}
UNITS = StageCost(forward=1.0, backward=2.0, weights=1.0)


def stages_of(schedule, ranks):
    return ranks if schedule in ("GPipe", "1F1B") else 2 * ranks


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", FORMULAS)
def test_bubbles_are_those_of_the_formulas(schedule, ranks):
    microbatches, stages = 4 * ranks, stages_of(schedule, ranks)
    events = replay.replay(order(schedule, ranks, stages, microbatches), [UNITS] * stages)
    expected = FORMULAS[schedule](ranks, microbatches, stages // ranks)
    assert bubble(events) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", FORMULAS)
def test_every_pass_begins_behind_what_it_needs(schedule):
    """With unequal stages, transfers and gathers: each pass is there once, behind its neighbours'
    and its own earlier ones, and a rank does one thing at a time without gaps.
    """
    ranks, microbatches = 4, 8
    stages = stages_of(schedule, ranks)
    costs = [
        StageCost(1 + 0.1 * n, 2.5 + 0.2 * n, 0.7, gather=0.3 * n, reduce=0.5)
        for n in range(stages)
    ]
    actions = order(schedule, ranks, stages, microbatches)
    events = replay.replay(actions, costs, transfer=0.25, optimizer=0.75)
    rank_of = {e.stage: e.pp_rank for e in events if e.kind in PASSES}
    if schedule in V_SHAPED:
        assert [rank_of[n] for n in range(stages)] == [0, 1, 2, 3, 3, 2, 1, 0]
    else:
        assert all(rank_of[n] == n % ranks for n in range(stages))
    ends = {(e.kind, e.stage, e.microbatch): e.end for e in events if e.kind in PASSES}
    begins = {(e.kind, e.stage, e.microbatch): e.begin for e in events if e.kind in PASSES}
    assert len(ends) == sum(e.kind in PASSES for e in events)
    for stage, microbatch in itertools.product(range(stages), range(microbatches)):
        back = INPUT if (INPUT, stage, microbatch) in ends else BACKWARD
        forward = begins[FORWARD, stage, microbatch]
        assert begins[back, stage, microbatch] >= ends[FORWARD, stage, microbatch]
        if back == INPUT:
            assert begins[WEIGHT, stage, microbatch] >= ends[INPUT, stage, microbatch]
        if stage:
            late = 0.25 * (rank_of[stage] != rank_of[stage - 1])
            assert forward >= ends[FORWARD, stage - 1, microbatch] + late - 1e-9
            before = INPUT if (INPUT, stage - 1, microbatch) in ends else BACKWARD
            assert begins[before, stage - 1, microbatch] >= ends[back, stage, microbatch] - 1e-9
    for rank in range(ranks):
        own = [e for e in events if e.pp_rank == rank]
        assert own[0].begin == 0
        for this, following in itertools.pairwise(own):
            assert following.begin == pytest.approx(this.end)
        assert own[-1].kind == OPTIMIZER
    assert len({e.end for e in events if e.kind == OPTIMIZER}) == 1


def test_one_rank_does_one_microbatch_after_the_other():
    events = replay.replay(order("1F1B", 1, 1, 3), [StageCost(1.0, 2.0)], optimizer=0.5)
    assert [e.kind for e in events] == [FORWARD, BACKWARD] * 3 + [OPTIMIZER]
    assert events[-1].end == 9.5
    assert bubble(events) == 0


def test_what_is_gathered_and_summed_is_exposed_where_nothing_hides_it():
    """Schedules of one stage gather beside the first pass, and sum behind the last one."""
    costs = [StageCost(1.0, 2.0, gather=1.5, reduce=0.25)] * 2
    events = replay.replay(order("GPipe", 2, 2, 2), costs)
    exposed = [(e.pp_rank, e.begin, e.end) for e in events if e.kind == EXPOSED]
    # rank 0: gathers to 1.5, both passes to 2.5; rank 1: begins at 1.5, gathers to 3
    assert exposed == [(0, 1.0, 1.5), (0, 10.0, 10.25), (1, 2.5, 3.0), (1, 8.0, 8.25)]
    assert sum(e.seconds for e in events if e.kind == WAIT) > 0


def test_1f1b_is_what_torch_runs():
    """Warm up with as many forward passes as stages follow, then by turns."""
    first, last = order("1F1B", 2, 2, 3)
    passes = [(a.kind, a.microbatch) for a in first if a.kind in PASSES]
    expected = [(FORWARD, 0), (FORWARD, 1), (BACKWARD, 0), (FORWARD, 2), (BACKWARD, 1)]
    assert passes == [*expected, (BACKWARD, 2)]
    assert [a.kind for a in last if a.kind in PASSES] == [FORWARD, BACKWARD] * 3
    assert last[-1] == Action("reduce", 1, None)
