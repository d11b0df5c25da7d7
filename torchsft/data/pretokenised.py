"""Rows that are tokens already: which of them are trained, which are padding, and where documents
begin.

Labels stand at the place of their token, as in transformers and TRL, which shift them when the loss
is computed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from torchsft.data.keys import DOCUMENT_BOUNDS, TOKEN_MASKS
from torchsft.data.rows import Example, Row, RowError, Strings, located
from torchsft.data.values import MAX_WEIGHT, expect, row_weight, weight_of

MAX_ID = 2**31 - 1
NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class Tokens(Example):
    """Tokens as they are.

    Attributes:
        tokens: int32 [n], n at least 1.
        weights: float32 [n], of each token as a target.
        starts: where the documents begin, 0 first; tokens of one document do not see those of
            another.
    """

    tokens: np.ndarray
    weights: np.ndarray
    starts: tuple[int, ...] = (0,)


def parse(row: Row, name: str, ignored: Strings) -> Tokens:
    """Return the tokens of a row.

    Args:
        name: the example's id.
        ignored: keys of the row that mean nothing.

    Raises:
        RowError: bad-tokens, bad-labels, bad-mask, bad-bounds or a fault of a weight.
    """
    ids = _ids(row)
    mask = _attention_mask(row, len(ids))
    attended = mask > 0
    label_key = _label_key(row)
    trained_by_masks = _trained_by_masks(row, len(ids))
    notes = []
    if label_key:
        weights = _weights(row, label_key, ids, attended, trained_by_masks)
    else:
        weights = np.all([attended, *trained_by_masks.values()], axis=0)
        if not trained_by_masks:
            notes.append("everything-trained")
    starts = _starts(row, mask, attended)
    if not attended.any():
        raise RowError("bad-mask", "attention_mask leaves no token; remove the row")
    if len(starts) > 1:
        notes.append("split-into-documents")
    return Tokens(
        name,
        tokens=ids[attended].astype(np.int32),  # padding is taken out
        weights=(row_weight(row) * weights[attended]).astype(np.float32),
        starts=starts,
        notes=tuple(notes),
        ignored=ignored,
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


def _attention_mask(row: Row, n: int) -> np.ndarray:
    """Return the attention mask [n]: 0 for padding; 1, or the number of the document (as axolotl's
    packing writes it).
    """
    if row.get("attention_mask") is None:
        return np.ones(n, dtype=np.int64)
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
    trained_by_masks: dict[str, np.ndarray],
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


def _starts(row: Row, mask: np.ndarray, attended: np.ndarray) -> tuple[int, ...]:
    """Return where documents begin among the tokens that are no padding, 0 first.

    Args:
        mask: int64 [n], the attention mask, which may number documents.
        attended: bool [n], which tokens are no padding.

    Raises:
        RowError: bad-bounds: what the row says of its documents is wrong, or contradicts itself.
    """
    numbers_by_key = {"attention_mask": mask} if mask.max() > 1 else {}
    for key in DOCUMENT_BOUNDS:
        if row.get(key) is not None:
            numbers_by_key[key] = _document_numbers(row, key, attended)
    # of two tokens in a row that are no padding, whether the second one begins a document
    begins_by_key = {
        key: np.diff(numbers[attended]) != 0 for key, numbers in numbers_by_key.items()
    }
    first_key = next(iter(begins_by_key), "")
    begins = begins_by_key.get(first_key, [])
    for key, other in begins_by_key.items():
        if not np.array_equal(begins, other):
            raise RowError(
                "bad-bounds",
                f"{first_key} and {key} divide the tokens differently; keep one of them",
            )
    return (0, *(np.flatnonzero(begins) + 1).tolist())


def _document_numbers(row: Row, key: str, attended: np.ndarray) -> np.ndarray:
    """Return the number of each token's document, by one key of the row: any numbers that differ
    between documents.
    """
    n = len(attended)
    if key == "seq_lengths":
        return _by_edges(np.cumsum([0, *_numbers(row[key], key)]), n, key)
    if key.startswith("cu_"):
        return _by_edges(_numbers(row[key], key), n, key)
    numbers = _for_each_token(row, key, n)
    return _by_positions(numbers, attended) if key == "position_ids" else numbers


def _by_positions(positions: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """Return documents that begin where positions begin again; padding has none.

    Args:
        positions: int64 [n]
        attended: bool [n], which tokens are no padding.

    Raises:
        RowError: bad-bounds: positions do not count from 0.
    """
    real = positions[attended]
    wrong = np.flatnonzero((np.diff(real, prepend=-1) != 1) & (real != 0))
    if len(wrong):
        raise RowError(
            "bad-bounds",
            f"position_ids of a document must count from 0, but that of token {wrong[0] + 1} is "
            f"{real[wrong[0]]}",
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
    lengths = np.diff(edges)
    is_whole = edges.dtype.kind in "iu" and len(lengths) > 0
    if not is_whole or edges[0] != 0 or edges[-1] != n or lengths.min() < 0:
        last = edges[-1] if len(edges) else 0
        raise RowError(
            "bad-bounds", f"{key} must divide all {n} input_ids, from 0 to {n}, but ends at {last}"
        )
    return np.repeat(np.arange(len(lengths)), lengths)
