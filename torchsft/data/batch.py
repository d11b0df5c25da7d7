"""From rows of samples to the tensors of a microbatch: rows folded, documents marked, padding at
the end.

T = rows * seq_len tokens, N documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from torchsft.config import InputError
from torchsft.data.template import Sample

NO_LABEL = -100


@dataclass
class Batch:
    """One microbatch. The documents of all rows come first, one after the other; padding is
    collected behind them.

    Attributes:
        tokens: int64 [T].
        labels: int64 [T], the token to predict at each position: the next one of the same document.
            -100 where there is none (last token of a document, padding) or where its weight is 0.
        loss_weights: float32 [T], the weight of `labels`; 0 where that is -100.
        positions: int64 [T], from 0 in each document; 0 in padding.
        cu_seqlens: int32 [N + 1], document n is `tokens[cu_seqlens[n] : cu_seqlens[n + 1]]`; the
            last entry is the number of real tokens. `[0]` where there is no document at all.
        max_seqlen: tokens of the longest document, 0 where there is none; on the host, so that no
            device is asked.
        padding: tokens behind the last document, likewise.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    padding: int

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, from which a GPU copies beside its work
        (once: what is pinned stays).
        """
        return self._with_each(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`; copies to a GPU go through pinned memory and are not
        waited for.
        """
        is_gpu = torch.device(device).type == "cuda"
        source = self.pin_memory() if is_gpu else self
        return source._with_each(lambda tensor: tensor.to(device, non_blocking=is_gpu))

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with each tensor changed."""
        inputs = self.model_inputs().items()
        return Batch(**{name: change(x) if isinstance(x, Tensor) else x for name, x in inputs})

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Return the keyword arguments of a model that is to return the loss sum."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def collate(rows: Sequence[Sequence[Sample]], seq_len: int, pad_token_id: int) -> Batch:
    """Return the microbatch of some rows.

    Args:
        rows: samples of each row; a row may be empty.
        seq_len: tokens of a row.
        pad_token_id: stands in padding; nothing depends on it, it only has to be a token of the
            model.

    Raises:
        InputError: the samples of a row have more than seq_len tokens.
    """
    size = len(rows) * seq_len
    ends = [0]  # of the documents
    tokens = np.full(size, pad_token_id, dtype=np.int64)
    labels = np.full(size, NO_LABEL, dtype=np.int64)
    loss_weights = np.zeros(size, dtype=np.float32)
    positions = np.zeros(size, dtype=np.int64)
    for row in rows:
        filled = sum(len(sample.tokens) for sample in row)
        if filled > seq_len:
            raise InputError(
                f"a row has {filled} tokens, but --data.seq-len is {seq_len}; pack "
                f"the samples first"
            )
        for sample in row:
            start = ends[-1]
            end = start + len(sample.tokens)
            ends.append(end)
            tokens[start:end] = sample.tokens
            positions[start:end] = np.arange(end - start)
            # position t predicts token t + 1; the last position predicts nothing
            weights = sample.weights[1:]
            loss_weights[start : end - 1] = weights
            labels[start : end - 1] = np.where(weights != 0, sample.tokens[1:], NO_LABEL)
    longest = max((len(sample.tokens) for row in rows for sample in row), default=0)
    arrays = map(torch.from_numpy, (tokens, labels, loss_weights, positions))
    return Batch(*arrays, torch.tensor(ends, dtype=torch.int32), longest, size - ends[-1])
