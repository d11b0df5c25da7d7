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

    Raises:
        InputError: a sample is longer than a row.
    """
    samples = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths, dtype=np.int64)[samples]
    _check_sizes(samples, sizes, seq_len)
    if method == "none":
        return [[sample] for sample in samples.tolist()]

    rows: list[list[int]] = []
    free: list[int] = []  # tokens that each row has room for
    if opened:
        rows.append(samples[:opened].tolist())
        free.append(seq_len - int(sizes[:opened].sum()))
    samples = samples[opened:]
    sizes = sizes[opened:]
    if method == "first-fit":
        return _first_fit(rows, free, samples, sizes, seq_len)
    longest_first = np.argsort(-sizes, kind="stable")  # ties keep the given order
    return _best_fit(rows, free, samples[longest_first], sizes[longest_first], seq_len)


def _check_sizes(samples: np.ndarray, sizes: np.ndarray, seq_len: int) -> None:
    """Raise InputError for the first sample that no row can hold."""
    wrong = np.flatnonzero((sizes < 1) | (sizes > seq_len))
    if len(wrong):
        first = wrong[0]
        raise InputError(
            f"sample {samples[first]} has {sizes[first]} tokens, but a row holds 1 to {seq_len}; "
            f"raise --data.seq-len or set --data.truncation"
        )


def _first_fit(
    rows: list[list[int]], free: list[int], samples: np.ndarray, sizes: np.ndarray, seq_len: int
) -> list[list[int]]:
    """Add each sample to the first row that has room.

    Args:
        rows: that are begun.
        free: tokens that each of them has room for.
        samples: int64 [n]
        sizes: int64 [n], tokens of each sample.
    """
    # one row for each sample at most; rows that are not begun have room for anything
    room = np.array(free + [seq_len] * (len(samples) + 1))
    for sample, size in zip(samples.tolist(), sizes.tolist(), strict=True):
        row = int((room[: len(rows) + 1] >= size).argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        room[row] -= size
    return rows


def _best_fit(
    rows: list[list[int]], free: list[int], samples: np.ndarray, sizes: np.ndarray, seq_len: int
) -> list[list[int]]:
    """Add each sample to the row in which the least room is left over; arguments as in
    `_first_fit`, with the longest samples first.
    """
    # Sorted by room. One integer for each row, (room << 32 | row), is faster than a pair.
    with_room = [tokens << 32 | row for row, tokens in enumerate(free) if tokens]
    for sample, size in zip(samples.tolist(), sizes.tolist(), strict=True):
        place = bisect_left(with_room, size << 32)
        if place < len(with_room):
            room, row = divmod(with_room.pop(place), 1 << 32)
            rows[row].append(sample)
        else:
            room = seq_len
            row = len(rows)
            rows.append([sample])
        room -= size
        if room:
            insort(with_room, room << 32 | row)
    return rows


def balance_rows(costs: Sequence[float], ranks: int, micro_batch_size: int) -> list[list[int]]:
    """Give each rank equally many rows of about equal cost.

    The rows go to the ranks in rounds, the costliest first: a microbatch for each rank, so that the
    rows of a round cost about the same. Within a round each row goes to the rank that has had the
    least so far and whose microbatch is not full.

    Args:
        costs: of each row; ranks * micro_batch_size divides their number.

    Returns:
        Indices of rows, for each rank.
    """
    costliest_first = sorted(range(len(costs)), key=lambda row: -costs[row])  # stable
    totals = [0.0] * ranks
    rows_of: list[list[int]] = [[] for _ in range(ranks)]
    rows_per_round = ranks * micro_batch_size
    for start in range(0, len(costliest_first), rows_per_round):
        open_ranks = sorted(zip(totals, range(ranks), strict=True))  # a heap
        for row in costliest_first[start : start + rows_per_round]:
            _, rank = heapq.heappop(open_ranks)
            rows_of[rank].append(row)
            totals[rank] += costs[row]
            if len(rows_of[rank]) % micro_batch_size:
                heapq.heappush(open_ranks, (totals[rank], rank))
    return rows_of
