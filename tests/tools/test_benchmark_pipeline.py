"""The pipeline benchmark: its bubbles against formulas and orders written by hand, and that it
runs.
"""

import json

import pytest

from tools.benchmark_pipeline import (
    SCHEDULES,
    Action,
    Timed,
    bubbles,
    duration,
    formula,
    ideal_bubble,
    on_ranks,
    record_steps,
    run,
)
from torchsft.parallel.torch_pipelining import weight_pass_possible


def one_forward_one_backward(p, m):
    """Each rank has p - rank forward passes more than backward ones, at most."""
    ranks = []
    for rank in range(p):
        ahead = min(p - rank, m)
        kinds = "F" * ahead + "BF" * (m - ahead) + "B" * ahead
        ranks.append([[Action(kind, rank, kinds[:i].count(kind))] for i, kind in enumerate(kinds)])
    return ranks


def all_forward_all_backward(p, m):
    return [[[Action(kind, rank, i)] for kind in "FB" for i in range(m)] for rank in range(p)]


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 4), (3, 5), (4, 16)])
def test_orders_written_by_hand_have_the_bubble_of_their_formula(p, m):
    assert ideal_bubble(all_forward_all_backward(p, m)) == pytest.approx(
        formula("GPipe", p, m, 1), abs=1e-12
    )
    assert ideal_bubble(one_forward_one_backward(p, m)) == pytest.approx(
        formula("1F1B", p, m, 1), abs=1e-12
    )


def test_what_is_computed_together_is_sent_together():
    """Rank 1 begins after both forward passes of rank 0: a step of 10 units instead of 9, for 6
    units of work.
    """
    first, second = all_forward_all_backward(2, 2)
    together = [first[0] + first[1], *first[2:]]
    assert ideal_bubble([first, second]) == pytest.approx(1 - 6 / 9)
    assert ideal_bubble([together, second]) == pytest.approx(1 - 6 / 10)


def test_a_bubble_is_the_share_of_the_step_in_no_action():
    a = Action("F", 0, 0)
    ranks = [[Timed(a, 10.0, 11.0), Timed(a, 11.0, 12.0)], [Timed(a, 11.5, 14.0)]]
    assert bubbles(ranks) == [0.5, 0.375]


def test_actions_follow_from_each_other_on_the_clock_of_all_ranks():
    """Two stages a rank, as a V, with split backward passes."""
    m, unit = 4, 0.002
    ranks = on_ranks(2, record_steps, cases=[("ZBVZeroBubble", m)], repeats=1, unit=unit)
    steps = [timed for ((_, (step,)),) in ranks for timed in step]
    when = {timed.action: timed for timed in steps}
    assert len(when) == len(steps)
    assert {a for a in when if a.kind == "F"} == {
        Action("F", stage, i) for stage in range(4) for i in range(m)
    }
    for (kind, stage, i), (_, begin, end) in when.items():
        if kind == "F" and stage:
            assert when["F", stage - 1, i].end <= begin
        if kind == "I":
            assert when["W", stage, i].begin >= end
            if stage < 3:
                assert when["I", stage + 1, i].end <= begin
        # a sleep is never shorter
        assert end - begin >= duration(Action(kind, stage, i), weight_pass_possible()) * unit


def test_every_schedule_runs_in_the_order_that_its_formula_assumes(tmp_path):
    report = run(tmp_path / "pipeline.json", repeats=1, unit=0.001, sizes=(2, 4))
    assert json.loads((tmp_path / "pipeline.json").read_text()) == json.loads(json.dumps(report))
    cases = [(r["schedule"], r["pp"], r["microbatches"]) for r in report["results"]]
    assert cases == [
        (schedule, p, m) for p in (2, 4) for schedule in SCHEDULES for m in (2 * p, 4 * p)
    ]
    for r in report["results"]:
        if weight_pass_possible() or r["schedule"] in ("GPipe", "1F1B", "Interleaved1F1B"):
            assert r["its_order"] == pytest.approx(r["formula"], abs=1e-12), r
        else:
            assert r["its_order"] > r["formula"], r
        assert 0 < r["measured"] < 1 and len(r["each_rank"]) == r["pp"]
