"""Packing: which samples share a row of seq_len tokens.

Best-fit decreasing within a window of the given order: the samples of a window are sorted by falling length, and each
goes where the least room is left over. The emptiest row of a window stays open for the next one, so that only the very
last rows are short of samples. A window bounds both the work and how far a sample can move from its place in the order.
Rows come out longest sample first; the caller shuffles them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from torchsft.config import InputError


def pack(lengths: Sequence[int], order: Sequence[int], seq_len: int, buffer: int = 8192) -> list[list[int]]:
    """Divide samples into rows; the same arguments give the same rows.

    Args:
        lengths: tokens of each sample, at least 1 and at most seq_len.
        order: indices into `lengths`, each at most once.
        seq_len: tokens of a row.
        buffer: samples packed together (the window).

    Returns:
        Rows of sample indices; every index of `order` exactly once, the lengths of a row sum to at most seq_len.

    Raises:
        InputError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    open_row: list[int] = []
    for begin in range(0, len(order), buffer):
        packed = _best_fit_decreasing(lengths, [int(i) for i in order[begin : begin + buffer]], seq_len, open_row)
        if begin + buffer < len(order):
            open_row = packed.pop(min(range(len(packed)), key=lambda r: sum(lengths[i] for i in packed[r])))
        rows += packed
    return rows


def _best_fit_decreasing(lengths: Sequence[int], window: list[int], seq_len: int, open_row: list[int]) -> list[list[int]]:
    """Rows of the samples of `window`; the first one begins with the samples of `open_row`."""
    rows = [list(open_row)]
    room = [(seq_len - sum(lengths[i] for i in open_row), 0)]  # (free tokens, row), sorted; full rows leave it
    for sample in sorted(window, key=lambda i: -lengths[i]):  # stable: ties keep the given order
        length = int(lengths[sample])
        if not 1 <= length <= seq_len:
            raise InputError(
                f"sample {sample} has {length} tokens, but a row holds 1 to {seq_len}; raise --data.seq-len or set"
                " --data.truncation"
            )
        place = bisect_left(room, (length, 0))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(sample)
        else:
            free, row = seq_len, len(rows)
            rows.append([sample])
        if free > length:
            insort(room, (free - length, row))
    return rows
