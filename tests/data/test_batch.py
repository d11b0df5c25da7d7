"""The tensors of a microbatch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchsft.config import InputError
from torchsft.data.batch import collate
from torchsft.data.template import Sample


def test_a_batch_by_hand():
    """Two rows of 6: [10 11 12 | 20 21 .] and [30 31 32 33 . .]; weight 0 at 12, 0.5 at 32."""
    a = Sample("a", [10, 11, 12], [0, 1, 0])
    b = Sample("b", [20, 21], [0, 1])
    c = Sample("c", [30, 31, 32, 33], [0, 0, 0.5, 1])
    batch = collate([[a, b], [c]], seq_len=6, pad_token_id=9)
    assert batch.tokens.tolist() == [10, 11, 12, 20, 21, 30, 31, 32, 33, 9, 9, 9]
    assert batch.labels.tolist() == [11, -100, -100, 21, -100, -100, 32, 33, -100, -100, -100, -100]
    assert batch.loss_weights.tolist() == [1, 0, 0, 1, 0, 0, 0.5, 1, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert (batch.max_seqlen, batch.padding) == (4, 3)
    types = [
        batch.tokens.dtype,
        batch.labels.dtype,
        batch.positions.dtype,
        batch.loss_weights.dtype,
    ]
    assert types == [torch.int64, torch.int64, torch.int64, torch.float32]
    assert batch.cu_seqlens.dtype == torch.int32


def test_a_batch_without_documents_is_padding_alone():
    batch = collate([[], []], seq_len=3, pad_token_id=7)
    assert batch.tokens.tolist() == [7] * 6
    assert batch.labels.tolist() == [-100] * 6
    assert batch.loss_weights.sum() == 0
    assert batch.cu_seqlens.tolist() == [0]
    assert (batch.max_seqlen, batch.padding) == (0, 6)


samples = st.lists(
    st.tuples(st.integers(1, 100), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=5
).map(
    lambda pairs: Sample(
        "s", [token for token, _ in pairs], [0.0, *(weight for _, weight in pairs[1:])]
    )
)


@given(
    rows=st.lists(st.lists(samples, max_size=3), min_size=1, max_size=4), pad=st.integers(0, 100)
)
def test_no_label_crosses_a_boundary_and_no_weight_is_lost(rows, pad):
    """Also where the pad token occurs as a real token and target."""
    batch = collate(rows, seq_len=15, pad_token_id=pad)
    documents = [sample for row in rows for sample in row]
    ends = batch.cu_seqlens.tolist()
    assert len(ends) == len(documents) + 1
    for sample, start, end in zip(documents, ends, ends[1:], strict=False):
        tokens, weights = sample.tokens.tolist(), sample.weights.tolist()
        assert batch.tokens[start:end].tolist() == tokens
        assert batch.positions[start:end].tolist() == list(range(len(tokens)))
        targets = [t if w else -100 for t, w in zip(tokens[1:], weights[1:], strict=True)]
        assert batch.labels[start:end].tolist() == [*targets, -100]
        assert batch.loss_weights[start:end].tolist() == [*weights[1:], 0.0]
    assert (batch.labels[ends[-1] :] == -100).all()
    assert (batch.loss_weights[ends[-1] :] == 0).all()
    assert len(batch.tokens) == 15 * len(rows)


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = collate([[Sample("a", [1, 2], [0, 1])]], seq_len=4, pad_token_id=0).to("meta")
    assert {
        value.device.type for value in vars(batch).values() if isinstance(value, torch.Tensor)
    } == {"meta"}
    assert batch.max_seqlen == 2


def test_a_row_that_is_too_long_is_refused():
    with pytest.raises(InputError, match=r"a row has 4 tokens, but --data\.seq-len is 3"):
        collate(
            [[Sample("a", [1, 2], [0, 1]), Sample("b", [1, 2], [0, 1])]], seq_len=3, pad_token_id=0
        )
