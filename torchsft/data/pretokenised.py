"""Rows that are tokens already: which of them are trained, which are padding, and where documents
begin.

Labels stand at the place of their token, as in transformers and TRL, which shift them when the loss
is computed.
"""

from typing import Any

import numpy as np

from torchsft.data.keys import DOCUMENT_BOUNDS, TOKEN_MASKS
from torchsft.data.rows import Row, RowError
from torchsft.data.values import MAX_WEIGHT, expect, weight_of

Parsed = tuple[np.ndarray, np.ndarray, tuple[int, ...], tuple[str, ...]]


def parse(row: Row, where: str) -> Parsed:
    """The tokens of a row.

    Returns:
        tokens int32 [n], weights float32 [n] of each as a target, where the documents begin (0
        first), and notes.

    Raises:
        RowError: bad-tokens, bad-labels, bad-mask, bad-bounds or a fault of a weight.
    """
    ids = _numbers(row["input_ids"], "input_ids", where, booleans=False)
    if ids.dtype.kind == "f" or not len(ids) or not 0 <= ids.min() <= ids.max() < 2**31:
        said = "input_ids must be at least one whole number, all from 0 to 2**31 - 1"
        raise RowError(where, "bad-tokens", said)
    attended, documents = _attention(row, len(ids), where)
    weights, notes = _weights(row, ids, attended, where)
    documents = _documents(row, documents, attended, where)
    if not attended.any():
        raise RowError(where, "bad-mask", "attention_mask leaves no token; remove the row")
    ids, weights, documents = ids[attended], weights[attended], documents[attended]
    starts = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1))
    if len(starts) > 1:
        notes.append("split-into-documents")
    of_row = weight_of(row, where)
    weights = weights * (1.0 if of_row is None else of_row)
    return ids.astype(np.int32), weights.astype(np.float32), tuple(starts.tolist()), tuple(notes)


def _numbers(value: Any, what: str, where: str, booleans: bool = True) -> np.ndarray:
    try:
        found = np.asarray(expect(list, value, what, where))
    except (ValueError, OverflowError):  # lists of different lengths
        found = np.array(0)
    kinds = "iufb" if booleans else "iuf"
    if found.ndim != 1 or (len(found) and found.dtype.kind not in kinds):
        said = f"{what} must be a list of numbers, none of them nested or too large"
        raise RowError(where, "bad-tokens", said)
    return found.astype(np.int64) if found.dtype.kind == "b" else found


def _for_each_token(row: Row, key: str, n: int, where: str) -> np.ndarray:
    """A number for each token."""
    found = _numbers(row[key], key, where)
    if len(found) != n:
        reason = "bad-labels" if key in ("labels", "loss_weights") else "bad-mask"
        raise RowError(
            where, reason, f"{n} input_ids, but {len(found)} {key}; give one for each token"
        )
    return found


def _attention(row: Row, n: int, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Which tokens are no padding, and the documents where the mask numbers them, as axolotl's
    packing does.
    """
    if row.get("attention_mask") is None:
        return np.ones(n, dtype=bool), None
    mask = _for_each_token(row, "attention_mask", n, where)
    if mask.dtype.kind == "f" or mask.min() < 0:
        raise RowError(
            where, "bad-mask", "attention_mask must have whole numbers that are at least 0"
        )
    return mask > 0, mask if mask.max() > 1 else None


def _weights(
    row: Row, ids: np.ndarray, attended: np.ndarray, where: str
) -> tuple[np.ndarray, list[str]]:
    """The weight of each token, by labels or loss weights, and by masks."""
    keys = [key for key in ("labels", "loss_weights") if row.get(key) is not None]
    if len(keys) > 1:
        raise RowError(
            where, "bad-labels", "input_ids with labels and loss_weights; give one of them"
        )
    masks = {
        key: _for_each_token(row, key, len(ids), where)
        for key in TOKEN_MASKS
        if row.get(key) is not None
    }
    for key, mask in masks.items():
        if not np.isin(mask, (0, 1)).all():
            raise RowError(where, "bad-mask", f"{key} must have a 0 or 1 for each token")
    trained = np.ones(len(ids), dtype=bool)
    for mask in masks.values():
        trained &= mask == 1
    if not keys:
        notes = [] if masks else ["everything-trained"]
        return trained.astype(np.float64), notes
    given = _for_each_token(row, keys[0], len(ids), where)
    if keys[0] == "labels":
        _check_labels(given, ids, attended, where)
        given = (given != -100).astype(np.float64)
    for i in np.flatnonzero(~((given >= 0) & (given < MAX_WEIGHT)))[:1]:
        weight_of({"weight": given[i].item()}, f"{where}, token {i + 1}")
    for key, mask in masks.items():
        if conflict := np.flatnonzero((given > 0) & (mask == 0) & attended).tolist():
            said = (
                f"{keys[0]} train token {conflict[0] + 1}, but {key} is 0 there; keep one of them"
            )
            raise RowError(where, "bad-mask", said)
    return given, []


def _check_labels(labels: np.ndarray, ids: np.ndarray, attended: np.ndarray, where: str) -> None:
    """Labels repeat the token at their own place, or are -100."""
    wrong = np.flatnonzero((labels != -100) & (labels != ids) & attended)
    for i in wrong[:1]:
        said = f"label {labels[i]} of token {i + 1} is neither -100 nor its id {ids[i]}"
        behind = (labels[:-1] == -100) | (labels[:-1] == ids[1:])
        if behind.all():
            said += ", but that of the token behind it"
        raise RowError(where, "bad-labels", f"{said}; labels must not be shifted")


def _documents(
    row: Row, numbered: np.ndarray | None, attended: np.ndarray, where: str
) -> np.ndarray:
    """The number of each token's document, int64 [n]; all that the row says of it must agree."""
    n = len(attended)
    found: dict[str, np.ndarray] = {}
    if numbered is not None:
        found["attention_mask"] = numbered
    for key in DOCUMENT_BOUNDS:
        if row.get(key) is None:
            continue
        if key == "position_ids":
            found[key] = _by_positions(_for_each_token(row, key, n, where), attended, where)
        elif key == "seq_lengths":
            lengths = _numbers(row[key], key, where)
            found[key] = _by_edges(np.concatenate([[0], np.cumsum(lengths)]), n, key, where)
        elif key.startswith("cu_"):
            found[key] = _by_edges(_numbers(row[key], key, where), n, key, where)
        else:
            found[key] = _for_each_token(row, key, n, where)
    if not found:
        return np.zeros(n, dtype=np.int64)
    edges = {key: np.diff(numbers[attended]) != 0 for key, numbers in found.items()}
    (first, bounds), *others = edges.items()
    for key, other in others:
        if not np.array_equal(bounds, other):
            raise RowError(
                where,
                "bad-bounds",
                f"{first} and {key} divide the tokens differently; keep one of them",
            )
    numbers = np.zeros(n, dtype=np.int64)
    numbers[attended] = np.concatenate([[0], np.cumsum(bounds)]) if attended.any() else 0
    return numbers


def _by_positions(positions: np.ndarray, attended: np.ndarray, where: str) -> np.ndarray:
    """Documents begin where positions begin anew; padding has none."""
    real = positions[attended]
    steps = np.diff(real)
    wrong = np.flatnonzero((steps != 1) & (real[1:] != 0))
    if len(real) and (real[0] != 0 or len(wrong)):
        at = int(wrong[0]) + 2 if real[0] == 0 else 1
        said = (
            f"position_ids of a document must count from 0, but that of token {at} is "
            f"{real[at - 1]}"
        )
        raise RowError(where, "bad-bounds", said)
    numbers = np.zeros(len(positions), dtype=np.int64)
    numbers[attended] = np.cumsum(real == 0)
    return numbers


def _by_edges(edges: np.ndarray, n: int, key: str, where: str) -> np.ndarray:
    """Documents between cumulative lengths, 0 first and the number of tokens last."""
    whole = edges.dtype.kind in "iu" or (len(edges) == 1 and edges[0] == 0)
    if not whole or len(edges) < 2 or edges[0] != 0 or edges[-1] != n or (np.diff(edges) < 0).any():
        said = (
            f"{key} must divide all {n} input_ids, from 0 to {n}, but ends at "
            f"{edges[-1] if len(edges) else 0}"
        )
        raise RowError(where, "bad-bounds", said)
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges))
