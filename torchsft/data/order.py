"""Pseudorandom orders, computed position by position, so that none is ever held in memory."""

from collections.abc import Sequence

import numpy as np

ROUNDS = 6  # of the Feistel network
MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9)


def shuffled(positions: Sequence[int] | np.ndarray, n: int, *key: int) -> np.ndarray:
    """Return where a permutation of [0, n) takes some positions, without an array of n.

    A Feistel network permutes the smallest [0, 4^k) that is large enough; what lands outside [0, n)
    goes through it again.

    Args:
        positions: int64 [m], each in [0, n).
        key: decides the permutation.

    Returns:
        int64 [m]
    """
    bits = (n - 1).bit_length()
    half_bits = max(1, (bits + 1) // 2)
    shift = np.uint64(half_bits)
    half_mask = np.uint64((1 << half_bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    found = np.asarray(positions).astype(np.uint64)
    outside = np.arange(len(found))  # indices into `found` of what is not in [0, n) yet
    while len(outside):
        left = found[outside] >> shift
        right = found[outside] & half_mask
        for round_key in round_keys:
            mixed = _mixed(right, round_key) & half_mask
            left, right = right, left ^ mixed
        found[outside] = (left << shift) | right
        outside = outside[found[outside] >= n]
    return found.astype(np.int64)


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Mix the bits of values with a key.

    Args:
        values: uint64 [m]

    Returns:
        uint64 [m], of which 32 bits are used; each of them depends on all bits of value and key.
    """
    mixed = (values + key) * MULTIPLIER_1
    mixed = (mixed ^ (mixed >> np.uint64(29))) * MULTIPLIER_2
    return mixed >> np.uint64(32)
