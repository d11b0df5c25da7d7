"""Rows of tokens: padding, masks and bounds as transformers and TRL mean them."""

import itertools

import numpy as np
import pytest
import torch

from tests.data.test_formats import read
from torchsft.data.rows import RowError

IDS = [5, 6, 7, 8, 9, 10]


def shown(row):
    """Tokens and weights of each document."""
    example = read({"input_ids": IDS} | row)
    edges = [*example.starts, len(example.tokens)]
    documents = itertools.pairwise(edges)
    return [(example.tokens[a:b].tolist(), example.weights[a:b].tolist()) for a, b in documents]


def test_masked_tokens_are_taken_out_wherever_they_stand():
    labels = [-100, -100, 7, 8, 9, 10]
    for mask, kept in (
        ([0, 0, 1, 1, 1, 1], [2, 3, 4, 5]),
        ([1, 1, 1, 1, 0, 0], [0, 1, 2, 3]),
        ([1, 0, 1, 0, 1, 1], [0, 2, 4, 5]),
    ):
        [(tokens, weights)] = shown({"labels": labels, "attention_mask": mask})
        assert tokens == [IDS[i] for i in kept]
        assert weights == [float(labels[i] != -100) for i in kept]
    # labels of padding mean nothing: some tools leave the pad's id there
    assert shown({"labels": [0, 0, 7, 8, 9, 10], "attention_mask": [0, 0, 1, 1, 1, 1]}) == [
        ([7, 8, 9, 10], [1.0] * 4)
    ]


BOUNDS = {
    "position_ids": [0, 1, 0, 1, 2, 3],
    "seq_lengths": [2, 4],
    "cu_seqlens": [0, 2, 6],
    "cu_seq_lens": [0, 2, 2, 6],  # an empty document is none
    "document_ids": [3, 3, 1, 1, 1, 1],
    "seq_idx": [0, 0, 1, 1, 1, 1],
    "attention_mask": [1, 1, 2, 2, 2, 2],  # axolotl numbers the documents of a packed row
}


@pytest.mark.parametrize("key", BOUNDS)
def test_a_row_is_split_where_its_documents_begin(key):
    wanted = [([5, 6], [1.0, 1.0]), ([7, 8, 9, 10], [1.0] * 4)]
    assert shown({"labels": IDS, key: BOUNDS[key]}) == wanted
    assert shown({"labels": IDS, **BOUNDS}) == wanted  # all of them agree
    assert "split-into-documents" in read({"input_ids": IDS, key: BOUNDS[key]}).notes


def test_padding_beside_bounds():
    row = {"labels": IDS, "attention_mask": [0, 1, 1, 1, 1, 0], "position_ids": [1, 0, 1, 0, 1, 1]}
    assert [tokens for tokens, _ in shown(row)] == [[6, 7], [8, 9]]
    row = {"labels": IDS, "attention_mask": [0, 1, 1, 1, 1, 0], "seq_lengths": [3, 3]}
    assert [tokens for tokens, _ in shown(row)] == [[6, 7], [8, 9]]


MASKS = {
    "completion_mask": ({"completion_mask": [0, 0, 1, 1, 1, 1]}, [0, 0, 1, 1, 1, 1]),
    "assistant_masks": ({"assistant_masks": [0, 1, 1, 0, 0, 1]}, [0, 1, 1, 0, 0, 1]),
    "booleans": (
        {"assistant_tokens_mask": [False, True, True, False, False, True]},
        [0, 1, 1, 0, 0, 1],
    ),
    "both": (
        {"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [1, 1, 1, 0, 0, 1]},
        [0, 0, 1, 0, 0, 1],
    ),
    "labels that agree": (
        {"labels": [-100, -100, 7, 8, -100, 10], "completion_mask": [0, 0, 1, 1, 1, 1]},
        [0, 0, 1, 1, 0, 1],
    ),
    "alone": ({}, [1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_say_what_is_trained(name):
    row, wanted = MASKS[name]
    [(_, weights)] = shown(row)
    assert weights == wanted
    assert ("everything-trained" in read({"input_ids": IDS} | row).notes) is (name == "alone")


def test_the_same_tokens_are_trained_as_by_trl():
    """TRL's own collator, on rows as its preparation leaves them."""
    trl = pytest.importorskip(
        "trl.trainer.sft_trainer", reason="TRL is in the extra `benchmark` only"
    )
    collate = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = [
        {"input_ids": IDS, "labels": [-100, -100, 7, 8, 9, 10], "seq_lengths": [2, 4]},
        {"input_ids": IDS, "labels": IDS, "seq_lengths": [3, 1, 2]},
    ]
    for row in rows:
        theirs = collate([row])
        ours = read(row)
        weights = ours.weights.copy()
        # the first token of a document is no target, as prepare does
        weights[list(ours.starts)] = 0.0
        assert (theirs["labels"][0].numpy() != -100).tolist() == (weights > 0).tolist()
        assert np.flatnonzero(theirs["position_ids"][0].numpy() == 0).tolist() == list(ours.starts)


def test_labels_are_those_of_their_own_place_as_in_transformers():
    """Loss of a model in transformers that always predicts the token plus one: only unshifted
    labels make it small.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    ids = torch.arange(5, 11)
    logits = torch.nn.functional.one_hot(ids + 1, 16).float()[None] * 100
    right, shifted = ids.clone(), torch.cat([ids[1:], torch.tensor([-100])])
    assert (
        ForCausalLMLoss(logits, right[None], 16) < 1e-6 < ForCausalLMLoss(logits, shifted[None], 16)
    )
    assert shown({"labels": right.tolist()})[0][1] == [1.0] * 6
    with pytest.raises(
        RowError, match="but that of the token behind it; labels must not be shifted"
    ):
        read({"input_ids": ids.tolist(), "labels": shifted.tolist()})


REFUSED = {
    "attention_mask short": (
        {"attention_mask": [1]},
        "bad-mask",
        "6 input_ids, but 1 attention_mask",
    ),
    "attention_mask negative": ({"attention_mask": [-1] * 6}, "bad-mask", "at least 0"),
    "nothing left": ({"attention_mask": [0] * 6}, "bad-mask", "leaves no token"),
    "mask of weights": (
        {"completion_mask": [0, 0, 0.5, 1, 1, 1]},
        "bad-mask",
        "completion_mask must have a 0 or 1",
    ),
    "mask short": ({"assistant_masks": [1, 1]}, "bad-mask", "6 input_ids, but 2 assistant_masks"),
    "labels where the mask is 0": (
        {"labels": IDS, "completion_mask": [0, 1, 1, 1, 1, 1]},
        "bad-mask",
        "labels train token 1, but completion_mask is 0 there",
    ),
    "positions from 3": (
        {"position_ids": [3, 4, 5, 6, 7, 8]},
        "bad-bounds",
        "that of token 1 is 3",
    ),
    "positions with a gap": (
        {"position_ids": [0, 1, 3, 4, 5, 6]},
        "bad-bounds",
        "that of token 3 is 3",
    ),
    "lengths": (
        {"seq_lengths": [2, 3]},
        "bad-bounds",
        "seq_lengths must divide all 6 input_ids, from 0 to 6, but ends at 5",
    ),
    "edges": ({"cu_seqlens": [2, 6]}, "bad-bounds", "cu_seqlens must divide all 6"),
    "falling edges": ({"cu_seqlens": [0, 4, 2, 6]}, "bad-bounds", "cu_seqlens must divide all 6"),
    "no edges": ({"cu_seqlens": []}, "bad-bounds", "but ends at 0"),
    "bounds that differ": (
        {"seq_lengths": [2, 4], "seq_idx": [0, 0, 0, 1, 1, 1]},
        "bad-bounds",
        "seq_lengths and seq_idx divide",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_refused(name):
    row, reason, says = REFUSED[name]
    with pytest.raises(RowError) as error:
        read({"input_ids": IDS} | row)
    assert error.value.reason == reason and says in str(error.value)
