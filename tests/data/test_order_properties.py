"""Properties of the order of training, for sources, weights, sizes and points of continuation that
hypothesis chooses.
"""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.listed import Listed, Read, numbered
from torchsft.data.background import Background
from torchsft.data.order import shuffled
from torchsft.data.stream import StreamLoader, TrainLoader

SEQ_LEN = 24
FEW = settings(deadline=None, max_examples=25)  # each takes many steps
METHODS = st.sampled_from(["best-fit", "first-fit", "none"])
LENGTHS = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=40)


@st.composite
def sources(draw, weights=(0.25, 0.5, 1.0, 2.0, 3.0), most=3):
    kinds = draw(st.lists(st.tuples(LENGTHS, st.sampled_from(weights)), min_size=1, max_size=most))
    return [
        Listed(numbered(lengths, f"{s}", 1000 * (s + 1)), weight, f"{s}")
        for s, (lengths, weight) in enumerate(kinds)
    ]


OPTIONS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**40),
        "packing": METHODS,
        "buffer": st.integers(1, 50),
        "global_batch_size": st.sampled_from([4, 8]),
    }
)


def loader(of, options, rank=0, ranks=1, **more):
    make = TrainLoader if isinstance(of[0], Listed) else StreamLoader
    sizes = {"seq_len": SEQ_LEN, "micro_batch_size": 1, "pad_token_id": 0}
    return make(of, data_rank=rank, data_size=ranks, **sizes, **options, **more)


def stream(loaders, steps):
    """Of each step: epoch, and the samples of each row of the global batch."""
    found = []
    for _ in range(steps):
        each = [next(loader) for loader in loaders]
        assert all(step.state == each[0].state and step.epoch == each[0].epoch for step in each)
        rows, names = [], [name for step in each for name in step.sample_ids]
        for batch in (batch for step in each for batch in step.microbatches):
            documents = len(batch.cu_seqlens) - 1
            rows.append(names[:documents])
            names = names[documents:]
        assert not names
        found.append((each[0].epoch, rows))
    return found


def epoch_of(loader, epoch):
    """Sample ids of a whole epoch."""
    steps = stream([loader], loader.steps_in_epoch(epoch))
    assert {number for number, _ in steps} == {epoch}
    return [name for _, rows in steps for row in rows for name in row]


@FEW
@given(n=st.integers(1, 700), key=st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_a_permutation_is_one_and_any_part_of_it_can_be_asked_for(n, key):
    whole = shuffled(np.arange(n), n, *key)
    assert sorted(whole.tolist()) == list(range(n))
    places = np.random.default_rng(n).integers(0, n, 50)
    assert shuffled(places, n, *key).tolist() == whole[places].tolist()


def test_a_permutation_of_a_large_range_costs_no_memory_and_stays_in_it():
    n = 10**12 + 39
    found = shuffled(np.arange(n - 10_000, n), n, 1, 2, 3)
    assert len(set(found.tolist())) == 10_000 and found.min() >= 0 and found.max() < n
    assert abs(found.mean() / n - 0.5) < 0.02  # 0.29 / sqrt(10,000), times 7


def test_permutations_are_mixed_and_differ_by_key():
    """Each of 12 things comes to each place about equally often, and neighbours part."""
    keys = 1500
    places = np.array([shuffled(np.arange(12), 12, key) for key in range(keys)])
    counts = np.array([np.bincount(places[:, i], minlength=12) for i in range(12)])
    assert np.abs(counts - keys / 12).max() < 6 * (keys / 12) ** 0.5
    neighbours = (np.diff(shuffled(np.arange(100_000), 100_000, 5)) == 1).mean()
    assert neighbours < 1e-3


@FEW
@given(of=sources(weights=(1.0,)), options=OPTIONS)
def test_at_weight_one_every_sample_comes_exactly_once_an_epoch(of, options):
    of_epoch = loader(of, options)
    names = sorted(sample.id for source in of for sample in source.samples)
    assert [sorted(epoch_of(of_epoch, epoch)) for epoch in range(3)] == [names] * 3


@FEW
@given(of=sources(), options=OPTIONS)
def test_weights_are_exact_over_the_epochs_that_make_them_whole(of, options):
    of_epoch = loader(of, options)
    drawn = Counter()
    for epoch in range(1, 5):
        found = Counter(epoch_of(of_epoch, epoch - 1))
        drawn += found
        for source in of:
            counts = [drawn[sample.id] for sample in source.samples]
            times = epoch * Fraction(source.weight)
            # fewer than one draw an epoch would be none
            if min(1, len(counts) * source.weight) == 1:
                assert abs(sum(counts) - times * len(counts)) <= Fraction(1, 2)
                if times.denominator == 1:
                    assert set(counts) == {int(times)}
                else:
                    assert max(counts) - min(counts) <= 1
            assert any(found[sample.id] for sample in source.samples)


@FEW
@given(of=sources(), options=OPTIONS)
def test_the_stream_is_the_same_for_any_number_of_ranks_and_workers(of, options):
    straight = stream([loader(of, options)], 6)
    for ranks in (2, 4):
        assert stream([loader(of, options, rank, ranks) for rank in range(ranks)], 6) == straight
    for workers in (0, 1, 3):
        beside = Background(loader(of, options), workers)
        assert stream([beside], 6) == straight
        beside.close()


@FEW
@given(
    of=sources(),
    options=OPTIONS,
    workers=st.sampled_from([0, 1, 3]),
    ranks=st.sampled_from([1, 2, 4]),
)
def test_a_continuation_from_any_step_on_any_number_of_ranks_is_the_same_stream(
    of, options, workers, ranks
):
    first = loader(of, options)
    epoch = first.steps_in_epoch(0)
    steps = min(epoch + 3, 14)
    straight = stream([loader(of, options)], steps + 2)
    for done in range(1, steps):
        state = json.loads(json.dumps(next(first).state))
        assert state == first.state_dict()
        if done < steps - 6 and done % 3:
            continue
        second = [Background(loader(of, options, rank, ranks), workers) for rank in range(ranks)]
        for each in second:
            each.load_state_dict(state)
        assert stream(second, 2) == straight[done : done + 2]
        for each in second:
            each.close()


@FEW
@given(of=sources(weights=(1.0,)), options=OPTIONS, ranks=st.sampled_from([2, 4]))
def test_balancing_changes_which_rank_has_a_row_and_nothing_else(of, options, ranks):
    def cost(lengths):
        return sum(n * n for n in lengths)

    plain = stream([loader(of, options)], 5)
    dealt = stream([loader(of, options, rank, ranks, cost=cost) for rank in range(ranks)], 5)
    assert [(epoch, sorted(rows)) for epoch, rows in dealt] == [
        (epoch, sorted(rows)) for epoch, rows in plain
    ]
    state = stream_state(loader(of, options), 5)
    assert state == stream_state(loader(of, options, 1, ranks, cost=cost), 5)


def stream_state(of, steps):
    return [next(of).state for _ in range(steps)][-1]


@FEW
@given(of=sources(weights=(1.0,)), options=OPTIONS)
def test_a_sample_does_not_leave_its_windows_neighbourhood_and_rows_stay_full(of, options):
    """What is emitted by the end of window w is all that windows 0..w drew, but for the one open
    row.
    """
    train = loader(of, options | {"global_batch_size": 1})
    total = sum(len(source.samples) for source in of)
    while train.start.epoch == 0:
        train.plan()
        if train.row == 0 and train.start.epoch == 0:
            drawn = train.start.window * options["buffer"]
            assert train.taken and sum(train.taken) == drawn - len(train.remainder)
            assert (
                sum(len(train.sources[s].samples[i].tokens) for s, i in train.remainder) <= SEQ_LEN
            )
    assert sum(train.taken) == total


@st.composite
def streams(draw):
    kinds = draw(
        st.lists(st.tuples(LENGTHS, st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=3)
    )
    made = []
    for s, (lengths, weight) in enumerate(kinds):
        samples, rows = numbered(lengths, f"{s}", 1000 * (s + 1)), []
        while samples:
            several = draw(st.integers(1, 3))
            rows.append(samples[:several])
            samples = samples[several:]
        made.append(Read(rows, weight, f"{s}"))
    return made


@FEW
@given(
    of=streams(), options=OPTIONS, ranks=st.sampled_from([1, 2, 4]), workers=st.sampled_from([0, 2])
)
def test_streaming_sources_give_the_same_stream_on_any_ranks_workers_and_continuation(
    of, options, ranks, workers
):
    first = loader(of, options)
    straight = stream([loader(of, options)], 8)
    beside = [Background(loader(of, options, rank, ranks), workers) for rank in range(ranks)]
    assert stream(beside, 8) == straight
    for each in beside:
        each.close()
    for done in range(1, 7):
        state = json.loads(json.dumps(next(first).state))
        second = [loader(of, options, rank, ranks) for rank in range(ranks)]
        for each in second:
            each.load_state_dict(state)
        assert stream(second, 2) == straight[done : done + 2]


@FEW
@given(of=streams(), options=OPTIONS)
def test_a_streaming_source_gives_each_sample_as_often_as_it_was_gone_through(of, options):
    train = loader(of, options)
    names = Counter(name for _, rows in stream([train], 30) for row in rows for name in row)
    for source, taken in zip(of, train.taken, strict=True):
        counts = [names[sample.id] for row in source.rows for sample in row]
        assert sum(counts) == taken
        # Samples that are drawn already, but not in a step yet: they may all be copies of one short
        # sample, which the open row collects, while each long one fills a row and leaves at once.
        ahead = options["buffer"] + SEQ_LEN
        assert max(counts) - min(counts) <= 1 + ahead
