"""Rows of several experts cut into tiles of up to 128, each of one expert; and padded, so that each
expert has a multiple of some number of rows. Nothing of it asks the device for anything.

Shape suffixes: R rows sorted by expert, M rows with zeros between them, C columns, E experts, T
tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 128


class Tiles(NamedTuple):
    """The rows of experts cut into tiles of up to 128, each of one expert; int32. There are as many
    as there can be at most, so that nothing is asked of the device: the last ones may be empty.
    """

    first_T: Tensor  # row with which a tile begins; R: the tile is empty
    expert_T: Tensor
    end_T: Tensor  # row at which the expert of a tile ends
    bounds_E: Tensor  # [E + 1]: expert e has the tiles bounds_E[e] to bounds_E[e + 1]


def tiles_of(offs_E: Tensor, rows: int) -> Tiles:
    """Cut rows into tiles.

    Args:
        offs_E: int32, where each expert's rows end; the last is `rows`.
        rows: how many there are, at least 1.
    """
    zero = offs_E.new_zeros(1)
    begin_E = torch.cat([zero, offs_E[:-1]])
    tiles_E = (offs_E - begin_E + SIZE - 1) // SIZE  # of each expert
    bounds_E = torch.cat([zero, tiles_E]).cumsum(0, dtype=torch.int32)
    # Each expert begins a tile of its own.
    most = (rows + (SIZE - 1) * len(offs_E)) // SIZE
    tile_T = torch.arange(most, device=offs_E.device, dtype=torch.int32)
    expert_T = torch.searchsorted(bounds_E[1:], tile_T, right=True, out_int32=True)
    is_empty_T = expert_T == len(offs_E)
    expert_T = expert_T.clamp(max=len(offs_E) - 1)
    first_T = begin_E[expert_T] + SIZE * (tile_T - bounds_E[expert_T])
    return Tiles(first_T.masked_fill(is_empty_T, rows), expert_T, offs_E[expert_T], bounds_E)


class Padding(NamedTuple):
    """Where rows are when each expert's are followed by zeros, up to a multiple of some number."""

    place_R: Tensor  # among the padded rows
    offs_E: Tensor  # int32, where each expert's padded rows end
    # padded rows, as many as there can be at most: those behind the last expert's are zeros too
    count: int

    def pad(self, x_RC: Tensor) -> Tensor:
        """Return x_MC."""
        x_MC = x_RC.new_zeros(self.count, x_RC.shape[1])
        x_MC[self.place_R] = x_RC
        return x_MC

    def index_M(self) -> Tensor:
        """Return which row each padded row is, int32; -1: zeros."""
        rows = len(self.place_R)
        index_M = self.place_R.new_full((self.count,), -1, dtype=torch.int32)
        index_M[self.place_R] = torch.arange(rows, device=index_M.device, dtype=torch.int32)
        return index_M


def padding_of(offs_E: Tensor, rows: int, multiple: int) -> Padding:
    """Pad the rows of each expert to a multiple.

    Args:
        offs_E: int32, where each expert's rows end; the last is `rows`.
        rows: how many there are.
        multiple: of the rows that each expert shall have.
    """
    lengths_E = offs_E.diff(prepend=offs_E.new_zeros(1))
    padded_E = (lengths_E + multiple - 1) // multiple * multiple
    ends_E = padded_E.cumsum(0, dtype=torch.int32)
    moved_E = (ends_E - padded_E) - (offs_E - lengths_E)
    row_R = torch.arange(rows, device=offs_E.device, dtype=torch.int32)
    expert_R = torch.searchsorted(offs_E, row_R, right=True)
    count = (rows + (multiple - 1) * len(offs_E)) // multiple * multiple
    return Padding(row_R + moved_E[expert_R], ends_E, count)
