"""Rows that are tokens already: which of them are trained, which are padding, and where documents
begin.

Labels stand at the place of their token, as in transformers and TRL, which shift them when the loss
is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchsft.data.keys import DOCUMENT_BOUNDS, TOKEN_MASKS
from torchsft.data.rows import Row, RowError, located
from torchsft.data.values import MAX_WEIGHT, expect, weight_of

MAX_ID = 2**31 - 1
NO_LABEL = -100


@dataclass
class ParsedTokens:
    """The tokens of a row.

    Attributes:
        tokens: int32 [n]
        weights: float32 [n], of each as a target.
        starts: where the documents begin, 0 first.
        notes: codes that are counted.
    """

    tokens: np.ndarray
    weights: np.ndarray
    starts: tuple[int, ...]
    notes: tuple[str, ...]


def parse(row: Row) -> ParsedTokens:
    """Return the tokens of a row.

    Raises:
        RowError: bad-tokens, bad-labels, bad-mask, bad-bounds or a fault of a weight.
    """
    ids = _ids(row)
    mask = _attention_mask(row, len(ids))
    attended = np.ones(len(ids), dtype=bool) if mask is None else mask > 0
    label_key = _label_key(row)
    trained_by_masks = _trained_by_masks(row, len(ids))
    notes = []
    if label_key is None:
        weights = np.ones(len(ids), dtype=np.float64)
        for trained in trained_by_masks.values():
            weights[~trained] = 0.0
        if not trained_by_masks:
            notes.append("everything-trained")
    else:
        weights = _weights(row, label_key, ids, attended, trained_by_masks)
    documents = _documents(row, mask, attended)
    if not attended.any():
        raise RowError("bad-mask", "attention_mask leaves no token; remove the row")
    # padding is taken out
    ids = ids[attended]
    weights = weights[attended]
    documents = documents[attended]
    starts = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1))
    if len(starts) > 1:
        notes.append("split-into-documents")
    row_weight = weight_of(row)
    if row_weight is not None:
        weights = weights * row_weight
    return ParsedTokens(
        tokens=ids.astype(np.int32),
        weights=weights.astype(np.float32),
        starts=tuple(starts.tolist()),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------- columns of numbers


def _numbers(value: Any, what: str, booleans: bool = True) -> np.ndarray:
    """Return a list of numbers.

    Args:
        what: it is called in an error.
        booleans: whether true and false count as 1 and 0.

    Returns:
        int64 or float64 [n]

    Raises:
        RowError: bad-tokens, or it is no list.
    """
    try:
        found = np.asarray(expect(list, value, what))
    except (ValueError, OverflowError):  # lists of different lengths
        found = np.array(0)
    kinds = "iufb" if booleans else "iuf"
    is_list_of_numbers = found.ndim == 1 and (len(found) == 0 or found.dtype.kind in kinds)
    if not is_list_of_numbers:
        raise RowError(
            "bad-tokens", f"{what} must be a list of numbers, none of them nested or too large"
        )
    return found.astype(np.int64) if found.dtype.kind == "b" else found


def _for_each_token(row: Row, key: str, n: int) -> np.ndarray:
    """Return a column that has a number for each token.

    Returns:
        int64 or float64 [n]

    Raises:
        RowError: bad-tokens, bad-labels or bad-mask.
    """
    found = _numbers(row[key], key)
    if len(found) != n:
        reason = "bad-labels" if key in ("labels", "loss_weights") else "bad-mask"
        raise RowError(reason, f"{n} input_ids, but {len(found)} {key}; give one for each token")
    return found


def _ids(row: Row) -> np.ndarray:
    """Return the tokens of a row, int64 [n] with n at least 1, padding among them."""
    ids = _numbers(row["input_ids"], "input_ids", booleans=False)
    is_whole = ids.dtype.kind != "f" and len(ids) > 0
    if not is_whole or ids.min() < 0 or ids.max() > MAX_ID:
        raise RowError(
            "bad-tokens", "input_ids must be at least one whole number, all from 0 to 2**31 - 1"
        )
    return ids


def _attention_mask(row: Row, n: int) -> np.ndarray | None:
    """Return the attention mask [n]: 0 for padding; 1, or the number of the document (as axolotl's
    packing writes it).
    """
    if row.get("attention_mask") is None:
        return None
    mask = _for_each_token(row, "attention_mask", n)
    if mask.dtype.kind == "f" or mask.min() < 0:
        raise RowError("bad-mask", "attention_mask must have whole numbers that are at least 0")
    return mask


# ---------------------------------------------------------------- weights


def _label_key(row: Row) -> str | None:
    """Return which key of a row gives weights: labels, loss_weights, or None."""
    keys = [key for key in ("labels", "loss_weights") if row.get(key) is not None]
    if len(keys) > 1:
        raise RowError("bad-labels", "input_ids with labels and loss_weights; give one of them")
    return keys[0] if keys else None


def _trained_by_masks(row: Row, n: int) -> dict[str, np.ndarray]:
    """Find which tokens the masks of a row train.

    Returns:
        bool [n], by the key of the mask.
    """
    keys = [key for key in TOKEN_MASKS if row.get(key) is not None]
    masks = {key: _for_each_token(row, key, n) for key in keys}
    for key, mask in masks.items():
        if not np.isin(mask, (0, 1)).all():
            raise RowError("bad-mask", f"{key} must have a 0 or 1 for each token")
    return {key: mask == 1 for key, mask in masks.items()}


def _weights(
    row: Row,
    key: str,
    ids: np.ndarray,
    attended: np.ndarray,
    trained_by_masks: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return the weight of each token by labels or loss weights, which masks must not contradict.

    Args:
        key: labels or loss_weights.
        ids: int64 [n]
        attended: bool [n], which tokens are no padding.
        trained_by_masks: as `_trained_by_masks` returns them.

    Returns:
        int64 or float64 [n]

    Raises:
        RowError: bad-labels, bad-mask or a fault of a weight.
    """
    weights = _for_each_token(row, key, len(ids))
    if key == "labels":
        _check_labels(weights, ids, attended)
        weights = (weights != NO_LABEL).astype(np.float64)
    wrong = np.flatnonzero(~((weights >= 0) & (weights < MAX_WEIGHT)))
    if len(wrong):
        first = wrong[0]
        with located(f"token {first + 1}"):
            weight_of({"weight": weights[first].item()})  # raises
    for mask_key, trained in trained_by_masks.items():
        conflicts = np.flatnonzero((weights > 0) & ~trained & attended)
        if len(conflicts):
            raise RowError(
                "bad-mask",
                f"{key} train token {conflicts[0] + 1}, but {mask_key} is 0 there; keep one",
            )
    return weights


def _check_labels(labels: np.ndarray, ids: np.ndarray, attended: np.ndarray) -> None:
    """Check that labels repeat the token at their own place, or are -100.

    Raises:
        RowError: bad-labels; they may be shifted, as the sentence then says.
    """
    wrong = np.flatnonzero((labels != NO_LABEL) & (labels != ids) & attended)
    if not len(wrong):
        return
    i = wrong[0]
    problem = f"label {labels[i]} of token {i + 1} is neither -100 nor its id {ids[i]}"
    is_shifted = (labels[:-1] == NO_LABEL) | (labels[:-1] == ids[1:])
    if is_shifted.all():
        problem += ", but that of the token behind it"
    raise RowError("bad-labels", f"{problem}; labels must not be shifted")


# ---------------------------------------------------------------- documents


def _documents(row: Row, mask: np.ndarray | None, attended: np.ndarray) -> np.ndarray:
    """Return the number of each token's document.

    Args:
        mask: int64 [n], the attention mask, which may number documents.
        attended: bool [n], which tokens are no padding.

    Returns:
        int64 [n], rising among the tokens that are no padding.

    Raises:
        RowError: bad-bounds: what the row says of its documents is wrong, or contradicts itself.
    """
    n = len(attended)
    numbers_by_key: dict[str, np.ndarray] = {}
    if mask is not None and mask.max() > 1:
        numbers_by_key["attention_mask"] = mask
    for key in DOCUMENT_BOUNDS:
        if row.get(key) is not None:
            numbers_by_key[key] = _document_numbers(row, key, attended)
    if not numbers_by_key:
        return np.zeros(n, dtype=np.int64)
    # of two tokens in a row that are no padding, whether the second one begins a document
    begins_by_key = {
        key: np.diff(numbers[attended]) != 0 for key, numbers in numbers_by_key.items()
    }
    first_key = next(iter(begins_by_key))
    begins = begins_by_key[first_key]
    for key, other in begins_by_key.items():
        if not np.array_equal(begins, other):
            raise RowError(
                "bad-bounds",
                f"{first_key} and {key} divide the tokens differently; keep one of them",
            )
    documents = np.zeros(n, dtype=np.int64)
    if attended.any():
        numbers = np.cumsum(begins)  # of all attended tokens but the first one
        documents[attended] = np.concatenate([[0], numbers])
    return documents


def _document_numbers(row: Row, key: str, attended: np.ndarray) -> np.ndarray:
    """Return the number of each token's document, by one key of the row: any numbers that differ
    between documents.
    """
    n = len(attended)
    if key == "position_ids":
        return _by_positions(_for_each_token(row, key, n), attended)
    if key == "seq_lengths":
        lengths = _numbers(row[key], key)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        return _by_edges(edges, n, key)
    if key.startswith("cu_"):
        return _by_edges(_numbers(row[key], key), n, key)
    return _for_each_token(row, key, n)


def _by_positions(positions: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """Return documents that begin where positions begin again; padding has none.

    Args:
        positions: int64 [n]
        attended: bool [n], which tokens are no padding.

    Raises:
        RowError: bad-bounds: positions do not count from 0.
    """
    real = positions[attended]
    steps = np.diff(real)
    wrong = np.flatnonzero((steps != 1) & (real[1:] != 0))
    token = 0  # a wrong one, counted from 1
    if len(real) and real[0] != 0:
        token = 1
    elif len(wrong):
        token = int(wrong[0]) + 2
    if token:
        raise RowError(
            "bad-bounds",
            f"position_ids of a document must count from 0, but that of token {token} is "
            f"{real[token - 1]}",
        )
    documents = np.zeros(len(positions), dtype=np.int64)
    documents[attended] = np.cumsum(real == 0)
    return documents


def _by_edges(edges: np.ndarray, n: int, key: str) -> np.ndarray:
    """Return documents between cumulative lengths.

    Args:
        edges: [documents + 1], 0 first and the number of tokens last.
        n: number of tokens.
        key: of the row, for an error.

    Raises:
        RowError: bad-bounds: the lengths are not those of all tokens.
    """
    is_whole = edges.dtype.kind in "iu" or (len(edges) == 1 and edges[0] == 0)
    divides = (
        is_whole
        and len(edges) >= 2
        and edges[0] == 0
        and edges[-1] == n
        and (np.diff(edges) >= 0).all()
    )
    if not divides:
        last = edges[-1] if len(edges) else 0
        raise RowError(
            "bad-bounds", f"{key} must divide all {n} input_ids, from 0 to {n}, but ends at {last}"
        )
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges))
