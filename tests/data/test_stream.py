"""Loaders: what a step holds, states, faults, streaming sources, threads, evaluation. Orders:
test_order_properties.py.
"""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.listed import Listed, Read, numbered
from torchsft.config import InputError
from torchsft.data.background import Background
from torchsft.data.batch import Batch
from torchsft.data.stream import EvalSet, StreamLoader, TrainLoader

RNG = np.random.default_rng(0)
ROOT = Path(__file__).parents[2]
SAMPLES = numbered(RNG.integers(2, 33, 97))
ONE_ROW = {"global_batch_size": 1, "micro_batch_size": 1}
SIZES = {"seq_len": 64, "global_batch_size": 8, "micro_batch_size": 2, "seed": 3, "pad_token_id": 0}


def loader(data_rank=0, data_size=1, sources=None, **changes):
    return TrainLoader(
        sources or [Listed(SAMPLES)], data_rank=data_rank, data_size=data_size, **SIZES | changes
    )


def streamed(data_rank=0, data_size=1, sources=None, **changes):
    sources = sources or [Read([[sample] for sample in SAMPLES])]
    return StreamLoader(
        sources, data_rank=data_rank, data_size=data_size, **SIZES | {"buffer": 20} | changes
    )


def ids(loaders, steps):
    """Sample ids of each step, over all ranks."""
    return [
        [name for step in each for name in step.sample_ids]
        for each in islice(zip(*loaders, strict=True), steps)
    ]


def held(batches):
    """Ids of the samples in some batches, from their tokens."""
    tokens = [batch.tokens[: int(batch.cu_seqlens[-1])] for batch in batches]
    return [
        f"s:{int(token) - 1000}"
        for token in torch.cat([torch.zeros(0, dtype=torch.int64), *tokens]).unique()
    ]


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("cost", [None, lambda lengths: sum(n * n for n in lengths)])
def test_the_batches_hold_the_samples_that_are_named_and_ranks_are_disjoint(cost):
    for steps in islice(zip(*[loader(r, 4, cost=cost) for r in range(4)], strict=True), 9):
        names = [held(step.microbatches) for step in steps]
        assert names == [sorted(step.sample_ids, key=lambda name: int(name[2:])) for step in steps]
        assert max(Counter(name for each in names for name in each).values()) == 1
        assert [len(step.microbatches) for step in steps] == [1] * 4
        assert {len(batch.tokens) for step in steps for batch in step.microbatches} == {2 * 64}


def test_every_sample_comes_exactly_once_an_epoch_although_rows_do_not_divide():
    stream = loader()
    orders = []
    for epoch in range(3):
        steps = [next(stream) for _ in range(stream.steps_in_epoch(epoch))]
        assert {step.epoch for step in steps} == {epoch}
        # the last batch was filled up
        assert any(batch.max_seqlen == 0 for batch in steps[-1].microbatches)
        orders.append([name for step in steps for name in step.sample_ids])
        assert sorted(orders[-1]) == sorted(sample.id for sample in SAMPLES)
    assert len({tuple(order) for order in orders}) == 3
    assert next(stream).epoch == 3


@pytest.mark.parametrize("epochs", [0.001, 0.1, 0.25, 0.5, 0.9, 1.5, 2.3])
def test_a_part_of_an_epoch_is_the_fewest_steps_that_see_so_many_samples(epochs):
    stream, steps = loader(buffer=20), loader(buffer=20).steps_in(epochs)
    seen, before = 0, 0
    for _ in range(steps):
        before = seen
        seen += len(next(stream).sample_ids)
    assert before < epochs * len(SAMPLES) <= seen


def test_whole_epochs_are_those_of_all_their_steps():
    stream = loader()
    assert stream.steps_in(1) == stream.steps_in(1.0) == stream.steps_in_epoch(0)
    assert stream.steps_in(3) == sum(stream.steps_in_epoch(epoch) for epoch in range(3))
    tenths = TrainLoader([Listed(numbered([40] * 30))], data_rank=0, data_size=1, **SIZES | ONE_ROW)
    assert tenths.steps_in(0.1) == 3  # rows of one sample; in floating point 0.1 * 30 is above 3


def test_the_rows_that_fill_up_an_epoch_weigh_nothing():
    stream = loader()
    steps = [next(stream) for _ in range(stream.steps_in_epoch(0))]
    weight = sum(float(batch.loss_weights.sum()) for step in steps for batch in step.microbatches)
    assert weight == sum(float(sample.weights.sum()) for sample in SAMPLES)


def test_rows_come_in_no_order_of_length():
    """Packing sorts by length; the stream must not begin with the long documents."""
    stream = loader(sources=[Listed(numbered(RNG.integers(2, 33, 4000)))])
    steps = [next(stream) for _ in range(stream.steps_in_epoch(0) - 1)]
    documents = [len(step.sample_ids) for step in steps]
    half = len(documents) // 2
    assert abs(np.mean(documents[:half]) / np.mean(documents[half:]) - 1) < 0.05


def test_a_row_costs_what_its_documents_do_and_the_rows_of_a_step_stay_the_same():
    seen = []

    def cost(lengths):
        seen.append(lengths)
        return float(max(lengths))

    plain = [Counter(names) for names in ids([loader()], 5)]
    dealt = [loader(r, 2, micro_batch_size=1, cost=cost) for r in range(2)]
    length = {sample.id: len(sample.tokens) for sample in SAMPLES}
    for expected, steps in zip(plain, zip(*dealt, strict=True), strict=False):
        assert Counter(name for step in steps for name in step.sample_ids) == expected
        longest = [[batch.max_seqlen for batch in step.microbatches] for step in steps]
        pairs = sorted((cost for pair in zip(*longest, strict=True) for cost in pair), reverse=True)
        # like beside like
        assert [
            n for pair in zip(*longest, strict=True) for n in sorted(pair, reverse=True)
        ] == pairs
    assert {n for lengths in seen for n in lengths} <= set(length.values())
    assert all(0 < sum(lengths) <= 64 for lengths in seen)


def test_packing_none_gives_rows_of_one_sample():
    stream = loader(packing="none", seq_len=32)
    documents = [
        len(b.cu_seqlens) - 1
        for _ in range(stream.steps_in_epoch(0))
        for b in next(stream).microbatches
    ]
    assert sum(documents) == 97 and max(documents) == 2
    assert stream.steps_in_epoch(0) == -(-97 // 8)


def test_epochs_are_counted_for_each_source():
    sources = [
        Listed(SAMPLES[:40], weight=2.0, name="a"),
        Listed(SAMPLES[40:], weight=0.5, name="b"),
    ]
    stream = loader(sources=sources)
    assert stream.source_epochs(stream.state_dict()) == {"a": 0.0, "b": 0.0}
    for _ in range(stream.steps_in_epoch(0)):
        next(stream)
    assert stream.source_epochs(stream.state_dict()) == {
        "a": 2.0,
        "b": 29 / 57,
    }  # half of 57 is 28.5: 29 now, 28 in the next epoch


def test_sizes_that_do_not_divide_and_no_samples_are_refused_with_a_remedy():
    with pytest.raises(
        InputError,
        match=r"global-batch-size \(10\) must divide by .*\(2\) .* "
        r"ranks \(4\); set it to 16",
    ):
        loader(data_size=4, global_batch_size=10)
    for none in ([Listed([])], [Listed(SAMPLES), Listed([])]):
        with pytest.raises(InputError, match=r"--data\.train has no samples"):
            loader(sources=none)
    with pytest.raises(InputError, match="has 32 tokens, but a row holds 1 to 31"):
        next(loader(seq_len=31))


# ---------------------------------------------------------------- states


def test_the_state_is_plain_small_and_begins_an_epoch_at_its_first_row():
    stream = loader()

    def place(state):
        assert json.loads(json.dumps(state)) == state
        return state["epoch"], state["window"], state["row"], state["remainder"]

    assert place(stream.state_dict()) == (0, 0, 0, [])
    assert place(next(stream).state) == (0, 0, 8, [])
    for _ in range(stream.steps_in_epoch(0) - 1):
        next(stream)
    assert place(stream.state_dict()) == (1, 0, 0, [])
    many = loader(sources=[Listed(numbered(RNG.integers(2, 33, 4000)))], buffer=500)
    assert max(len(json.dumps(next(many).state)) for _ in range(100)) < 1000


@pytest.mark.parametrize(
    "change, numbers",
    [
        (
            {"sources": [Listed(SAMPLES[:-1])]},
            r"96 samples \(digest \w+\) at weight 1 .* then, 97 "
            r"samples",
        ),
        (
            {"sources": [Listed(SAMPLES[::-1])]},
            r"97 samples \(digest \w+\) at weight 1 .* then, 97 "
            r"samples",
        ),
        ({"sources": [Listed(SAMPLES, weight=2.0)]}, "at weight 2 .* then, .* at weight 1 "),
        ({"sources": [Listed(SAMPLES), Listed(SAMPLES)]}, r"\+ 97 samples .* then, 97 samples"),
        ({"seq_len": 65}, "--data.seq-len 65,.* then, .*--data.seq-len 64,"),
        ({"seed": 4}, "--train.seed 4.* then, .*--train.seed 3"),
        ({"packing": "none"}, "--data.packing none,.* then, .*--data.packing best-fit,"),
        ({"buffer": 7}, "--data.packing-buffer 7,.* then, .*--data.packing-buffer 8192,"),
    ],
)
def test_a_state_of_other_data_or_of_another_order_is_refused(change, numbers):
    with pytest.raises(
        InputError, match=f"training data changed since the checkpoint: .*{numbers}"
    ):
        loader().load_state_dict(loader(**change).state_dict())


def test_a_state_of_another_version_is_refused():
    with pytest.raises(InputError, match="data of another version"):
        loader().load_state_dict({"epoch": 0, "position": 8, "samples": 97, "digest": "0"})


def test_a_continuation_may_change_the_size_of_a_step():
    stream = loader()
    before = ids([stream], 1)[0]
    more = loader(global_batch_size=16)
    more.load_state_dict(stream.state_dict())
    rest = [
        name
        for step in range(more.steps_in_epoch(0))
        for name in next(more).sample_ids
        if more.taken[0] <= 97
    ]
    assert sorted(before + rest) == sorted(sample.id for sample in SAMPLES)


# ---------------------------------------------------------------- streaming sources


def test_a_stream_is_read_in_order_and_shuffled_within_windows():
    stream = streamed(packing="none", global_batch_size=2)
    drawn = [name for step in ids([stream], 30) for name in step]
    for begin in range(0, 60, 20):
        window = drawn[begin : begin + 20]
        assert sorted(window) == sorted(f"s:{k}" for k in range(begin, begin + 20))
        assert window != sorted(window, key=lambda name: int(name[2:]))


def test_a_stream_begins_again_and_its_sources_are_mixed_by_weight():
    a = Read([[s] for s in numbered([5] * 30, "a")], weight=2.0, name="a")
    b = Read([[s] for s in numbered([5] * 40, "b")], name="b")
    stream = streamed(sources=[a, b], packing="none", buffer=3)
    steps = [next(stream) for _ in range(30)]
    drawn = [name for step in steps for name in step.sample_ids]
    assert Counter(name[0] for name in drawn) == {"a": 160, "b": 80}
    assert all(
        Counter(name[0] for name in drawn[i : i + 3]) == {"a": 2, "b": 1} for i in range(0, 240, 3)
    )
    assert [set(Counter(name for name in drawn if name[0] == k).values()) for k in "ab"] == [
        {5, 6},
        {2},
    ]
    epochs = [step.epoch for step in steps]
    # b has ended once when 120 samples are drawn
    assert epochs == sorted(epochs) and set(epochs) == {0, 1}
    assert 120 <= 8 * epochs.index(1) <= 120 + 8
    assert stream.source_epochs(stream.state_dict()) == {"a": 160 / 30, "b": 2.0}


def test_a_stream_continues_where_it_was_also_within_a_row_of_several_samples():
    rows = [SAMPLES[i : i + 1 + i % 3] for i in range(60)]
    sources = [Read(rows, weight=1.5), Read([[s] for s in numbered([9] * 7, "t", 5000)])]
    straight = streamed(sources=sources)
    steps = [next(straight) for _ in range(14)]
    for done in range(13):
        again = streamed(sources=sources)
        again.load_state_dict(json.loads(json.dumps(steps[done].state)))
        step = next(again)
        assert step.sample_ids == steps[done + 1].sample_ids
        assert step.state == steps[done + 1].state
        for one, other in zip(step.microbatches, steps[done + 1].microbatches, strict=True):
            assert all(
                torch.equal(a, b)
                for a, b in zip(
                    one.model_inputs().values(), other.model_inputs().values(), strict=True
                )
                if isinstance(a, torch.Tensor)
            )


def test_a_stream_is_opened_near_where_it_goes_on():
    source = Read([[sample] for sample in numbered([10] * 1000)])
    stream = streamed(sources=[source])
    steps = [next(stream) for _ in range(10)]
    assert source.opened == [0]
    again = streamed(sources=[source])
    again.load_state_dict(steps[-1].state)
    next(again)
    window = steps[-1].state["window"]
    assert source.opened == [0, window * 20 - 1] and window > 10


def test_a_stream_that_changed_or_is_empty_is_refused():
    stream = streamed()
    for _ in range(3):
        state = next(stream).state
    again = streamed(sources=[Read([[sample] for sample in SAMPLES[:5]])])
    again.load_state_dict(state)
    with pytest.raises(
        InputError, match=r"changed since the checkpoint: s has no sample \d+/0 now"
    ):
        next(again)
    wide, narrow = ([[sample] for sample in numbered([n] * 100)] for n in (60, 5))
    again = streamed(sources=[Read(narrow)])
    wider = streamed(sources=[Read(wide)])
    next(wider)
    again.load_state_dict(next(wider).state)
    with pytest.raises(
        InputError,
        match=r"changed since the checkpoint: 16 rows are done of a "
        r"window that has 1 now",
    ):
        next(again)
    with pytest.raises(InputError, match=r"s streamed at weight 1 .* then, t streamed"):
        streamed(sources=[Read([[SAMPLES[0]]], name="t")]).load_state_dict(state)
    with pytest.raises(InputError, match=r"--data\.train has no samples in 'none'"):
        next(streamed(sources=[Read([[SAMPLES[0]]]), Read([], name="none")]))


def test_a_stream_is_the_same_for_any_number_of_ranks():
    one = ids([streamed()], 9)
    assert ids([streamed(r, 4) for r in range(4)], 9) == one
    assert len({name for step in one for name in step}) == 97


# ---------------------------------------------------------------- threads


def background(loader, workers):
    """A `Background` whose threads end with the test."""
    made = Background(loader, workers)
    MADE.append(made)
    return made


MADE: list[Background] = []


@pytest.fixture(autouse=True)
def close():
    yield
    while MADE:
        MADE.pop().close()


class Slow(TrainLoader):
    """Builds earlier steps more slowly than later ones, so that they are ready in another order."""

    def build(self, plan):
        time.sleep(0.02 * (5 - plan.state["row"] // 8 % 5))
        return super().build(plan)


@pytest.mark.parametrize("make", [loader, streamed])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_neither_steps_nor_states(workers, make):
    straight, beside = make(), background(make(), workers)
    assert beside.state_dict() == straight.state_dict()
    for _ in range(12):
        ours, theirs = next(beside), next(straight)
        assert (ours.sample_ids, ours.epoch, ours.state) == (
            theirs.sample_ids,
            theirs.epoch,
            theirs.state,
        )
        assert beside.state_dict() == straight.state_dict()  # not that of what is prepared already
        assert all(
            torch.equal(a.tokens, b.tokens)
            for a, b in zip(ours.microbatches, theirs.microbatches, strict=True)
        )


def test_steps_keep_their_order_although_later_ones_are_ready_first():
    slow = Slow([Listed(SAMPLES)], data_rank=0, data_size=1, **SIZES)
    assert ids([background(slow, 4)], 8) == ids([loader()], 8)


def test_two_steps_are_prepared_while_the_consumer_works():
    built, ready = [], threading.Event()

    class Watched(TrainLoader):
        def build(self, plan):
            step = super().build(plan)
            built.append(plan.state)
            if len(built) == 3:
                ready.set()
            return step

    beside = background(Watched([Listed(SAMPLES)], data_rank=0, data_size=1, **SIZES), 1)
    assert not built  # nothing is read before a step is asked for: a state can still be loaded
    next(beside)
    assert ready.wait(10)
    alone = background(Watched([Listed(SAMPLES)], data_rank=0, data_size=1, **SIZES), 0)
    built.clear()
    next(alone), next(alone)
    assert len(built) == 2


def test_a_background_continues_from_a_state_also_after_it_has_begun():
    straight = loader()
    steps = [next(straight) for _ in range(9)]
    beside = background(loader(), 2)
    for _ in range(7):
        next(beside)
    beside.load_state_dict(steps[3].state)
    assert beside.state_dict() == steps[3].state
    assert next(beside).sample_ids == steps[4].sample_ids


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_thread_raises_is_raised_where_its_step_is_asked_for_and_again(workers):
    class Broken(list):
        lengths = np.array([2] * 200)

        def __len__(self):
            return 200

        def __getitem__(self, i):
            if i == 7:
                raise InputError("sample 7 cannot be read")
            return SAMPLES[0]

    source = Listed(SAMPLES)
    source.samples = Broken()
    fine = loader(sources=[source], packing="none")
    at = next(i for i in range(99) if (0, 7) in [ref for row in fine.plan().rows for ref in row])
    assert at > 3
    beside = background(loader(sources=[source], packing="none"), workers)
    for _ in range(at):
        next(beside)
    state = beside.state_dict()
    for _ in range(2):
        with pytest.raises(InputError, match="sample 7 cannot be read"):
            next(beside)
    assert beside.state_dict() == state


def test_the_wait_for_a_step_is_measured():
    class Late(TrainLoader):
        def plan(self):
            time.sleep(0.05)
            return super().plan()

    beside = background(Late([Listed(SAMPLES)], data_rank=0, data_size=1, **SIZES), 0)
    assert beside.waited == 0
    next(beside)
    assert beside.waited >= 0.05


def test_steps_for_a_gpu_are_pinned_by_a_thread_that_belongs_to_it(monkeypatch):
    """Pinned in a thread whose device is the default, rank 3's memory would need a context on GPU
    0.
    """
    device, pinned = threading.local(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: setattr(device, "chosen", chosen))
    monkeypatch.setattr(
        Batch, "pin_memory", lambda batch: pinned.append((device.chosen, batch)) or batch
    )
    beside = Background(loader(), 2, torch.device("cuda", 3))
    batches = [batch for _ in range(3) for batch in next(beside).microbatches]
    beside.close()
    assert all(any(batch is one for _, one in pinned) for batch in batches)
    assert {str(chosen) for chosen, _ in pinned} == {"cuda:3"}
    assert not hasattr(device, "chosen")  # of the training thread


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    beside = Background(loader(), 3)
    next(beside)
    assert set(threading.enumerate()) > before
    beside.close()
    assert set(threading.enumerate()) == before


def test_the_end_of_the_program_does_not_wait_for_all_that_is_planned_ahead():
    """Of 33 plans of 0.2 s each; nothing has called `close`."""
    program = """
import time
from tests.data.test_stream import SAMPLES, SIZES, Background, Listed, TrainLoader
class Late(TrainLoader):
    def plan(self):
        print("plan", flush=True)
        time.sleep(0.2)
        return super().plan()
next(Background(Late([Listed(SAMPLES)], data_rank=0, data_size=1, **SIZES), 32))
print("over", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.partition("over")[2].count("plan") < 20


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("data_size", [1, 2, 4, 64])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_evaluation_holds_every_sample_once_and_gives_ranks_equally_many_batches(
    data_size, micro_batch_size
):
    sizes = {
        "seq_len": 64,
        "micro_batch_size": micro_batch_size,
        "data_size": data_size,
        "pad_token_id": 0,
    }
    sources = [Listed(SAMPLES[:30], weight=2.0), Listed(SAMPLES[30:])]
    ranks = [EvalSet(sources, data_rank=rank, **sizes) for rank in range(data_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert [len(list(batches)) for batches in ranks] == [len(batches) for batches in ranks]
    assert {len(batch.tokens) for batches in ranks for batch in batches} == {64 * micro_batch_size}
    names = Counter(name for batches in ranks for name in held(batches))
    assert names == Counter(sample.id for sample in SAMPLES)
    weight = sum(float(batch.loss_weights.sum()) for batches in ranks for batch in batches)
    assert weight == sum(float(sample.weights.sum()) for sample in SAMPLES)


def test_evaluation_reads_a_sample_only_when_its_batch_is_asked_for():
    sources = [Listed(SAMPLES)]
    sizes = {
        "seq_len": 64,
        "micro_batch_size": 2,
        "data_rank": 0,
        "data_size": 1,
        "pad_token_id": 0,
    }
    batches = EvalSet(sources, **sizes)
    assert torch.equal(batches[1].tokens, list(batches)[1].tokens) and torch.equal(
        batches[-1].tokens, list(batches)[-1].tokens
    )
    with pytest.raises(IndexError):
        batches[len(batches)]
    sources[0].samples[:] = [None] * 97
    with pytest.raises(AttributeError):
        batches[0]


def test_evaluation_of_nothing_has_no_batches():
    sizes = {"seq_len": 8, "micro_batch_size": 1, "data_rank": 1, "data_size": 2, "pad_token_id": 0}
    assert list(EvalSet([Listed([])], **sizes)) == []
