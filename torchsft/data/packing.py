"""Packing: which samples share a row of seq_len tokens, and which rows of a step a rank gets.

best-fit    the samples, sorted by falling length, go each where the least room is left over; rows
            come out longest sample first: the caller shuffles them
first-fit   the samples, in the given order, go each into the first row that has room
none        each sample has a row of its own
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

import numpy as np

from torchsft.config import InputError

Method = Literal["best-fit", "first-fit", "none"]


def pack(
    lengths: Sequence[int] | np.ndarray,
    order: Sequence[int],
    seq_len: int,
    method: Method = "best-fit",
    opened: int = 0,
) -> list[list[int]]:
    """Divide samples into rows; the same arguments give the same rows.

    Args:
        lengths: tokens of each sample, at least 1 and at most seq_len.
        order: indices into `lengths`, each at most once.
        opened: so many samples at the beginning of `order` share the first row already; more may be
            added to it.

    Returns:
        Rows of sample indices, of at most seq_len tokens each; every index of `order` exactly once.

    Raises InputError: a sample is longer than a row.
    """
    order = np.asarray(order, dtype=np.int64)
    taken = np.asarray(lengths, dtype=np.int64)[order]
    for wrong in np.flatnonzero((taken < 1) | (taken > seq_len))[:1]:
        fault = (
            f"sample {order[wrong]} has {taken[wrong]} tokens, but a row holds 1 to {seq_len}; "
            f"raise --data.seq-len or set"
        )
        raise InputError(fault + " --data.truncation")
    if method == "none":
        return [[sample] for sample in order.tolist()]
    rows = [order[:opened].tolist()] if opened else []
    free = [seq_len - int(taken[:opened].sum())] if opened else []
    if method == "first-fit":
        # rows that are not begun have room for anything
        room = np.array(free + [seq_len] * (len(order) + 1))
        for sample, length in zip(order[opened:].tolist(), taken[opened:].tolist(), strict=True):
            row = int((room[: len(rows) + 1] >= length).argmax())
            if row == len(rows):
                rows.append([])
            rows[row].append(sample)
            room[row] -= length
        return rows
    # sorted; one integer each: faster than pairs
    begun = [tokens << 32 | row for row, tokens in enumerate(free) if tokens]
    by_length = opened + np.argsort(-taken[opened:], kind="stable")  # ties keep the given order
    for sample, length in zip(order[by_length].tolist(), taken[by_length].tolist(), strict=True):
        place = bisect_left(begun, length << 32)
        if place < len(begun):
            left, row = divmod(begun.pop(place), 1 << 32)
            rows[row].append(sample)
        else:
            left, row = seq_len, len(rows)
            rows.append([sample])
        if left > length:
            insort(begun, (left - length) << 32 | row)
    return rows


def deal(costs: Sequence[float], ranks: int, together: int) -> list[list[int]]:
    """Row numbers for each rank, equally many, in rounds of rows of like cost: `together` of them
    to each rank, the dearest to the one that has had the least so far. `costs` are of as many rows
    as divide by ranks * together.
    """
    order = sorted(range(len(costs)), key=lambda row: -costs[row])  # stable
    totals, dealt = [0.0] * ranks, [[] for _ in range(ranks)]
    for begin in range(0, len(order), ranks * together):
        room = sorted(zip(totals, range(ranks), strict=True))  # a heap
        for row in order[begin : begin + ranks * together]:
            _, rank = heapq.heappop(room)
            dealt[rank].append(row)
            totals[rank] += costs[row]
            if len(dealt[rank]) % together:
                heapq.heappush(room, (totals[rank], rank))
    return dealt
