"""Samples written by hand: pieces of text, each with its weight."""

from __future__ import annotations

import numpy as np

from tools.inspection.report import Inspected
from torchsft.data.cache import Samples, pack_block
from torchsft.data.template import Sample


def sample(tokenizer, *pieces):
    """`pieces`: a text is context, (text, weight) is trained. Each piece is tokenised on its
    own.
    """
    tokens, weights = [], []
    for piece in pieces:
        text, weight = (piece, 0.0) if isinstance(piece, str) else piece
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens += ids
        weights += [weight] * len(ids)
    return Sample("chat.jsonl:1", np.array(tokens), np.array(weights))


def source(*samples, name="chat.jsonl", **about):
    """A source of these; their ids are made anew, from rows 1, 2, ..."""
    block = pack_block([(row, 0, s.tokens, s.weights) for row, s in enumerate(samples, start=1)])
    given = {
        "path": f"/data/{name}",
        "format": "messages",
        "weight": 1.0,
        "evaluation": False,
        "rows": len(samples),
    }
    return Inspected(name=name, samples=Samples(name, block), **{**given, **about})
