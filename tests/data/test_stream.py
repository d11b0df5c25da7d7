"""The order of training: independent of ranks, exact on resume, every sample once an epoch."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from torchsft.config import InputError
from torchsft.data.stream import TrainLoader, eval_batches
from torchsft.data.template import Sample

RNG = np.random.default_rng(0)
# Token 1000 + k is in sample k alone, so that a batch shows which samples it holds.
SAMPLES = [Sample(f"s:{k}", [1000 + k] * n, [0.0] + [1.0] * (n - 1)) for k, n in enumerate(RNG.integers(2, 33, 97))]


def loader(data_rank=0, data_size=1, **changes):
    arguments = {"seq_len": 64, "global_batch_size": 8, "micro_batch_size": 2, "seed": 3, "pad_token_id": 0} | changes
    return TrainLoader(SAMPLES, data_rank=data_rank, data_size=data_size, **arguments)


def ids(loaders, steps):
    """Sample ids of each step, over all ranks."""
    return [[name for step in each for name in step.sample_ids] for each in islice(zip(*loaders, strict=True), steps)]


def held(batches):
    """Ids of the samples in some batches, from their tokens."""
    tokens = [batch.tokens[: int(batch.cu_seqlens[-1])] for batch in batches]
    return [f"s:{int(token) - 1000}" for token in torch.cat([torch.zeros(0, dtype=torch.int64), *tokens]).unique()]


def test_the_stream_is_the_same_for_any_number_of_ranks():
    one = ids([loader()], 9)
    assert ids([loader(r, 2) for r in range(2)], 9) == one
    assert ids([loader(r, 4) for r in range(4)], 9) == one
    assert ids([loader(micro_batch_size=1)], 9) == one


def test_the_batches_hold_the_samples_that_are_named_and_ranks_are_disjoint():
    for steps in islice(zip(*[loader(r, 4) for r in range(4)], strict=True), 9):
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
        assert any(batch.max_seqlen == 0 for batch in steps[-1].microbatches)  # the last batch was filled up
        orders.append([name for step in steps for name in step.sample_ids])
        assert sorted(orders[-1]) == sorted(sample.id for sample in SAMPLES)
    assert len({tuple(order) for order in orders}) == 3
    assert next(stream).epoch == 3


def test_the_rows_that_fill_up_an_epoch_weigh_nothing():
    stream = loader()
    steps = [next(stream) for _ in range(stream.steps_in_epoch(0))]
    weight = sum(float(batch.loss_weights.sum()) for step in steps for batch in step.microbatches)
    assert weight == sum(float(sample.weights.sum()) for sample in SAMPLES)


@pytest.mark.parametrize("before, after", [(1, 1), (1, 4), (4, 2)])
def test_resume_from_any_step_continues_the_stream_on_any_number_of_ranks(before, after):
    straight = ids([loader()], 12)
    assert loader().steps_in_epoch(0) < 6  # so that the steps below cross two epochs
    for done in range(11):
        first = [loader(r, before) for r in range(before)]
        assert ids(first, done) == straight[:done]
        states = [each.state_dict() for each in first]
        assert all(state == states[0] for state in states)
        second = [loader(r, after) for r in range(after)]
        for each in second:
            each.load_state_dict(states[0])
        assert ids(second, 12 - done) == straight[done:]


def test_the_state_is_plain_numbers_and_begins_an_epoch_at_its_first_row():
    stream = loader()

    def place(stream):
        state = stream.state_dict()
        assert json.loads(json.dumps(state)) == state
        return state["epoch"], state["position"]

    assert place(stream) == (0, 0)
    next(stream)
    assert place(stream) == (0, 8)
    for _ in range(stream.steps_in_epoch(0) - 1):
        next(stream)
    assert place(stream) == (1, 0)


def test_a_state_of_other_data_is_refused():
    with pytest.raises(InputError, match="continues at row 800 of epoch 1, but that epoch has"):
        loader().load_state_dict(loader().state_dict() | {"epoch": 1, "position": 800})
    fewer = TrainLoader(
        SAMPLES[:-1], seq_len=64, global_batch_size=8, micro_batch_size=2, data_rank=0, data_size=1, seed=0, pad_token_id=0
    )
    with pytest.raises(InputError, match=rf"data changed since the checkpoint: {len(SAMPLES) - 1} samples .* {len(SAMPLES)} "):
        loader().load_state_dict(fewer.state_dict())


def test_the_seed_decides_the_order():
    assert ids([loader(seed=3)], 3) == ids([loader(seed=3)], 3)
    assert ids([loader(seed=3)], 3) != ids([loader(seed=4)], 3)


def test_rows_come_in_no_order_of_length():
    """Packing sorts by length; the stream must not begin with the long documents."""
    samples = [Sample(f"s:{k}", [1] * n, [1.0] * n) for k, n in enumerate(RNG.integers(2, 33, 4000))]
    stream = TrainLoader(
        samples, seq_len=64, global_batch_size=8, micro_batch_size=8, data_rank=0, data_size=1, seed=0, pad_token_id=0
    )
    steps = [next(stream) for _ in range(stream.steps_in_epoch(0) - 1)]
    documents = [sum(len(batch.cu_seqlens) - 1 for batch in step.microbatches) for step in steps]
    half = len(documents) // 2
    assert abs(np.mean(documents[:half]) / np.mean(documents[half:]) - 1) < 0.05


def test_sizes_that_do_not_divide_and_no_samples_are_refused_with_a_remedy():
    with pytest.raises(InputError, match=r"global-batch-size \(10\) must divide by .*\(2\) .* ranks \(4\); set it to 16"):
        loader(data_size=4, global_batch_size=10)
    with pytest.raises(InputError, match=r"--data\.train has no samples"):
        TrainLoader([], seq_len=64, global_batch_size=8, micro_batch_size=2, data_rank=0, data_size=1, seed=0, pad_token_id=0)


@pytest.mark.parametrize("data_size", [1, 2, 4, 64])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_evaluation_holds_every_sample_once_and_gives_ranks_equally_many_batches(data_size, micro_batch_size):
    ranks = [
        eval_batches(
            SAMPLES,
            seq_len=64,
            micro_batch_size=micro_batch_size,
            data_rank=rank,
            data_size=data_size,
            pad_token_id=0,
        )
        for rank in range(data_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch.tokens) for batches in ranks for batch in batches} == {64 * micro_batch_size}
    names = Counter(name for batches in ranks for name in held(batches))
    assert names == Counter(sample.id for sample in SAMPLES)
    weight = sum(float(batch.loss_weights.sum()) for batches in ranks for batch in batches)
    assert weight == sum(float(sample.weights.sum()) for sample in SAMPLES)


def test_evaluation_of_nothing_has_no_batches():
    assert eval_batches([], seq_len=8, micro_batch_size=1, data_rank=1, data_size=2, pad_token_id=0) == []
